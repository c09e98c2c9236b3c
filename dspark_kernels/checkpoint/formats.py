"""What a checkpoint directory may hold, by the `architectures` of its config.json: which keys and tensors, or why it is refused.

| architectures | what it is | published as |
| --- | --- | --- |
| Qwen3DSparkModel | DSpark, Qwen3 layers; rank 0 without confidence: DeepSpec's DFlash | deepseek-ai/{dspark,dflash}_qwen3_* |
| Gemma4DSparkModel | the same with the layers of Gemma 4's full attention | deepseek-ai/{dspark,dflash}_gemma4_12b_block7 |
| DFlashDraftModel | DFlash: only masks predict, embedding and head are the target's | z-lab/*-DFlash* |
| DFlashDraftModel with projector_type dspark | DSpark, embedding and head of the target | NVIDIA Model-Optimizer |
| any, with speculators_model_type | DSpark, DFlash of the speculators library: speculators.py | RedHatAI/*-speculator.* |
| *Eagle3*, and others: eagle3.py | EAGLE-3, which `load_eagle3` reads | SafeAILab, NVIDIA, DeepSpec, speculators |
| Qwen3ForCausalLM | a target, or a draft model | Qwen/Qwen3-* |

Symbols: d hidden size, m target layers, V vocabulary, r Markov rank, K drafts per pass. Everything is decided by config.json: a
config is checked in full before a tensor is looked for. What stands in several places: places.py, rope.py, attention.py, block.py.
Sources: github.com/deepseek-ai/DeepSpec (DSpark, its DFlash and EAGLE-3), github.com/z-lab/dflash, github.com/SafeAILab/EAGLE,
github.com/vllm-project/speculators.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from . import attention, block, eagle3, rope, speculators
from .places import find, flat, places

HEAD_TYPES = ("vanilla", "gated", "rnn")
_SIZES = ("4b", "8b", "14b")
_DSPARK = (*(f"deepseek-ai/dspark_qwen3_{size}_block7" for size in _SIZES), "deepseek-ai/dspark_gemma4_12b_block7")
_DFLASH = (
    *(f"deepseek-ai/dflash_qwen3_{size}_block7" for size in _SIZES),
    "deepseek-ai/dflash_gemma4_12b_block7",
    "z-lab/Qwen3-4B-DFlash-b16",
    "z-lab/Qwen3-8B-DFlash-b16",
)
_EAGLE = (*(f"deepseek-ai/eagle3_qwen3_{size}_ttt7" for size in _SIZES), "deepseek-ai/eagle3_gemma4_12b_ttt7")
_TARGETS = ("Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "Qwen/Qwen3-14B", "google/gemma-4-12B-it")
REPOSITORIES = (*_DSPARK, *_DFLASH, *_EAGLE, *_TARGETS)
PUBLISHED_DRAFTERS = "DSpark drafters on Hugging Face: " + ", ".join(_DSPARK) + "; DFlash: " + ", ".join(_DFLASH)
PUBLISHED_EAGLE3 = "EAGLE-3 drafters on Hugging Face: " + ", ".join(_EAGLE)
PUBLISHED_TARGETS = "targets on Hugging Face: " + ", ".join(_TARGETS)
_LAYER_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_hidden_layers",
    "vocab_size",
)
_DRAFTER_SIZES = ("block_size", "num_target_layers")
_DRAFTER_KEYS = ("mask_token_id", "target_layer_ids", "markov_rank", "enable_confidence_head")

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Format:
    """One architecture.

    title: what it is, in a few words. read(config, source): the config, with what nested places alone say at the top level and,
    of a drafter, in DSpark's words (`DrafterCheckpoint`); raises ValueError, naming the file `source`, for one that is
    incomplete, contradicts itself or asks for what nothing here computes. shapes(config): every tensor of a config that was read;
    optional(config): tensors that the files may hold besides, of which those in `unread` are left there. renamed(name): a tensor's name
    here, of its name in the files.
    """

    title: str
    read: Callable[[Mapping, Path], dict]
    shapes: Callable[[Mapping], Shapes]
    optional: Callable[[Mapping], Shapes] = lambda config: {}
    unread: tuple[str, ...] = ()
    renamed: Callable[[str], str] = str


def of(config: Mapping, known: Mapping[str, Format]) -> Format | None:
    """The format of a config among `known` and, where these are drafters, among those of speculators; None for another."""
    if speculators.is_wrapped(config):
        return SPECULATORS.get(speculators.kind_of(config) or "") if known.keys() & DRAFTERS.keys() else None
    found = config.get("architectures")
    name = found[0] if isinstance(found, list) and len(found) == 1 else None
    # SafeAILab's EAGLE-3 files call themselves language models, those of the speculators library what they wrap.
    if not isinstance(name, str) or is_eagle3(config) or is_speculators(config):
        return None
    if _projector(config) is not None:
        return MODELOPT if _projector(config) == "dspark" and name in known and name == "DFlashDraftModel" else None
    return known.get(name)


def _projector(config: Mapping) -> object:
    """What NVIDIA Model-Optimizer calls the head over a DFlash backbone, None where there is none."""
    own = config.get("dflash_config")
    return own.get("projector_type") if isinstance(own, Mapping) else None


def published(directory: Path, several: str) -> str:
    """Where a directory that is not there can be had: its repository, where the name tells which, else all of `several`."""
    for repository in REPOSITORIES:
        owner, name = repository.split("/")
        if directory.name.lower() in (name.lower(), f"models--{owner}--{name}".lower()):
            return f"the repository {repository} on Hugging Face holds it: hf download {repository} --local-dir {directory}"
    return several


def described(config: Mapping) -> str:
    """A config's architectures, its model_type, and what that is and why it is refused, where known."""
    found = config.get("architectures")
    text = "none" if found is None else json.dumps(found)
    text += "" if config.get("model_type") is None else f" (model_type {config['model_type']!r})"
    known = other(config)
    return text + (f", {known}" if known else "")


