"""Configs of the speculators library: DSpark and DFlash drafters, read as the other formats' configs are, or refused by name.

| key | meaning here |
| --- | --- |
| speculators_model_type | which format: `dspark` or `dflash`; speculators_config.algorithm says the same |
| transformer_layer_config | the config of the layers, which are Qwen3's whatever its model_type; its tie_word_embeddings is the target's |
| aux_hidden_state_layer_ids | target layers, one higher than target_layer_ids: i is what goes into layer i |
| block_size, sample_from_anchor | rows of a block; does the anchor predict (a DSpark file has to say: the library takes true, vLLM false) |
| draft_vocab_size | ids of the draft head; fewer than vocab_size: d2t (target id - draft id) and t2d (bool, the ids that d2t names) |
| sliding_window_non_causal | with windows: whether a block's rows see those after them |
| norm_before_residual, norm_before_fc, fc_norm, norm_output | of EAGLE-3 alone: refused |

Every key of the top level is one of these, one of block.py or one that transformers writes for all models; others are refused.
Source: speculators 0.9.0 (config.py, model.py, models/dflash, models/dspark); vLLM 0.32.0 (transformers_utils/configs/speculators).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .places import ROPE_KEYS, TEXTS

KINDS = ("dspark", "dflash")
LAYERS = TEXTS[1]  # transformer_layer_config
_HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
_READ = (
    *("speculators_model_type", "speculators_version", "speculators_config", LAYERS, "architectures", "tie_word_embeddings"),
    *("aux_hidden_state_layer_ids", "block_size", "draft_vocab_size", "mask_token_id", "sample_from_anchor"),
    *("sliding_window_non_causal", "target_hidden_size"),
)
# What PretrainedConfig of transformers writes for any model; none of it changes what these layers compute.
_OF_TRANSFORMERS = (
    *("_name_or_path", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "is_decoder"),
    *("is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type"),
    *("return_dict", "sep_token_id", "torch_dtype", "transformers_version", "use_cache"),
)


def is_wrapped(config: Mapping) -> bool:
    """Whether a config is of this library: it wraps the config of the layers."""
    return any(config.get(key) is not None for key in ("speculators_model_type", LAYERS))


def kind_of(config: Mapping) -> str | None:
    """The library's name of a drafter's kind, None where the config does not say."""
    own = config.get("speculators_config")
    kind = config.get("speculators_model_type") or (own.get("algorithm") if isinstance(own, Mapping) else None)
    return kind if isinstance(kind, str) else None


def surplus(config: Mapping, known: Iterable[str]) -> str:
    """Keys of the top level that neither this package knows nor transformers writes for any model; "" where there are none."""
    return ", ".join(sorted(key for key in config.keys() - {*known, *_OF_TRANSFORMERS} if config[key] is not None))


def unwrapped(config: Mapping, source) -> dict:
    """A config as the other readers of this folder take it. Raises ValueError, naming the key, for what they would not see."""
    kind, layers, own = kind_of(config), config.get(LAYERS), config.get("speculators_config")
    if not isinstance(layers, Mapping):
        raise ValueError(f"{source}: expected {LAYERS} to be an object, got {layers!r}")
    others = surplus(config, {*_READ, *(_HEADS if kind == "dspark" else ())})
    if others:
        raise ValueError(f"{source}: expected a {kind} drafter of speculators of known keys alone, got {others} too")
    if isinstance(own, Mapping) and own.get("algorithm") not in (None, kind):
        raise ValueError(f"{source}: expected speculators_config.algorithm {kind!r}, got {own['algorithm']!r}")
    first = config.get("sample_from_anchor", False if kind == "dflash" else None)
    if type(first) is not bool:
        readers = " (where it is missing, speculators takes true and vLLM false)" if first is None else ""
        raise ValueError(f"{source}: expected sample_from_anchor true or false{readers}, got {first!r}")
    if not first and config.get("markov_head_type") == "rnn" and config.get("markov_rank"):
        raise ValueError(
            f"{source}: expected a markov_head_type without a state beside sample_from_anchor false, got 'rnn': its state would have"
            " read the anchor's row, which is no draft"
        )
    for key in ("aux_hidden_state_layer_ids", "mask_token_id", "draft_vocab_size"):
        if config.get(key) is None:
            raise ValueError(f"{source}: expected the key {key}, got a config without it")
    layers_read = config["aux_hidden_state_layer_ids"]
    if isinstance(layers_read, list) and all(type(i) is int for i in layers_read) and layers_read != sorted(set(layers_read)):
        raise ValueError(f"{source}: expected rising aux_hidden_state_layer_ids (readers put them in order), got {layers_read}")
    for key in ROPE_KEYS[:2]:
        parts = layers.get(key)
        entries = [name for name, value in parts.items() if isinstance(value, Mapping)] if isinstance(parts, Mapping) else []
        if entries:
            raise ValueError(f"{source}: expected one {LAYERS}.{key} for all layers, got entries for {', '.join(sorted(entries))}")
    layers = {key: value for key, value in layers.items() if key != "tie_word_embeddings"}
    return {**config, LAYERS: layers, "sample_from_anchor": first, "tie_word_embeddings": False}
