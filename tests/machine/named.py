"""Races between the warps of one program that are known and harmless, each with the reason why.

Triton executes a scalar load in every warp and a scalar store in one. Where a warp that needs no value of a load runs late, its load may
meet the store of a later phase: a race by the letter, without effect. Everything else is a fault and not listed here.
"""

from __future__ import annotations

from typing import NamedTuple


class Named(NamedTuple):
    kernel: str
    place: str  # a part of the report's text: the file of the access, or of the one it races with
    reason: str


NAMED = (
    Named(
        "draft_dense_kernel",
        "draft/filters.py",
        "mask_rows reads a logit and writes -inf over it. A small tile is held by several warps, of which one writes, by what it read "
        "itself; what another one reads afterwards goes nowhere.",
    ),
)


def is_named(report) -> bool:
    return report.kind == "race.within" and any(n.kernel in report.text and n.place in report.text for n in NAMED)
