"""RoPE as the whole config says it: every place that can hold it is read, and the places agree.

    angle of pair i at position p = p / theta^(2 i / D),  i < rotated * D / 2

| key | stands in |
| --- | --- |
| rope_parameters (transformers 5), rope_scaling (older) | any place of places.py; flat, or one entry for each type of layer |
| rope_theta, partial_rotary_factor | the same, and beside them |

A theta beside parameters without one is theirs. Layers of full attention read the entry `full_attention` and what is not in an entry.
`default` beside entries is what transformers writes where it finds no type; the entries decide.

Symbols: D head size. Source: Hugging Face transformers 5.10, modeling_rope_utils.py, which prefers one place over another in
silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from .places import Found, agreed, find, places

FULL = "full_attention"
_BESIDE = ("rope_theta", "partial_rotary_factor")
# Older names: of the key, and of kinds (Phi-3's, and Qwen2-VL's, which is `default` with positions of its own).
_KEYS = {"type": "rope_type"}
_KINDS = {"su": "longrope", "mrope": "default"}
# What another layout of a head's pairs, or another base, is called where rope_parameters cannot say it.
_LAYOUT = {"is_neox_style": True, "rope_interleave": False, "rope_interleaved": False, "rotary_pct": 1.0}


class Rope(NamedTuple):
    """theta; rotated: the share of a head's pairs that RoPE turns."""

    theta: float
    rotated: float


def check(config: Mapping, source) -> None:
    """For models whose own class reads RoPE: raises ValueError where the places contradict each other, or for an impossible theta."""
    kinds = {kind for mapping in _mappings(config, source) for kind, value in mapping.value.items() if isinstance(value, Mapping)}
    for kind in sorted(kinds | {FULL}):
        _theta(parameters(config, source, kind), source)


def qwen3(config: Mapping, source) -> Rope:
    """Of layers that know no other kind than `default`. Raises ValueError for any other, and for an odd head size."""
    _check_layout(config, source)
    found = parameters(config, source)
    kind = found.pop("rope_type", Found("", "default"))
    if kind.value != "default":
        raise ValueError(f"{source}: expected rope_type 'default', got {kind.value!r} ({kind.where})")
    theta = _theta(found, source)
    for key, neutral in (("factor", 1), ("partial_rotary_factor", 1), ("attention_factor", 1)):
        _neutral(found.pop(key, None), neutral, source)
    found.pop("rope_theta", None)
    found.pop("original_max_position_embeddings", None)  # only kinds that scale read it
    for each in found.values():
        raise ValueError(f"{source}: expected no {each.where} with rope_type 'default', got {each.value!r}")
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    _even("head_dim", size, source)
    if theta is None:
        raise ValueError(f"{source}: expected the key 'rope_theta' in rope_parameters, or rope_theta itself, got neither")
    return Rope(theta, 1.0)


def gemma4(config: Mapping, source) -> Rope:
    """Of Gemma 4's full attention: `proportional`, or `default` where all heads have one size. Raises ValueError as qwen3 does."""
    _check_layout(config, source)
    if not any(isinstance(mapping.value.get(FULL), Mapping) for mapping in _mappings(config, source)):
        raise ValueError(f"{source}: expected rope_parameters with an entry {FULL}, got {config.get('rope_parameters')!r}")
    found = parameters(config, source)
    kind = found.get("rope_type", Found("", "default"))
    one_size = config.get("head_dim") == config["global_head_dim"]
    if kind.value != "proportional" and not (kind.value == "default" and one_size):
        raise ValueError(f"{source}: expected rope_type 'proportional' for {FULL}, got {kind.value!r} ({kind.where})")
    theta, share = _theta(found, source), found.get("partial_rotary_factor", Found("", 1.0))
    if not _number(share.value) or not 0 <= share.value <= 1:
        raise ValueError(f"{source}: expected a partial_rotary_factor from 0 to 1, got {share.value!r} ({share.where})")
    _neutral(found.get("factor"), 1, source)
    if kind.value == "default":
        _neutral(found.get("partial_rotary_factor"), 1, source)
    _even("global_head_dim", config["global_head_dim"], source)
    if theta is None:
        raise ValueError(f"{source}: expected a rope_theta for {FULL}, got none")
    return Rope(theta, float(share.value))


def parameters(config: Mapping, source, kind: str = FULL) -> dict[str, Found]:
    """What all places say of one kind of layer, by key. Raises ValueError where two of them differ."""
    said = {key: find(places(config, source), key) for key in _BESIDE} if kind == FULL else {}
    for mapping in _mappings(config, source):
        entries = {key: value for key, value in mapping.value.items() if isinstance(value, Mapping)}
        parts = [(f"{mapping.where}.{kind}", entries[kind])] if kind in entries else []
        if kind == FULL:
            parts.append((mapping.where, {key: value for key, value in mapping.value.items() if key not in entries}))
        for where, part in parts:
            for key, value in part.items():
                name = _KEYS.get(key, key)
                value = _KINDS.get(value, value) if name == "rope_type" and isinstance(value, str) else value
                artefact = entries and where == mapping.where and (name, value) == ("rope_type", "default")
                if value is not None and not artefact:
                    said.setdefault(name, []).append(Found(f"{where}.{key}", value))
    return {key: agreed(key, found, source) for key, found in said.items() if found}


def _mappings(config: Mapping, source) -> list[Found]:
    found = find(places(config, source), "rope_parameters", "rope_scaling")
    for each in found:
        if not isinstance(each.value, Mapping):
            raise ValueError(f"{source}: expected {each.where} to be an object, got {each.value!r}")
    return found


def _theta(found: Mapping[str, Found], source) -> float | None:
    theta = found.get("rope_theta")
    if theta is None:
        return None
    if not _number(theta.value) or not 0 < theta.value < math.inf:
        raise ValueError(f"{source}: expected a positive rope_theta, got {theta.value!r} ({theta.where})")
    return float(theta.value)


def _check_layout(config: Mapping, source) -> None:
    for key, value in _LAYOUT.items():
        for found in find(places(config, source), key):
            _neutral(found, value, source)


def _neutral(found: Found | None, neutral, source) -> None:
    if found is None:
        return
    number = _number(found.value) if _number(neutral) else isinstance(found.value, bool)
    if not number or found.value != neutral:
        raise ValueError(f"{source}: expected {found.where} {neutral!r}, got {found.value!r}")


def _even(key: str, size, source) -> None:
    if type(size) is not int or size < 2 or size % 2:
        raise ValueError(f"{source}: expected an even {key}, whose halves RoPE turns against each other, got {size!r}")


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