def other(config: Mapping) -> str | None:
    """What a config of no format here is, and why it is refused; None where it is unknown."""
    name = _name(config)
    if is_speculators(config) and not is_eagle3(config):
        kind = speculators.kind_of(config)
        read = " and ".join(SPECULATORS)
        whole = "are read here, with their configs"
        return f"a drafter in the layout of the speculators library of the kind {kind!r}, of which {read} {whole}"
    if is_eagle3(config):
        width = config.get("draft_vocab_size")
        own = width not in (None, config.get("vocab_size"))
        return (
            "an EAGLE-3 drafter: its layers read target states beside token embeddings and draft token by token"
            + (f", over {width} ids of its own that d2t maps to the target's" if own else "")
            + "; load_eagle3 reads it, and reference/drafters runs it"
        )
    if _projector(config) not in (None, "dspark"):
        return f"a DFlash drafter with a head of the kind {_projector(config)!r}, of which 'dspark' is read"
    if name == "DSparkDraftModel":
        return "a DSpark drafter of other training code, whose layers may differ from those of DeepSpec"
    if name.startswith("DFlash") and name not in DRAFTERS:
        return "a DFlash drafter of another version, with parts that are not in the published DFlashDraftModel"
    if "eagle" in name.lower():
        return "an EAGLE drafter, which drafts token by token from the target's last layer; no backbone for it is here"
    if config.get("model_type") in ("deepseek_v3", "deepseek_v4", "deepseek_v32"):
        return "a DeepSeek model, whose drafter is part of the target's own files and needs its attention"
    return None


def is_speculators(config: Mapping) -> bool:
    """A drafter that the speculators library wrote: it wraps the layers' config, and counts target layers from one more."""
    return speculators.is_wrapped(config) or (config.get("speculators_config") is not None and _name(config) not in DRAFTERS)


def is_eagle3(config: Mapping) -> bool:
    """An EAGLE-3 drafter: eagle3.py."""
    return (speculators.is_wrapped(config) or not is_speculators(config)) and eagle3.is_eagle3(config)


def is_language_model(config: Mapping) -> bool:
    """A causal language model, which transformers may know: a target, or a draft model."""
    return _name(config).endswith(("ForCausalLM", "ForConditionalGeneration")) and other(config) is None


def _name(config: Mapping) -> str:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _require(condition: bool, source: Path, expected: str, got) -> None:
    if not condition:
        raise ValueError(f"{source}: expected {expected}, got {got}")


def _require_keys(config: Mapping, keys, source: Path) -> None:
    missing = [key for key in keys if key not in config]
    _require(not missing, source, f"the keys {', '.join(missing)}", "a config without them")


def _check_size(value, key: str, source: Path, low: int = 1) -> None:
    _require(type(value) is int and value >= low, source, f"an integer {key} >= {low}", repr(value))


def _check_eps(config: Mapping, source: Path) -> None:
    eps = config.get("rms_norm_eps", 1e-6)
    _require(_positive(eps), source, "a positive rms_norm_eps", repr(eps))


