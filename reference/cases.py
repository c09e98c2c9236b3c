"""Inputs of each op, made from a seed: one specification of shapes, dtypes and edge values for tests and benchmarks.

Symbols: R requests, S state slots, K drafts, V vocabulary, r rank, H hidden size. A case with state slots has S = R + 3 slots in
shuffled order; everything that lives by slot is made [S, ...] and slots outside the batch hold values that would be noticed.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dspark_kernels.types import (
    ConfidenceHead,
    DenseProposal,
    DraftBlock,
    MarkovHead,
    OneHotProposal,
    SamplingTensors,
    VerifyLayout,
)

from . import layout as layouts

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TEMPERATURES = (0.0, 0.3, 1.0, 1.7)


@dataclasses.dataclass
class DraftCase:
    """Arguments of `draft_block`: call it with **case.arguments()."""

    base_logits: Tensor
    anchors: Tensor
    anchor_positions: Tensor
    head: MarkovHead | None
    hidden: Tensor | None
    confidence: ConfidenceHead | None
    sampling: SamplingTensors | None
    state_indices: Tensor | None
    first_draft: int = 0
    noise: str = "draft"

    def arguments(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass
class AcceptCase:
    """Arguments of `accept_chain`: call it with **case.arguments()."""

    target_logits: Tensor
    layout: VerifyLayout
    proposal: OneHotProposal | DenseProposal | None
    sampling: SamplingTensors | None
    state_indices: Tensor | None
    rule: str = "token"

    def arguments(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(g, *shape, scale=1.0, dtype=torch.float32, grid=None) -> Tensor:
    """Normal values in `dtype`; with `grid`, multiples of it (a dyadic grid makes sums exact and ties frequent)."""
    x = torch.randn(*shape, generator=g) * scale
    if grid is not None:
        x = (x / grid).round() * grid
    return x.to(dtype)


def sampling_tensors(seed: int, slots: int, temperatures=TEMPERATURES) -> SamplingTensors:
    """Mixed temperatures (greedy rows among sampled ones) and 63-bit seeds."""
    g = _generator(seed)
    choice = torch.randint(0, len(temperatures), (slots,), generator=g)
    return SamplingTensors(
        temperature=torch.tensor(temperatures, dtype=torch.float32)[choice],
        seed=torch.randint(-(2**63), 2**63 - 1, (slots,), generator=g),
    )


def slot_map(seed: int, requests: int, padding: int = 0) -> Tensor:
    """int32 [R]: distinct slots of R + 3 in shuffled order, the last `padding` rows -1."""
    slots = torch.randperm(requests + 3, generator=_generator(seed))[:requests].to(torch.int32)
    if padding:
        slots[requests - padding :] = -1
    return slots


def draft_case(
    seed: int = 0,
    requests: int = 3,
    drafts: int = 4,
    vocab: int = 300,
    rank: int = 16,
    hidden_size: int = 24,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    sampled: bool = True,
    confidence: str | None = "markov",
    scattered: bool = False,
    padding: int = 0,
    grid: float | None = None,
    extra_columns: int = 0,
    position_dtype: torch.dtype = torch.int64,
    first_draft: int = 0,
    noise: str = "draft",
    temperatures: tuple[float, ...] = TEMPERATURES,
) -> DraftCase:
    """rank 0 = no head. confidence None, "plain" (hidden only) or "markov". extra_columns: rows of logits wider than V."""
    g = _generator(seed)
    weight_dtype = weight_dtype or dtype
    slots = requests + 3 if scattered else requests
    logits = _normal(g, requests, drafts, vocab + extra_columns, scale=2.0, dtype=dtype, grid=grid)[..., :vocab]
    head = None
    if rank:
        w1 = _normal(g, vocab, rank, dtype=weight_dtype, grid=grid)
        w2 = _normal(g, vocab, rank, scale=rank**-0.5 if grid is None else 1.0, dtype=weight_dtype, grid=grid)
        head = MarkovHead(w1, w2)
    hidden = confidence_head = None
    if confidence is not None:
        width = hidden_size + (rank if confidence == "markov" and rank else 0)
        hidden = _normal(g, requests, drafts, hidden_size, dtype=dtype)
        confidence_head = ConfidenceHead(
            weight=_normal(g, width, scale=width**-0.5, dtype=weight_dtype),
            bias=_normal(g, 1, dtype=weight_dtype) if seed % 2 == 0 else None,
            sts_temperatures=torch.rand(first_draft + drafts, generator=g) + 0.5 if seed % 3 == 0 else None,
        )
    return DraftCase(
        base_logits=logits,
        anchors=torch.randint(0, vocab, (slots,), generator=g),
        anchor_positions=torch.randint(0, 100000, (slots,), generator=g).to(position_dtype),
        head=head,
        hidden=hidden,
        confidence=confidence_head,
        sampling=sampling_tensors(seed + 1, slots, temperatures) if sampled else None,
        state_indices=slot_map(seed + 2, requests, padding) if scattered else None,
        first_draft=first_draft,
        noise=noise,
    )


def accept_case(
    seed: int = 0,
    requests: int = 5,
    drafts: int = 4,
    vocab: int = 1500,
    dtype: torch.dtype = torch.bfloat16,
    proposal: str = "dense",
    sampled: bool = True,
    scattered: bool = False,
    padding: int = 0,
    closeness: float = 0.7,
    sharpness: float = 3.0,
    grid: float | None = None,
    draft_vocab: int | None = None,
    draft_temperature: bool = False,
    lengths: Tensor | None = None,
    exact_rows: bool = False,
    temperatures: tuple[float, ...] = TEMPERATURES,
) -> AcceptCase:
    """proposal "dense", "one_hot" or "none". closeness: how much of a draft row is the target's. exact_rows: as many rows
    of target logits as the layout uses, instead of one per allocated row (garbage in the rest)."""
    g = _generator(seed)
    slots = requests + 3 if scattered else requests
    width = draft_vocab or vocab
    state_indices = slot_map(seed + 2, requests, padding) if scattered else None
    slot_of = torch.arange(requests) if state_indices is None else state_indices.long()
    sampling = sampling_tensors(seed + 1, slots, temperatures)
    target = _normal(g, requests, drafts + 1, vocab, scale=sharpness, grid=grid)
    common = torch.full((requests, drafts, width), -sharpness)
    common[..., : min(vocab, width)] = target[:, :drafts, : min(vocab, width)]
    noise = _normal(g, requests, drafts, width, scale=sharpness)
    near = closeness * common + (1 - closeness) * noise
    if grid is not None:
        near = (near / grid).round() * grid
    draft_logits = torch.full((slots, drafts, width), float("nan"), dtype=dtype)
    tokens = torch.full((slots, drafts), -1, dtype=torch.int64)
    draft_temperatures = sampling.temperature.clone()
    if draft_temperature:
        draft_temperatures = torch.tensor(TEMPERATURES)[torch.randint(0, len(TEMPERATURES), (slots,), generator=g)]
    for r in range(requests):
        slot = int(slot_of[r])
        if slot < 0:
            continue
        draft_logits[slot] = near[r].to(dtype)
        law = draft_logits[slot].double()
        if float(draft_temperatures[slot]) > 0 and proposal == "dense":
            law = torch.softmax(law / float(draft_temperatures[slot]), -1)
            tokens[slot] = torch.multinomial(law, 1, generator=g)[:, 0]
        else:
            tokens[slot] = law.argmax(-1)
    if lengths is None:
        lengths = torch.randint(0, drafts + 1, (requests,), generator=g)
        lengths[0] = drafts
    block = DraftBlock(tokens, OneHotProposal(), torch.zeros(requests, dtype=torch.int32))
    layout = layouts.fixed_layout(
        block,
        lengths.to(torch.int32),
        anchors=torch.randint(0, vocab, (slots,), generator=g),
        anchor_positions=torch.randint(0, 100000, (slots,), generator=g),
        state_indices=state_indices,
    )
    rows = int(layout.cu_num_logits[-1]) if exact_rows else layout.logits_indices.shape[0]
    logits = torch.full((rows, vocab), float("nan"), dtype=dtype)
    for r in range(requests):
        first, last = layout.cu_num_logits[r : r + 2].tolist()
        logits[first:last] = target[r, : last - first].to(dtype)
    laws = {
        "none": None,
        "one_hot": OneHotProposal(),
        "dense": DenseProposal(draft_logits, temperature=draft_temperatures if draft_temperature else None),
    }
    return AcceptCase(logits, layout, laws[proposal], sampling if sampled else None, state_indices)
