"""What a drafter's config says of its block, wherever it stands: read in DSpark's words, or refused by name.

| meaning | keys, in any place of places.py | in DSpark's words |
| --- | --- | --- |
| drafts per pass | block_size | block_size |
| does the anchor predict | sample_from_anchor (speculators, NeMo RL), shift_label (NVIDIA), anchor_first (here) | anchor_first, default true |
| mask token | mask_token_id, noise_token_id | mask_token_id |
| target layers | target_layer_ids: i = output of layer i | target_layer_ids |
| | aux_hidden_state_layer_ids, eagle_aux_hidden_state_layer_ids (speculators, vLLM): one higher | target_layer_ids |
| heads | markov_rank, markov_head_type, enable_confidence_head, confidence_head_with_markov, sts_temperatures | the same |
| drafts per pass again | num_speculative_tokens; speculative_tokens of each method in speculators_config | block_size |

Where the anchor does not predict, a block_size counts it beside the drafts; DFlash's anchor does not, unless its config says so. An
unknown key inside a block of keys is refused, and so is a known one with a value that nothing here computes.

Sources: github.com/deepseek-ai/DeepSpec; github.com/z-lab/dflash (model.py at 44947fb); github.com/vllm-project/speculators
(config.py, models/dflash/config.py and models/dspark/config.py at c05b95b); vLLM, model_executor/models/qwen3_dflash.py (036a00d);
SGLang, speculative/dspark_components/dspark_config.py (01f4762); NVIDIA Model-Optimizer 0.47.0,
modelopt/torch/export/plugins/hf_spec_export.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from . import attention, rope
from .places import BLOCKS, Found, Place, agreed, find, places, same

_HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov", "sts_temperatures")
_WORDS = {
    "block_size": ("block_size",),
    "anchor_first": ("anchor_first", "sample_from_anchor", "shift_label"),
    "mask_token_id": ("mask_token_id", "noise_token_id"),
    "target_layer_ids": ("target_layer_ids",),
    "num_target_layers": ("num_target_layers",),
    **{key: (key,) for key in _HEADS},
    "enable_confidence_head": ("enable_confidence_head", "use_confidence_head"),  # NVIDIA's word
}
_ONE_HIGHER = ("aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids")
_DRAFTS = ("num_speculative_tokens", "speculative_tokens")
_FIXED = {"use_aux_hidden_state": True, "logit_scale": 1, "projector_type": "dspark"}  # with one value here
# What a block may repeat: key -> the key at the top level that has its value.
_REPEATED = {
    "target_hidden_size": "hidden_size",
    "draft_vocab_size": "vocab_size",
    **{
        key: key
        for key in (
            *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers"),
            *("vocab_size", "hidden_act", "rms_norm_eps", "tie_word_embeddings"),
        )
    },
}
_TRAINING = ("num_anchors",)
_KNOWN = frozenset(
    (*sum(_WORDS.values(), ()), *_ONE_HIGHER, *_DRAFTS, *_FIXED, *_REPEATED, *_TRAINING, *attention.KEYS, *rope.KEYS)
)
_SPECULATORS = frozenset(("algorithm", "proposal_methods", "default_proposal_method", "verifier"))
_PROPOSAL = {"proposal_type": "greedy", "verifier_accept_k": 1, "accept_tolerance": 0}  # greedy: a chain; the rest lose nothing


def read(config: Mapping, source, *, dflash: bool, draft_vocabulary: bool = False) -> dict:
    """A config in DSpark's words. dflash: the anchor does not predict unless the config says so. draft_vocabulary: whether the format
    has a draft head over fewer ids.

    Raises ValueError for a contradiction, an unknown key inside a block of keys, and a value that nothing here computes.
    """
    where = places(config, source)
    for place in where:
        _check_known(place, source)
    for key, value in _FIXED.items():
        _check_all(find(where, key), value, "", source)
    for key, top in _REPEATED.items():
        if draft_vocabulary and key == "draft_vocab_size":
            continue
        _check_all(find(where, key), config.get(top), f" ({top})", source)
    said = {word: find(where, *keys) for word, keys in _WORDS.items()}
    said["target_layer_ids"] += [_lowered(found, source) for found in find(where, *_ONE_HIGHER)]
    one = {word: agreed(word, found, source) for word, found in said.items() if found}
    words = {word: found.value for word, found in one.items()}
    first = words.get("anchor_first", not dflash)
    if type(first) is not bool:
        raise ValueError(f"{source}: expected {one['anchor_first'].where} true or false, got {first!r}")
    if not first:
        words["anchor_first"] = False
        # anchor_first is this package's word, and its block_size counts drafts; that of a DFlash file never does.
        if "block_size" in words and (dflash or not find(where, "anchor_first")):
            words["block_size"] = _without_anchor(one["block_size"], source)
    _check_drafts(find(where, *_DRAFTS), words.get("block_size"), source)
    _check_speculators(config.get("speculators_config") or {}, words.get("block_size"), dflash, source)
    return {**config, **words}


def _check_known(place: Place, source) -> None:
    name = place.prefix.rstrip(".")
    if name == "" or place.is_text:
        return
    known = _KNOWN | (_SPECULATORS if name == "speculators_config" else frozenset())
    surplus = ", ".join(sorted(place.content.keys() - known))
    if surplus and name in BLOCKS:
        raise ValueError(f"{source}: expected a {name} of known keys alone, got {surplus} too")
    if surplus:
        raise ValueError(f"{source}: expected {name}* to be known keys, got {surplus} after {name}")


def _check_all(found: Iterable[Found], value, of: str, source) -> None:
    for each in found:
        if not same(each.value, value):
            raise ValueError(f"{source}: expected {each.where} {value!r}{of}, got {each.value!r}")


def _check_drafts(found: Iterable[Found], drafts, source) -> None:
    """As many as the block has. With fewer, an engine would run a shorter block, whose rows the others see."""
    found = list(found)
    for each in found:
        if type(each.value) is int and type(drafts) is int and each.value > drafts:
            raise ValueError(
                f"{source}: expected {each.where} {drafts} (the drafts of block_size), got {each.value}, more than the block has rows"
                " that predict"
            )
    _check_all(found, drafts, " (the drafts of block_size)", source)


def _lowered(found: Found, source) -> Found:
    """Layer ids that count the embedding as 0, in those that count it as -1."""
    if not isinstance(found.value, list) or not all(type(layer) is int for layer in found.value):
        raise ValueError(f"{source}: expected {found.where} to be layer ids, got {found.value!r}")
    return Found(f"{found.where}, one higher there", [layer - 1 for layer in found.value])


def _without_anchor(size: Found, source) -> int:
    if type(size.value) is not int or size.value < 2:
        raise ValueError(f"{source}: expected an integer block_size >= 2, got {size.value!r} ({size.where})")
    return size.value - 1


def _check_speculators(own: Mapping, drafts, dflash: bool, source) -> None:
    """What speculators_config says of a drafter: the same algorithm, as many drafts, and acceptance that loses nothing."""
    algorithms = ("dflash",) if dflash else ("dspark", "dflash")
    if own.get("algorithm") not in (None, *algorithms):
        raise ValueError(f"{source}: expected speculators_config.algorithm in {algorithms}, got {own['algorithm']!r}")
    methods = own.get("proposal_methods") or []
    if not isinstance(methods, list) or not all(isinstance(method, Mapping) for method in methods):
        raise ValueError(f"{source}: expected speculators_config.proposal_methods to be objects, got {methods!r}")
    wanted = {**_PROPOSAL, "speculative_tokens": drafts}
    for i, method in enumerate(methods):
        where = f"speculators_config.proposal_methods[{i}]"
        surplus = ", ".join(sorted(method.keys() - wanted.keys()))
        if surplus:
            raise ValueError(f"{source}: expected {where} of known keys alone, got {surplus} too")
        for key, value in wanted.items():
            found = find([Place(f"{where}.", method)], key)
            if key == "speculative_tokens":
                _check_drafts(found, value, source)
            else:
                _check_all(found, value, "", source)
