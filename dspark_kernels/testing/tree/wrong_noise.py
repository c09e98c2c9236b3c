"""Noise as implementations have got it wrong, for the known-bad rules on draft trees (known_wrong.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...types import Stream
from .rules import Noise


class DraftNoiseInDraws(Noise):
    """Behind the root: node 1 is its first child."""

    def blocks(self, stream: Stream, positions: Tensor, groups: Tensor) -> list[Tensor]:
        if stream == Stream.CORRECT:
            return Noise(self.seeds, self.anchor_positions, self.nodes + 1).blocks(Stream.DRAFT, positions, groups)
        return super().blocks(stream, positions, groups)


class PositionOnly(Noise):
    """Neither node nor anchor position."""

    def blocks(self, stream: Stream, positions: Tensor, groups: Tensor) -> list[Tensor]:
        start = torch.zeros_like(self.anchor_positions)
        return Noise(self.seeds, start).blocks(stream, positions, groups)


class OneUniformPerDepth(Noise):
    def node_uniforms(self, depths: Tensor) -> Tensor:
        return self.uniforms(depths.shape[1]).gather(1, (depths - 1).clamp(min=0))


class OneUniformPerTree(Noise):
    def node_uniforms(self, depths: Tensor) -> Tensor:
        return self.uniforms(1).expand_as(depths)


class ByRow(Noise):
    def __init__(self, seeds: Tensor, anchor_positions: Tensor, nodes: Tensor | None = None) -> None:
        super().__init__(seeds + (torch.arange(len(seeds), device=seeds.device) if nodes is None else 0), anchor_positions, nodes)


class LowWord(Noise):
    def __init__(self, seeds: Tensor, anchor_positions: Tensor, nodes: Tensor | None = None) -> None:
        super().__init__(seeds & 0xFFFFFFFF, anchor_positions, nodes)


class Coarse(Noise):
    """24 bits: 0 is among the uniforms."""

    def node_uniforms(self, depths: Tensor) -> Tensor:
        return ((super().node_uniforms(depths) * 2.0**32 - 0.5).round().long() >> 8).double() * 2.0**-24


class GumbelFloor(Noise):
    """-log(-log(u)) of uniforms kept off 0 and 1 by 1e-4."""

    def exponential(self, words: Tensor) -> Tensor:
        return -torch.log(self.uniform(words).clamp(1e-4, 1 - 1e-4))

    def draw(self, positions: Tensor, weights: Tensor) -> Tensor:
        return self.race(Stream.CORRECT, positions, weights.log())
