"""What accept_chain, accept_tree and acceptance on shards check and allocate alike, and the arguments that their ops share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import INT_DTYPES, LOGIT_DTYPES, check_distinct, check_optional, check_tensor, check_type, not_yet
from ...library import Out
from ...types import Acceptance, DenseProposal, VerifyLayout

MAX_CANDIDATES = 512


class LayoutArrays(NamedTuple):
    """The arrays of a VerifyLayout that a launch reads, as torch.library knows them."""

    query_start_loc: Tensor
    cu_num_logits: Tensor
    logits_indices: Tensor
    token_ids: Tensor
    positions: Tensor


class Emitted(NamedTuple):
    """The first fields of an Acceptance, as torch.library knows them."""

    tokens: Out[Tensor]
    num_accepted: Out[Tensor]
    num_emitted: Out[Tensor]
    num_rejected: Out[Tensor]
    next_token: Out[Tensor]
    last_row: Out[Tensor]


def layout_arrays(layout: VerifyLayout) -> LayoutArrays:
    return LayoutArrays(*(getattr(layout, name) for name in LayoutArrays._fields))


def emitted(out: Acceptance) -> Emitted:
    return Emitted(*(getattr(out, name) for name in Emitted._fields))


def check_rows(target_logits: Tensor, layout: VerifyLayout, state_indices: Tensor | None, columns: str = "V") -> int:
    """Logits [L, columns] against the layout; the number of requests."""
    check_tensor("target_logits", target_logits, dtype=LOGIT_DTYPES, shape=("L", columns), last_contiguous=True)
    check_type("layout", layout, VerifyLayout)
    rows, width = target_logits.shape
    requests, device = layout.draft_lens.shape[0], target_logits.device
    check_tensor("layout.draft_lens", layout.draft_lens, device=device)
    if layout.logits_indices.shape[0] < rows:
        raise ValueError(
            f"layout.logits_indices: expected an entry for each of the {rows} rows of target_logits, got "
            f"{layout.logits_indices.shape[0]}"
        )
    if requests and (width == 0 or rows == 0):
        raise ValueError(f"target_logits: expected L >= 1 and {columns} >= 1, got shape {list(target_logits.shape)}")
    check_optional("state_indices", state_indices, dtype=INT_DTYPES, shape=(requests,), device=device, contiguous=True)
    return requests


def check_anchors(anchors: Tensor | None, anchor_positions: Tensor | None, slots: int | None, device: torch.device) -> None:
    """slots: S where it is known."""
    for name, tensor in (("anchors", anchors), ("anchor_positions", anchor_positions)):
        check_optional(name, tensor, dtype=INT_DTYPES, shape=("S" if slots is None else slots,), device=device)
    check_anchor_pair(anchors, anchor_positions)


def check_anchor_pair(anchors: Tensor | None, anchor_positions: Tensor | None) -> None:
    """Raise ValueError where one is given without the other."""
    if (anchors is None) != (anchor_positions is None):
        missing, given = ("anchor_positions", "anchors") if anchor_positions is None else ("anchors", "anchor_positions")
        raise ValueError(
            f"{missing}: expected a tensor because {given} is given, got None: the two advance together, and a round whose positions "
            "stand still repeats the random numbers of the one before"
        )


def check_candidates(name: str, logits: Tensor) -> None:
    """Logits of a sparse proposal."""
    if not 1 <= logits.shape[-1] <= MAX_CANDIDATES:
        raise ValueError(f"{name}: expected 1 to {MAX_CANDIDATES} candidates, got {logits.shape[-1]}")


def needs_logits(op: str, proposal: object) -> None:
    """Refuse probabilities where an op's variant reads logits."""
    if isinstance(proposal, DenseProposal) and proposal.probs:
        not_yet(op, "proposal.probs", "probabilities (DenseProposal.of_probs) are")


def check_map(proposal: object, vocab: int, name: str = "proposal") -> None:
    """The map of ids of a dense proposal, where it is on the host."""
    if isinstance(proposal, DenseProposal):
        check_distinct(f"{name}.draft_to_target", proposal.draft_to_target, vocab)


def drafts_of(layout: VerifyLayout, draft_logits: Tensor | None, rows: int) -> int:
    """K: the layout's, else the proposal's, else as many as the rows allow."""
    drafts = layout.max_drafts
    if drafts is None:
        drafts = draft_logits.shape[1] if draft_logits is not None else max(rows - 1, 0)
    if draft_logits is not None and draft_logits.shape[1] < drafts:
        raise ValueError(f"proposal.logits: expected K >= layout.max_drafts = {drafts}, got K = {draft_logits.shape[1]}")
    return drafts


def output(
    out: Acceptance | None,
    requests: int,
    width: int,
    forward_rows: int,
    device: torch.device,
    *,
    logprobs: bool = False,
    paths: bool = False,
) -> Acceptance:
    """The caller's result, checked, or a new one. width: tokens of a request; paths: of a tree."""
    if out is not None:
        check_type("out", out, Acceptance)
        check_tensor("out.tokens", out.tokens, shape=(requests, width), device=device)
        check_tensor("out.commit_mask", out.commit_mask, shape=(forward_rows,), device=device)
        if paths:
            for name in ("path", "kv_source"):
                check_tensor(f"out.{name}", getattr(out, name), dtype=torch.int32, shape=(requests, width), device=device)
        if logprobs:
            check_tensor("out.logprobs", out.logprobs, shape=(requests, width), device=device)
        return out

    def ints(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=device)

    return Acceptance(
        tokens=torch.empty(requests, width, dtype=torch.int64, device=device),
        num_accepted=ints(requests),
        num_emitted=ints(requests),
        num_rejected=ints(requests),
        next_token=torch.empty(requests, dtype=torch.int64, device=device),
        last_row=ints(requests),
        # Without requests nothing is launched, and no row is committed.
        commit_mask=(torch.empty if requests else torch.zeros)(forward_rows, dtype=torch.bool, device=device),
        flags=ints(requests),
        logprobs=torch.empty(requests, width, device=device) if logprobs else None,
        path=ints(requests, width) if paths else None,
        kv_source=ints(requests, width) if paths else None,
    )
