"""Which rows a layer attends to, as the whole config says it: the drafter's block sees all rows, a target those before, no windows.

Drafters of the speculators library may have windows: rows of a block with its anchor at position a see the context from a - W on,
and of the block all rows or, as that library's default is, the rows up to their own (`Sight`).

| meaning | keys, in any place of places.py | read here |
| --- | --- | --- |
| causality | causal, is_causal | false for a drafter's block, true for a target |
| | use_bidirectional_attention | anything for a drafter, false for a target |
| windows | layer_types | one entry a layer, every one full_attention |
| | use_sliding_window, use_swa | false |
| | sliding_window_size, swa_window_size, a block's sliding_window | none, or beside a false of the row above |
| | sliding_window and max_window_layers at the top level | anything: transformers writes them, and uses them with the rows above |
| windows of speculators | sliding_attention in layer_types, with sliding_window and sliding_window_non_causal | all values |
| biases, sinks | attention_bias, attention_sink_bias, add_swa_attention_sink_bias | false |

Sources: Hugging Face transformers 5.10 (Qwen3Config), vLLM model_executor/models/qwen3_dflash.py (036a00d), speculators 0.9.0
(models/dflash/attention.py: the mask that its drafters are trained with; vLLM 0.32.0 counts the same window from every row).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .places import Found, Place, agreed, find, places

FULL, SLIDING = "full_attention", "sliding_attention"
_CAUSAL = ("causal", "is_causal")
_USED = ("use_sliding_window", "use_swa")
_SIZES = ("sliding_window", "sliding_window_size", "swa_window_size")
_ABSENT = ("attention_bias", "attention_sink_bias", "add_swa_attention_sink_bias")
# sliding_window_non_causal is of layers with a window, of which there are none.
KEYS = ("layer_types", *_CAUSAL, *_USED, *_SIZES, "max_window_layers", "sliding_window_non_causal", *_ABSENT)


class Sight(NamedTuple):
    """What the rows of a pass see in one layer.

    window: of what was cached before the pass, the last rows, None = all; each: rather of all rows, the last up to a row's own. causal:
    of the pass itself the rows up to their own, else all.
    """

    window: int | None
    causal: bool
    each: bool = False


def sights(config: Mapping) -> list[Sight]:
    """By layer of a drafter whose config was read."""
    kinds = config.get("layer_types") or [FULL] * config["num_hidden_layers"]
    sliding = Sight(config.get("sliding_window"), not config.get("sliding_window_non_causal", False))
    return [sliding if kind == SLIDING else Sight(None, False) for kind in kinds]


def check(config: Mapping, source, *, causal: bool, windows: bool = False) -> None:
    """causal: what the layers compute. windows: whether some may have windows (speculators). Raises ValueError, with key, place and
    value, where a config asks for anything else."""
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
    if windows and _has_windows(config, where, source):
        return
    found_windows = _windows(where, config.get("num_hidden_layers"), source)
    if found_windows:
        found = found_windows[0]
        raise ValueError(f"{source}: expected full attention in every layer, got {found.where} {found.value!r}")


def _has_windows(config: Mapping, where: list[Place], source) -> bool:
    """Whether some layers have windows; all that speculators says of them is checked."""
    types = agreed("layer_types", find(where, "layer_types"), source)
    if types is None or not isinstance(types.value, list) or SLIDING not in types.value:
        return False
    if len(types.value) != config.get("num_hidden_layers") or not set(types.value) <= {FULL, SLIDING}:
        raise ValueError(f"{source}: expected num_hidden_layers of {FULL} and {SLIDING} in {types.where}, got {types.value!r}")
    used, size = (agreed(key, find(where, key), source) for key in ("use_sliding_window", "sliding_window"))
    if used is not None and used.value is not True:
        raise ValueError(f"{source}: expected {used.where} true beside {types.where} {types.value!r}, got {used.value!r}")
    if size is None or type(size.value) is not int or size.value < 1:
        raise ValueError(f"{source}: expected an integer sliding_window >= 1, got {size.value if size else None!r}")
    if type(config.get("sliding_window_non_causal")) is not bool:
        said = config.get("sliding_window_non_causal")
        raise ValueError(f"{source}: expected sliding_window_non_causal true or false beside windows, got {said!r}")
    return True


def _windows(where: list[Place], layers, source) -> list[Found]:
    """What says that a layer attends through a window."""
    types = agreed("layer_types", find(where, "layer_types"), source)
    if types is not None and (not isinstance(types.value, list) or len(types.value) != layers):
        raise ValueError(f"{source}: expected {layers} {types.where} (num_hidden_layers), got {types.value!r}")
    windows = [types] if types is not None and any(kind != FULL for kind in types.value) else []
    windows += [found for found in find(where, *_USED) if found.value is not False]
    for place in where:
        model = place.prefix == "" or place.is_text
        if not any(place.content.get(key) is False for key in _USED):
            windows += find([place], *_SIZES[1:] if model else _SIZES)
    return windows