def _positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _check_heads(config: Mapping, kv_heads: str, source: Path) -> None:
    heads, groups = config["num_attention_heads"], config[kv_heads]
    _require(heads % groups == 0, source, f"num_attention_heads to be a multiple of {kv_heads}", f"{heads} and {groups}")


def _check_bool(config: Mapping, key: str, source: Path) -> None:
    value = config.get(key)
    _require(value is None or type(value) is bool, source, f"{key} true or false", repr(value))


def _check_qwen3_layers(config: Mapping, source: Path, *, causal: bool, windows: bool = False) -> None:
    _require_keys(config, _LAYER_SIZES, source)
    for key in _LAYER_SIZES:
        _check_size(config[key], key, source)
    _check_heads(config, "num_key_value_heads", source)
    rope.qwen3(config, source)
    _check_eps(config, source)
    activation = config.get("hidden_act", "silu")
    _require(activation == "silu", source, "hidden_act 'silu'", repr(activation))
    for found in find(places(config, source), "final_logit_softcapping"):
        raise ValueError(f"{source}: expected no {found.where} with Qwen3 layers, got {found.value!r}")
    attention.check(config, source, causal=causal, windows=windows)


def _check_gemma4_layers(config: Mapping, source: Path) -> None:
    sizes = [key for key in _LAYER_SIZES if key not in ("num_key_value_heads", "head_dim")]
    sizes += ["global_head_dim", gemma4_kv_heads(config)]
    _require_keys(config, sizes, source)
    for key in sizes:
        _check_size(config[key], key, source)
    _check_heads(config, gemma4_kv_heads(config), source)
    rope.gemma4(config, source)
    _check_eps(config, source)
    activation = config.get("hidden_activation", "gelu_pytorch_tanh")
    _require(activation == "gelu_pytorch_tanh", source, "hidden_activation 'gelu_pytorch_tanh'", repr(activation))
    cap = config.get("final_logit_softcapping")
    _require(cap is None or _positive(cap), source, "a positive final_logit_softcapping or none", repr(cap))
    attention.check(config, source, causal=False)
    for key, what in (
        ("enable_moe_block", "mixture-of-experts blocks"),
        ("hidden_size_per_layer_input", "embeddings per layer"),
        ("use_double_wide_mlp", "double-wide MLPs"),
    ):
        _require(not config.get(key), source, f"no {what} in a drafter ({key})", config.get(key))


def gemma4_kv_heads(config: Mapping) -> str:
    """The key that gives the key-value heads of Gemma 4's full attention: where values are the keys, a number of its own."""
    return "num_global_key_value_heads" if config.get("attention_k_eq_v") else "num_key_value_heads"


def _check_block(config: Mapping, source: Path) -> None:
    """What a block drafter adds to its layers, in DSpark's words. Files of speculators do not say how many layers their target has."""
    sizes = [key for key in _DRAFTER_SIZES if key in (*config, "block_size") or not speculators.is_wrapped(config)]
    _require_keys(config, (*sizes, *_DRAFTER_KEYS), source)
    for key in sizes:
        _check_size(config[key], key, source)
    _check_size(config["markov_rank"], "markov_rank", source, low=0)
    for key in ("enable_confidence_head", "confidence_head_with_markov", "tie_word_embeddings"):
        _check_bool(config, key, source)
    if config["markov_rank"]:
        _require_keys(config, ("markov_head_type",), source)
        kind = config["markov_head_type"]
        _require(kind in HEAD_TYPES, source, f"markov_head_type in {HEAD_TYPES}", repr(kind))
    if config["enable_confidence_head"]:
        _require_keys(config, ("confidence_head_with_markov",), source)
        alone = config["confidence_head_with_markov"] and not config["markov_rank"]
        _require(not alone, source, "markov_rank >= 1 with confidence_head_with_markov", 0)
    layers, count = config["target_layer_ids"], config.get("num_target_layers")
    last = "their last" if count is None else f"{count - 1} (num_target_layers - 1)"
    _require(
        isinstance(layers, list) and layers and all(type(i) is int and -1 <= i < (count or math.inf) for i in layers),
        source, f"target_layer_ids from -1 to {last}", layers,
    )  # fmt: skip
    mask, last = config["mask_token_id"], config["vocab_size"] - 1
    _require(type(mask) is int and 0 <= mask <= last, source, f"mask_token_id from 0 to {last}", repr(mask))
    temperatures, size = config.get("sts_temperatures"), config["block_size"]
    _require(
        temperatures is None
        or (
            isinstance(temperatures, list)
            and len(temperatures) == size
            and all(map(_positive, temperatures))
        ),
        source, f"{size} positive sts_temperatures", temperatures,
    )  # fmt: skip


