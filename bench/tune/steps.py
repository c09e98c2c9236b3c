"""Configurations one step away from another: one parameter is changed."""

from __future__ import annotations


def steps(config: dict, space: dict[str, tuple]) -> list[dict]:
    """Every configuration that differs from `config` in one parameter."""
    return [
        {**config, name: value} for name, values in space.items() for value in values if name in config and value != config[name]
    ]
