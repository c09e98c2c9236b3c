"""Ways of drawing the children of a tree that its distributions do not describe, for the suite to detect (known_wrong.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..chain import rules as chain_rules
from ..chain.rules import NEG_INF
from . import models


def one_noise_for_siblings(
    draft_logits: Tensor,
    elders: Tensor,
    drawn: str,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    anchor_positions: Tensor,
    parents: Tensor,
    nodes: Tensor,
) -> Tensor:
    """Independent siblings drawn by one noise: all alike."""
    return models.draft(draft_logits, elders, drawn, temperature, seeds, positions, anchor_positions, parents, parents)


def drawn_again(draft_logits: Tensor, elders: Tensor, drawn: str, *rest: Tensor) -> Tensor:
    """Children said to be distinct, drawn independently."""
    return models.draft(draft_logits, elders, "iid", *rest)


def draft_position_only(
    draft_logits: Tensor,
    elders: Tensor,
    drawn: str,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    anchor_positions: Tensor,
    parents: Tensor,
    nodes: Tensor,
) -> Tensor:
    """A position that is drafted again, at whatever node, meets its old noise."""
    start, node = torch.zeros_like(anchor_positions), torch.zeros_like(nodes)
    return models.draft(draft_logits, elders, drawn, temperature, seeds, positions, start, node, node)


def best_of_what_is_left(draft_logits: Tensor, elders: Tensor, drawn: str, *rest: Tensor) -> Tensor:
    """The first child drawn, the others the drafter's best."""
    first = models.draft(draft_logits, elders, drawn, *rest)
    width = draft_logits.shape[1]
    taken = (elders[..., None] == torch.arange(width, device=elders.device)).any(1)
    best = torch.where(taken, NEG_INF, chain_rules.readable(draft_logits)).argmax(1)
    return torch.where((elders >= 0).any(1), best, first)


DRAFTS = {f.__name__: f for f in (one_noise_for_siblings, drawn_again, draft_position_only, best_of_what_is_left)}
