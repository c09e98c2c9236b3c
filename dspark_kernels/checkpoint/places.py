"""Where a config.json can say a thing, and that all of these places say the same.

| place | example | written by |
| --- | --- | --- |
| the top level | `block_size` | Hugging Face transformers, DeepSpec |
| text_config | `text_config.rope_theta` | classes of transformers with several modalities |
| transformer_layer_config | `transformer_layer_config.rms_norm_eps` | the speculators library |
| blocks of a drafter's own | `dflash_config.block_size`, `dspark_config.markov_rank` | z-lab's DFlash, SGLang, ModelOpt |
| keys with a block's name before them | `dspark_block_size` | SGLang |
| speculators_config | `speculators_config.algorithm` | the speculators library |

A value of null says nothing. Repetition is fine; two values of one key are refused, each with its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

BLOCKS = ("dflash_config", "dspark_config", "speculators_config")
TEXTS = ("text_config", "transformer_layer_config")  # the config of the layers, where the top level is another's
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")
_PREFIXES = ("dflash_", "dspark_")
# What the config of the layers says of itself alone, and what rope.py reads of each place.
_OWN = {"architectures", "model_type", "_name_or_path", "dtype", "torch_dtype", "transformers_version", *ROPE_KEYS}


class Found(NamedTuple):
    """A value and where it stands, as a path from the top level."""

    where: str
    value: object


class Place(NamedTuple):
    """A mapping of a config. prefix: what its keys have before them in a path."""

    prefix: str
    content: Mapping

    @property
    def is_text(self) -> bool:
        """Whether it is the config of the layers."""
        return self.prefix.rstrip(".") in TEXTS


def same(a, b) -> bool:
    """Equal in JSON's sense: 1e6 is 1000000, but true is not 1."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def places(config: Mapping, source) -> list[Place]:
    """All places of a config. Raises ValueError for a nested one that is no object."""
    found = [Place("", config)]
    for name in (*TEXTS, *BLOCKS):
        content = config.get(name)
        if content is not None and not isinstance(content, Mapping):
            raise ValueError(f"{source}: expected {name} to be an object, got {content!r}")
        if content is not None:
            found.append(Place(f"{name}.", content))
    for prefix in _PREFIXES:
        keys = [key for key in config if key.startswith(prefix) and key not in BLOCKS]
        if keys:
            found.append(Place(prefix, {key.removeprefix(prefix): config[key] for key in keys}))
    return found


def find(where: Iterable[Place], *keys: str) -> list[Found]:
    """Every value, other than null, that one of these keys has in one of these places."""
    return [Found(place.prefix + key, place.content[key]) for place in where for key in keys if place.content.get(key) is not None]


def agreed(key: str, found: Iterable[Found], source) -> Found | None:
    """The one value of a key, None where it stands nowhere. Raises ValueError for two, naming both and their places."""
    first = None
    for each in found:
        if first is None:
            first = each
        elif not same(first.value, each.value):
            raise ValueError(f"{source}: expected one {key}, got {first.value!r} ({first.where}) and {each.value!r} ({each.where})")
    return first


def flat(config: Mapping, source) -> dict:
    """A config with what only its text_config says at the top level. Raises ValueError where the two contradict each other."""
    texts = [place for place in places(config, source) if place.is_text]
    taken = {}
    for key in sorted(set().union(*(text.content.keys() for text in texts)) - _OWN):
        value = agreed(key, find((Place("", config), *texts), key), source)
        if value is not None and config.get(key) is None:
            taken[key] = value.value
    return {**config, **taken}


def is_number(value) -> bool:
    """A number of JSON: neither true nor false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