def _read_qwen3_dspark(config: Mapping, source: Path) -> dict:
    config = flat(config, source)
    _check_qwen3_layers(config, source, causal=False)
    config = block.read(config, source, dflash=False)
    _check_block(config, source)
    return config


def _read_gemma4_dspark(config: Mapping, source: Path) -> dict:
    config = flat(config, source)
    _check_gemma4_layers(config, source)
    config = block.read(config, source, dflash=False)
    _check_block(config, source)
    return config


def _read_dflash(config: Mapping, source: Path) -> dict:
    config = flat(config, source)
    _check_qwen3_layers(config, source, causal=False)
    config = block.read(config, source, dflash=True)
    own = config.get("dflash_config")
    _require("mask_token_id" in config, source, "a dflash_config with the keys mask_token_id", own)
    _require_keys(config, _DRAFTER_SIZES, source)
    _check_size(config["num_target_layers"], "num_target_layers", source)
    for key in ("markov_rank", "enable_confidence_head"):
        _require(not config.get(key), source, f"no {key} in a DFlash drafter, which has no heads", repr(config.get(key)))
    config |= {"markov_rank": 0, "enable_confidence_head": False}
    if config.get("target_layer_ids") is None:
        config["target_layer_ids"] = _spread(config["num_target_layers"], config["num_hidden_layers"])
    _check_block(config, source)
    return config


def _read_modelopt(config: Mapping, source: Path) -> dict:
    config = flat(config, source)
    _check_qwen3_layers(config, source, causal=False)
    own = config["dflash_config"]
    for key in ("markov_rank", "markov_head_type", "use_confidence_head", "shift_label"):
        _require(own.get(key) is not None, source, f"a dflash_config with the key {key}", own)
    config = block.read(config, source, dflash=True)
    _check_block({**config, "confidence_head_with_markov": True}, source)
    return {**config, "confidence_head_with_markov": True}


def _modelopt_name(name: str) -> str:
    """The heads' tensors stand at the top there; files that nest them as DeepSpec does are read too."""
    if name.startswith(("markov_w1.", "markov_w2.", "gate_proj.", "joint_proj.")):
        return f"markov_head.{name}"
    return name.replace("confidence_proj.", "confidence_head.proj.") if name.startswith("confidence_proj.") else name


def _read_speculators(config: Mapping, source: Path) -> dict:
    dflash = speculators.kind_of(config) == "dflash"
    config = flat(speculators.unwrapped(config, source), source)
    _check_qwen3_layers(config, source, causal=False, windows=True)
    config = block.read(config, source, dflash=dflash, draft_vocabulary=True)
    if dflash:
        config |= {"markov_rank": 0, "enable_confidence_head": False}
    _check_block(config, source)
    vocab, own = config["vocab_size"], config["draft_vocab_size"]
    _require(type(own) is int and 1 <= own <= vocab, source, f"a draft_vocab_size from 1 to {vocab} (vocab_size)", repr(own))
    return config


def _read_qwen3(config: Mapping, source: Path) -> dict:
    config = flat(config, source)
    _check_qwen3_layers(config, source, causal=True)
    _check_bool(config, "tie_word_embeddings", source)
    return config


def _spread(target_layers: int, draft_layers: int) -> list[int]:
    """DFlash's own choice of target layers: as many as draft layers, evenly from the second to the last but two."""
    if draft_layers == 1:
        return [target_layers // 2]
    first, last = 1, target_layers - 3
    return [round(first + i * (last - first) / (draft_layers - 1)) for i in range(draft_layers)]


def _qwen3_layer(config: Mapping) -> Shapes:
    d, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (queries, d),
        "self_attn.k_proj.weight": (keys, d),
        "self_attn.v_proj.weight": (keys, d),
        "self_attn.o_proj.weight": (d, queries),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "mlp.gate_proj.weight": (ffn, d),
        "mlp.up_proj.weight": (ffn, d),
        "mlp.down_proj.weight": (d, ffn),
    }


def _gemma4_layer(config: Mapping) -> Shapes:
    heads = {"head_dim": config["global_head_dim"], "num_key_value_heads": config[gemma4_kv_heads(config)]}
    shapes = _qwen3_layer({**config, **heads})
    if config.get("attention_k_eq_v"):
        del shapes["self_attn.v_proj.weight"]
    d = config["hidden_size"]
    return {**shapes, "pre_feedforward_layernorm.weight": (d,), "post_feedforward_layernorm.weight": (d,), "layer_scalar": (1,)}


