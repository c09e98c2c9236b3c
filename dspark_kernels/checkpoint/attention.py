"""Which rows a layer attends to, as the whole config says it: the drafter's block sees all rows, a target those before, no windows.

| meaning | keys, in any place of places.py | read here |
| --- | --- | --- |
| causality | causal, is_causal | false for a drafter's block, true for a target |
| | use_bidirectional_attention | anything for a drafter, false for a target |
| windows | layer_types | one entry a layer, every one full_attention |
| | use_sliding_window, use_swa | false |
| | sliding_window_size, swa_window_size, a block's sliding_window | none, or beside a false of the row above |
| | sliding_window and max_window_layers at the top level | anything: transformers writes them, and uses them with the rows above |
| biases, sinks | attention_bias, attention_sink_bias, add_swa_attention_sink_bias | false |

Sources: Hugging Face transformers 5.10 (Qwen3Config), vLLM model_executor/models/qwen3_dflash.py (036a00d).
"""

from __future__ import annotations

from collections.abc import Mapping

from .places import TEXT, Found, Place, agreed, find, places

FULL = "full_attention"
_CAUSAL = ("causal", "is_causal")
_USED = ("use_sliding_window", "use_swa")
_SIZES = ("sliding_window", "sliding_window_size", "swa_window_size")
_ABSENT = ("attention_bias", "attention_sink_bias", "add_swa_attention_sink_bias")
# sliding_window_non_causal is of layers with a window, of which there are none.
KEYS = ("layer_types", *_CAUSAL, *_USED, *_SIZES, "max_window_layers", "sliding_window_non_causal", *_ABSENT)


def check(config: Mapping, source, *, causal: bool) -> None:
    """causal: what the layers compute. Raises ValueError, with key, place and value, where a config asks for anything else."""
    where = places(config, source)
    for found in find(where, *_ABSENT):
        if found.value is not False:
            raise ValueError(f"{source}: expected no {found.where}, got {found.value!r}")
    for found in find(where, *_CAUSAL):
        if found.value is not causal:
            meaning = "a target's rows see those before" if causal else "a block's rows see each other in both directions"
            raise ValueError(f"{source}: expected {found.where} {causal!r} ({meaning}), got {found.value!r}")
    for found in find(where, "use_bidirectional_attention") if causal else ():
        if found.value is not False:
            raise ValueError(f"{source}: expected {found.where} False (a target's rows see those before), got {found.value!r}")
    windows = _windows(where, config.get("num_hidden_layers"), source)
    if windows:
        raise ValueError(f"{source}: expected full attention in every layer, got {windows[0].where} {windows[0].value!r}")


def _windows(where: list[Place], layers, source) -> list[Found]:
    """What says that a layer attends through a window."""
    types = agreed("layer_types", find(where, "layer_types"), source)
    if types is not None and (not isinstance(types.value, list) or len(types.value) != layers):
        raise ValueError(f"{source}: expected {layers} {types.where} (num_hidden_layers), got {types.value!r}")
    windows = [types] if types is not None and any(kind != FULL for kind in types.value) else []
    windows += [found for found in find(where, *_USED) if found.value is not False]
    for place in where:
        model = place.prefix in ("", f"{TEXT}.")
        if not any(place.content.get(key) is False for key in _USED):
            windows += find([place], *_SIZES[1:] if model else _SIZES)
    return windows
