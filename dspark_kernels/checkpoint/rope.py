"""RoPE as the whole config says it: every place that can hold it is read, and the places agree.

    angle of pair i at position p = p / theta^(2 i / D),  i < rotated * D / 2

| key | stands in |
| --- | --- |
| rope_parameters (transformers 5), rope_scaling (older) | any place of places.py; flat, or one entry for each type of layer |
| rope_theta, partial_rotary_factor | the same, and beside them |
| original_max_position_embeddings | the same, with the kinds of scaling.py |

A theta beside parameters without one is theirs. Layers of full attention read the entry `full_attention` and what stands in no
entry. Beside entries, transformers writes a rope_type `default` that nobody gave; the entries decide.

Symbols: D head size. Source: Hugging Face transformers 5.10, modeling_rope_utils.py, which prefers one place over another in
silence.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import NamedTuple

from . import scaling
from .places import ROPE_KEYS, Found, agreed, find, is_number, places, same

FULL = "full_attention"
_BESIDE = ("rope_theta", "partial_rotary_factor")
# Another layout of a head's pairs; what each of these says where it says nothing.
_LAYOUT = {"is_neox_style": True, "rope_interleave": False, "rope_interleaved": False, "rotary_pct": 1}
_ORIGINAL = "original_max_position_embeddings"
KEYS = (*ROPE_KEYS, _ORIGINAL, *_BESIDE, *_LAYOUT)
# Older names: of a key, and of kinds (Phi-3's; Qwen2-VL's, which is `default` with positions of its own).
_NAMES = {"type": "rope_type"}
_KINDS = {"su": "longrope", "mrope": "default"}
# What may stand beside a kind that does not scale, and the value with which it says nothing; None: any value.
_UNSCALED = {"factor": 1, "attention_factor": 1, "original_max_position_embeddings": None}


class Rope(NamedTuple):
    """theta; rotated: the share of a head's pairs that RoPE turns; scaled: how other kinds than `default` change them."""

    theta: float
    rotated: float
    scaled: scaling.Scaling | None = None


def check(config: Mapping, source) -> None:
    """For models whose own class reads RoPE: raises ValueError where places contradict each other, and for an impossible theta."""
    kinds = {kind for mapping in _mappings(config, source) for kind, value in mapping.value.items() if isinstance(value, Mapping)}
    for kind in sorted(kinds | {FULL}):
        theta = parameters(config, source, kind).get("rope_theta")
        if theta is not None and not isinstance(theta.value, list):  # some classes have a theta for each layer
            _positive(theta, source)


def qwen3(config: Mapping, source) -> Rope:
    """Of layers that turn whole heads: `default`, `yarn` or `llama3`. Raises ValueError for any other, and for an odd head size."""
    found = parameters(config, source)
    kind, scaled = found.pop("rope_type", Found("", "default")), None
    if kind.value in scaling.KINDS:
        original = find(places(config, source), _ORIGINAL)
        if original:
            found[_ORIGINAL] = agreed(_ORIGINAL, [*original, *[found[key] for key in (_ORIGINAL,) if key in found]], source)
        scaled = scaling.take(kind.value, found, source)
    elif kind.value != "default":
        kinds = ", ".join(repr(known) for known in ("default", *scaling.KINDS))
        raise ValueError(f"{source}: expected a rope_type of {kinds}, got {kind.value!r} ({kind.where})")
    _check_says_nothing(found.pop("partial_rotary_factor", None), 1, source)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return Rope(_theta(found, "head_dim", size, config, source), 1.0, scaled)


def gemma4(config: Mapping, source) -> Rope:
    """Of Gemma 4's full attention: `proportional`, or `default` where all heads have one size. Raises ValueError as qwen3 does."""
    if not any(isinstance(mapping.value.get(FULL), Mapping) for mapping in _mappings(config, source)):
        raise ValueError(f"{source}: expected rope_parameters with an entry {FULL}, got {config.get('rope_parameters')!r}")
    found = parameters(config, source)
    kind = found.pop("rope_type", Found("", "default"))
    one_size = config.get("head_dim") == config["global_head_dim"]
    if kind.value != "proportional" and not (kind.value == "default" and one_size):
        raise ValueError(f"{source}: expected rope_type 'proportional' for {FULL}, got {kind.value!r} ({kind.where})")
    share = found.pop("partial_rotary_factor", Found("", 1.0))
    if not is_number(share.value) or not 0 <= share.value <= 1:
        raise ValueError(f"{source}: expected a partial_rotary_factor from 0 to 1, got {share.value!r} ({share.where})")
    if kind.value == "default":
        _check_says_nothing(share, 1, source)
    return Rope(_theta(found, "global_head_dim", config["global_head_dim"], config, source), float(share.value))


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
                name = _NAMES.get(key, key)
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


def _theta(found: dict[str, Found], head_key: str, head_size, config: Mapping, source) -> float:
    """theta, once nothing else is left to say."""
    theta = found.pop("rope_theta", None)
    if theta is None:
        raise ValueError(f"{source}: expected the key 'rope_theta' in rope_parameters, or rope_theta itself, got neither")
    for key, each in found.items():
        if key not in _UNSCALED:
            raise ValueError(f"{source}: expected no {each.where}, which nothing here reads, got {each.value!r}")
        _check_says_nothing(each, _UNSCALED[key], source)
    for key, value in _LAYOUT.items():
        for each in find(places(config, source), key):
            _check_says_nothing(each, value, source)
    if type(head_size) is not int or head_size < 2 or head_size % 2:
        raise ValueError(f"{source}: expected an even {head_key}, whose halves RoPE turns together, got {head_size!r}")
    return _positive(theta, source)


def _positive(theta: Found, source) -> float:
    if not is_number(theta.value) or not 0 < theta.value <= sys.float_info.max:
        raise ValueError(f"{source}: expected a positive rope_theta, got {theta.value!r} ({theta.where})")
    return float(theta.value)


def _check_says_nothing(found: Found | None, neutral, source) -> None:
    if found is not None and neutral is not None and not same(found.value, neutral):
        raise ValueError(f"{source}: expected {found.where} {neutral!r}, got {found.value!r}")