def _backbone(config: Mapping, layer: Shapes) -> Shapes:
    d = config["hidden_size"]
    shapes = {"fc.weight": (d, len(config["target_layer_ids"]) * d), "hidden_norm.weight": (d,), "norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        shapes.update({f"layers.{i}.{name}": shape for name, shape in layer.items()})
    return shapes


def _dspark(config: Mapping, layer: Shapes) -> Shapes:
    d, vocab = config["hidden_size"], config["vocab_size"]
    return {"embed_tokens.weight": (vocab, d), "lm_head.weight": (vocab, d), **_backbone(config, layer), **_heads(config)}


def _heads(config: Mapping) -> Shapes:
    d, vocab, rank, shapes = config["hidden_size"], config["vocab_size"], config["markov_rank"], {}
    if rank:
        shapes["markov_head.markov_w1.weight"] = (vocab, rank)
        shapes["markov_head.markov_w2.weight"] = (config.get("draft_vocab_size") or vocab, rank)
        if config["markov_head_type"] == "gated":
            shapes["markov_head.gate_proj.weight"] = (rank, d + rank)
            shapes["markov_head.gate_proj.bias"] = (rank,)
        elif config["markov_head_type"] == "rnn":
            shapes["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + d)
            shapes["markov_head.joint_proj.bias"] = (3 * rank,)
    if config["enable_confidence_head"]:
        shapes["confidence_head.proj.weight"] = (1, d + (rank if config["confidence_head_with_markov"] else 0))
        shapes["confidence_head.proj.bias"] = (1,)
    return shapes


def _speculators(config: Mapping) -> Shapes:
    d, vocab, own = config["hidden_size"], config["vocab_size"], config["draft_vocab_size"]
    shapes = {**_backbone(config, _qwen3_layer(config)), **_heads(config)}
    return shapes if own == vocab else {**shapes, "lm_head.weight": (own, d), "d2t": (own,)}


def _speculators_may_hold(config: Mapping) -> Shapes:
    """The embedding and, over all ids, the head are the target's where the files have none."""
    d, vocab, own = config["hidden_size"], config["vocab_size"], config["draft_vocab_size"]
    shapes = {"embed_tokens.weight": (vocab, d), "verifier_lm_head.weight": (own, d), "verifier_norm.weight": (d,)}
    return shapes | ({"lm_head.weight": (vocab, d)} if own == vocab else {"t2d": (vocab,)})


def _causal_lm(config: Mapping) -> Shapes:
    d, vocab = config["hidden_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        shapes.update({f"model.layers.{i}.{name}": shape for name, shape in _qwen3_layer(config).items()})
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, d)
    return shapes


DRAFTERS = {
    "Qwen3DSparkModel": Format("DSpark drafter with Qwen3 layers", _read_qwen3_dspark, lambda c: _dspark(c, _qwen3_layer(c))),
    "Gemma4DSparkModel": Format("DSpark drafter with Gemma 4 layers", _read_gemma4_dspark, lambda c: _dspark(c, _gemma4_layer(c))),
    "DFlashDraftModel": Format("DFlash drafter with Qwen3 layers", _read_dflash, lambda c: _backbone(c, _qwen3_layer(c))),
}
MODELOPT = Format(
    "DSpark drafter of NVIDIA Model-Optimizer, with Qwen3 layers", _read_modelopt,
    lambda c: {**_backbone(c, _qwen3_layer(c)), **_heads(c)}, renamed=_modelopt_name,
)  # fmt: skip
_UNREAD = ("verifier_lm_head.weight", "verifier_norm.weight")  # of the training: what the targets of its loss came from
SPECULATORS = {
    kind: Format(
        f"{title} drafter of the speculators library, with Qwen3 layers", _read_speculators, _speculators, _speculators_may_hold,
        unread=_UNREAD,
    )
    for kind, title in zip(speculators.KINDS, ("DSpark", "DFlash"), strict=True)
}  # fmt: skip
EAGLE3 = Format("EAGLE-3 drafter", eagle3.read, eagle3.shapes, eagle3.optional, unread=_UNREAD, renamed=eagle3.renamed)
TARGETS = {"Qwen3ForCausalLM": Format("Qwen3 language model", _read_qwen3, _causal_lm)}
