"""What a test of chain acceptance asks of the run that it belongs to: types alone, of `run.Run`."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .models import Model, Play


class Asked(Protocol):
    """What tests of chains and of trees ask alike."""

    rule: str
    requests: int
    level: float  # p-values below it are failures
    device: torch.device

    def seeds(self, purpose: str, count: int | None = None) -> Tensor: ...

    def model(self, model: Model) -> Model: ...


class Run(Asked, Protocol):
    def play(self, model: Model, drafts: int, **options: Any) -> Play: ...

    def decode(
        self, purpose: str, model: Model, drafts: int, tokens: int, rounds: int | None, **options: Any
    ) -> tuple[Model, Tensor, Tensor]: ...

    def call_rows(
        self,
        target: Tensor,
        drafts: Tensor,
        draft_logits: Tensor | None,
        seeds: Tensor | None = None,
        *,
        lens: Tensor | int | None = None,
        temperature: Tensor | float = 1.0,
        anchor_position: int = 7,
    ) -> Tensor: ...
