"""EAGLE-3 drafters: what their configs say, wherever it stands, in one set of words; or the refusal by name.

| word | keys | where they are missing |
| --- | --- | --- |
| target_layer_ids: -1 = the embedding, i = output of layer i | target_layer_ids; eagle_aux_hidden_state_layer_ids, one higher | None: layers 1, n/2 - 1 and n - 4 of n |
| norm_before_residual: the residual is the normed state | norm_before_residual | false; speculators has to say |
| norm_before_fc: RMSNorm of the layers' outputs side by side | norm_before_fc | false |
| fc_norm: RMSNorm of each of them | fc_norm | false |
| norm_output: the next draft reads the state after the final norm | norm_output | false |
| draft_vocab_size | draft_vocab_size | vocab_size |
| target_hidden_size | target_hidden_size | hidden_size |
| head_norms: RMSNorm of queries and keys, per head | model_type qwen3; llama: none | as the name in architectures says |

Keys stand at the top level, in `eagle_config` (NVIDIA) or, of the layers, in speculators' transformer_layer_config. Refused by name:
drafters without target layers (`use_aux_hidden_state` false), those that draft in parallel, and layers of other kinds than Llama's and
Qwen3's. Tensors may be named `midlayer.*` for `layers.0.*`, and `model.` may stand before all.

Sources: EAGLE-3, arXiv 2503.01840; github.com/SafeAILab/EAGLE; speculators 0.9.0 (models/eagle3); vLLM 0.32.0
(model_executor/models/llama_eagle3.py, v1/worker/gpu/spec_decode/eagle/eagle3_utils.py); NVIDIA Model-Optimizer (0371364,
modelopt/torch/export/plugins/hf_spec_export.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from . import attention, rope, speculators
from .places import Place, agreed, find, flat, same

_BLOCK = "eagle_config"
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "vocab_size")
_LAYERS = ("llama", "qwen3")
# Keys with one value here: what NVIDIA's exporter writes, and what its other values would change.
_FIXED = {
    "use_aux_hidden_state": True, "use_last_layernorm": True, "use_input_layernorm_in_first_layer": True, "use_mtp_layernorm": False,
    "parallel_draft_step": 1, "logit_scale": 1, "mlp_bias": False, "bias": False, "qkv_bias": False, "has_lm_head": True,
}  # fmt: skip
_OF_BLOCK = {*_FLAGS, *_FIXED, "eagle_aux_hidden_state_layer_ids", "next_layer_regular"}
_OF_SPECULATORS = {
    *_FLAGS, "speculators_model_type", "speculators_version", "speculators_config", speculators.LAYERS, "architectures",
    "tie_word_embeddings", "eagle_aux_hidden_state_layer_ids", "draft_vocab_size", "target_hidden_size", "embed_requires_grad",
    "sliding_window_non_causal",
}  # fmt: skip


def is_eagle3(config: Mapping) -> bool:
    """By name, or a language model with a draft vocabulary (SafeAILab's own files), or a drafter of speculators that says so."""
    if speculators.is_wrapped(config):
        return speculators.kind_of(config) == "eagle3"
    names = config.get("architectures")
    named = isinstance(names, list) and any(isinstance(name, str) and "eagle3" in name.lower() for name in names)
    first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    language_model = first == "" or first.endswith("ForCausalLM")
    return named or (language_model and config.get("draft_vocab_size") is not None)


def read(config: Mapping, source) -> dict:
    """A config in the words above. Raises ValueError, naming the key, for what is missing, contradicts itself or is not computed."""
    wrapped = speculators.is_wrapped(config)
    if wrapped:
        config = _unwrapped(config, source)
    config = flat(config, source)
    block = config.get(_BLOCK) or {}
    if not isinstance(block, Mapping):
        raise ValueError(f"{source}: expected {_BLOCK} to be an object, got {block!r}")
    surplus = ", ".join(sorted(block.keys() - _OF_BLOCK))
    if surplus:
        raise ValueError(f"{source}: expected an {_BLOCK} of known keys alone, got {surplus} too")
    where = [Place("", config), Place(f"{_BLOCK}.", block)]
    for key, value in _FIXED.items():
        for found in find(where, key):
            if not same(found.value, value):
                raise ValueError(f"{source}: expected {found.where} {value!r}, which is what is computed here, got {found.value!r}")
    words = {flag: _flag(flag, where, wrapped, source) for flag in _FLAGS}
    if words["norm_before_fc"] and words["fc_norm"]:
        raise ValueError(f"{source}: expected norm_before_fc or fc_norm, got both")
    for key in _SIZES:
        _size(config.get(key), key, source)
    kind, names = config.get("model_type"), config.get("architectures")
    name = str(names[0]).lower() if isinstance(names, list) and names else ""
    known = wrapped or any(layers in name for layers in _LAYERS)
    if kind not in (*_LAYERS, None) or not known:
        found = f"architectures {names!r} and model_type {kind!r}"
        raise ValueError(f"{source}: expected an EAGLE-3 drafter with the layers of {' or '.join(_LAYERS)}, got {found}")
    words["head_norms"] = kind == "qwen3" or (kind is None and "qwen3" in name)
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % groups:
        raise ValueError(
            f"{source}: expected num_attention_heads to be a multiple of num_key_value_heads, got {heads} and {groups}"
        )
    words["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    _size(words["head_dim"], "head_dim", source)
    for key, top in (("draft_vocab_size", "vocab_size"), ("target_hidden_size", "hidden_size")):
        words[key] = config[top] if config.get(key) is None else config[key]
        _size(words[key], key, source)
    if words["draft_vocab_size"] > config["vocab_size"]:
        own, vocab = words["draft_vocab_size"], config["vocab_size"]
        raise ValueError(f"{source}: expected a draft_vocab_size of at most {vocab} (vocab_size), got {own}")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"{source}: expected hidden_act 'silu', got {activation!r}")
    config = {**config, **words}
    rope.qwen3(config, source)
    attention.check({**config, "sliding_window_non_causal": False}, source, causal=True, windows=wrapped)
    return {**config, "target_layer_ids": _target_layers(where, source)}


def shapes(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Every tensor that a config needs."""
    d, ffn, head, wide = config["hidden_size"], config["intermediate_size"], config["head_dim"], config["target_hidden_size"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    chosen, own = len(config["target_layer_ids"] or (0, 0, 0)), config["draft_vocab_size"]
    found = {"fc.weight": (d, chosen * wide), "norm.weight": (d,), "lm_head.weight": (own, d), "layers.0.hidden_norm.weight": (d,)}
    if config["norm_before_fc"]:
        found["input_norm.weight"] = (chosen * wide,)
    if config["fc_norm"]:
        found |= {f"fc_norm.{i}.weight": (wide,) for i in range(chosen)}
    for i in range(config["num_hidden_layers"]):
        width = d if i else 2 * d
        layer = {
            "input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width), "self_attn.o_proj": (d, queries),
            "mlp.gate_proj": (ffn, d), "mlp.up_proj": (ffn, d), "mlp.down_proj": (d, ffn),
        }  # fmt: skip
        if config["head_norms"]:
            layer |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
        found |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found | ({"d2t": (own,)} if own != config["vocab_size"] else {})


def optional(config: Mapping) -> dict[str, tuple[int, ...]]:
    """What the files may hold besides: the embedding is else the target's."""
    d, vocab, own = config["hidden_size"], config["vocab_size"], config["draft_vocab_size"]
    found = {"embed_tokens.weight": (vocab, d), "verifier_lm_head.weight": (own, d), "verifier_norm.weight": (d,)}
    return found | {"t2d": (vocab,), "d2t": (own,)}


def renamed(name: str) -> str:
    """A tensor's name in the words of `shapes`."""
    name = name.removeprefix("model.")
    return "layers.0." + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name


def _unwrapped(config: Mapping, source) -> dict:
    layers, own = config.get(speculators.LAYERS), config.get("speculators_config")
    if not isinstance(layers, Mapping):
        raise ValueError(f"{source}: expected {speculators.LAYERS} to be an object, got {layers!r}")
    surplus = speculators.surplus(config, _OF_SPECULATORS)
    if surplus:
        raise ValueError(f"{source}: expected an eagle3 drafter of speculators of known keys alone, got {surplus} too")
    if isinstance(own, Mapping) and own.get("algorithm") not in (None, "eagle3"):
        raise ValueError(f"{source}: expected speculators_config.algorithm 'eagle3', got {own['algorithm']!r}")
    layers = {key: value for key, value in layers.items() if key != "tie_word_embeddings"}
    return {**config, speculators.LAYERS: layers, "tie_word_embeddings": False, "model_type": layers.get("model_type")}


def _flag(key: str, where: list[Place], wrapped: bool, source) -> bool:
    found = agreed(key, find(where, key), source)
    if found is None and wrapped and key == "norm_before_residual":
        raise ValueError(f"{source}: expected {key} true or false (where it is missing, speculators takes false and vLLM true)")
    value = False if found is None else found.value
    if type(value) is not bool:
        raise ValueError(f"{source}: expected {found.where} true or false, got {value!r}")
    return value


def _size(value, key: str, source) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{source}: expected an integer {key} >= 1, got {value!r}")


def _target_layers(where: list[Place], source) -> list[int] | None:
    found = find(where, "target_layer_ids")
    for each in find(where, "eagle_aux_hidden_state_layer_ids"):
        if not isinstance(each.value, list) or not all(type(layer) is int for layer in each.value):
            raise ValueError(f"{source}: expected {each.where} to be layer ids, got {each.value!r}")
        found.append(each._replace(where=f"{each.where}, one higher there", value=[layer - 1 for layer in each.value]))
    one = agreed("target_layer_ids", found, source)
    if one is None or one.value == []:
        return None
    layers = one.value
    if (
        not isinstance(layers, list)
        or not all(type(layer) is int and layer >= -1 for layer in layers)
        or layers != sorted(set(layers))
    ):
        raise ValueError(
            f"{source}: expected rising target layers from -1 on (readers put them in order), got {layers!r} ({one.where})"
        )
    return layers
