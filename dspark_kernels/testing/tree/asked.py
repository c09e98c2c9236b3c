"""What a test of tree acceptance asks of the run that it belongs to: types alone, of `run.TreeRun`."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ..chain.asked import Asked
from ..chain.models import Model
from .models import Shape, TreePlay


class TreeRun(Asked, Protocol):
    drawn: tuple[str, ...]

    def play(self, model: Model, drafts: tuple[Shape, ...], **options: Any) -> TreePlay: ...

    def decode(
        self, purpose: str, model: Model, drafts: tuple[Shape, ...], tokens: int, rounds: int | None, **options: Any
    ) -> tuple[Model, Tensor, Tensor]: ...

    def call_rows(
        self,
        node_logits: Tensor,
        tokens: Tensor,
        parents: Tensor,
        draft_logits: Tensor | None,
        drawn: str,
        seeds: Tensor | None = None,
        *,
        num_nodes: Tensor | int | None = None,
        temperature: Tensor | float = 1.0,
        anchor_position: int = 7,
    ) -> Tensor: ...
