"""Inputs of `draft_block`: base logits, a sequential head of each kind, a confidence head, hidden states and sampling settings.

    base ~ 2 N(0, 1);  W1 ~ N(0, 1);  W2 ~ N(0, 1 / r)

Symbols: R requests, S request slots, K drafts, V vocabulary, r rank, H hidden size. Source: DSpark, arXiv 2607.05147.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dspark_kernels.types import ConfidenceHead, GatedMarkovHead, MarkovHead, RnnMarkovHead, SamplingTensors

from .sampling import TEMPERATURES, sampling_tensors
from .tensors import Case, generator, normal, slot_map


@dataclasses.dataclass
class DraftCase(Case):
    """Arguments of `draft_block`."""

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
    draft_to_target: Tensor | None = None
    vocab_size: int | None = None
    head_state: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class DraftSpec:
    """The axes of `draft_block`."""

    seed: int = 0
    requests: int = 3
    drafts: int = 4
    vocab: int = 300
    rank: int = 16  # 0: no head
    hidden_size: int = 24
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None  # None: dtype
    sampled: bool = True
    confidence: str | None = "markov"  # None, "plain" (reads the hidden state alone) or "markov"
    scattered: bool = False  # S = R + 3 slots in shuffled order
    padding: int = 0  # requests without a slot
    grid: float | None = None  # logits and weights are multiples of it
    extra_columns: int = 0  # by which rows of logits are wider than V
    position_dtype: torch.dtype = torch.int64
    first_draft: int = 0
    noise: str = "draft"
    temperatures: tuple[float, ...] = TEMPERATURES
    kind: str = "vanilla"  # of the head: "vanilla", "gated" or "rnn"
    w2_dtype: torch.dtype | None = None  # of W2 alone; int8 and e4m3 come with scales
    target_vocab: int | None = None  # the V ids are some of so many, in no order; one in nine stands for no token
    padded: bool = False  # extra_columns and rows of W2 belong to the tensors and would win; `vocab_size` leaves them out
    adjust: tuple = ()  # see sampling_tensors
    filters: tuple = ()
    filter_order: str = "top_k_first"

    @property
    def target_ids(self) -> int:
        return self.vocab if self.target_vocab is None else self.target_vocab

    def inputs(self) -> DraftCase:
        # The order of the calls with `g` fixes the values of every case: keep it.
        g = generator(self.seed)
        slots = self.requests + 3 if self.scattered else self.requests
        columns = self.vocab + self.extra_columns
        logits = normal(g, self.requests, self.drafts, columns, scale=2.0, dtype=self.dtype, grid=self.grid)
        logits[..., self.vocab :] = 100.0
        head = self._head(g) if self.rank else None
        hidden = None
        if self.confidence is not None or self.kind != "vanilla":
            hidden = normal(g, self.requests, self.drafts, self.hidden_size, dtype=self.dtype)
        confidence = None if self.confidence is None else self._confidence_head(g)
        anchors = torch.randint(0, self.target_ids, (slots,), generator=g)
        draft_to_target = self._draft_to_target(g)
        head_state = normal(g, slots, self.rank, scale=0.5) if self.kind == "rnn" else None
        return DraftCase(
            base_logits=logits if self.padded else logits[..., : self.vocab],
            anchors=anchors,
            anchor_positions=torch.randint(0, 100000, (slots,), generator=g).to(self.position_dtype),
            head=head,
            hidden=hidden,
            confidence=confidence,
            sampling=self._sampling(slots) if self.sampled else None,
            state_indices=slot_map(self.seed + 2, self.requests, self.padding) if self.scattered else None,
            first_draft=self.first_draft,
            noise=self.noise,
            draft_to_target=draft_to_target,
            vocab_size=self.vocab if self.padded else None,
            head_state=head_state,
        )

    def _head(self, g) -> MarkovHead:
        rank, weight_dtype = self.rank, self.weight_dtype or self.dtype
        w1 = normal(g, self.target_ids, rank, dtype=weight_dtype, grid=self.grid)
        w2 = normal(g, self.vocab, rank, scale=rank**-0.5 if self.grid is None else 1.0, grid=self.grid)
        if self.padded:
            w2 = torch.cat([w2, torch.full((3, rank), float("nan"))])
        w2, scale = stored_weights(w2, self.w2_dtype or weight_dtype)
        inputs = rank + self.hidden_size
        if self.kind == "gated":
            weight = normal(g, rank, inputs, scale=inputs**-0.5, dtype=weight_dtype)
            return GatedMarkovHead(w1, w2, scale, gate_weight=weight, gate_bias=normal(g, rank, dtype=weight_dtype))
        if self.kind == "rnn":
            weight = normal(g, 3 * rank, inputs + rank, scale=inputs**-0.5, dtype=weight_dtype)
            return RnnMarkovHead(w1, w2, scale, joint_weight=weight, joint_bias=normal(g, 3 * rank, dtype=weight_dtype))
        return MarkovHead(w1, w2, scale)

    def _confidence_head(self, g) -> ConfidenceHead:
        width = self.hidden_size + (self.rank if self.confidence == "markov" else 0)
        weight_dtype = self.weight_dtype or self.dtype
        return ConfidenceHead(
            weight=normal(g, width, scale=width**-0.5, dtype=weight_dtype),
            bias=normal(g, 1, dtype=weight_dtype) if self.seed % 2 == 0 else None,
            sts_temperatures=torch.rand(self.first_draft + self.drafts, generator=g) + 0.5 if self.seed % 3 == 0 else None,
        )

    def _draft_to_target(self, g) -> Tensor | None:
        if self.target_vocab is None:
            return None
        ids = torch.randperm(self.target_vocab, generator=g)[: self.vocab]
        ids[torch.rand(self.vocab, generator=g) < 1 / 9] = -1
        return ids

    def _sampling(self, slots: int) -> SamplingTensors:
        return sampling_tensors(
            self.seed + 1, slots, self.temperatures, vocab=self.target_ids, mask_rows=(slots, self.drafts), adjust=self.adjust,
            filters=self.filters, filter_order=self.filter_order, grid=self.grid,
        )  # fmt: skip


def stored_weights(w2: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """fp32 weights in the dtype that they are stored in, and the scale of each row where that is int8 or e4m3."""
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        return w2.to(dtype), None
    scale = w2.abs().amax(1).clamp(min=1e-6) / (127.0 if dtype == torch.int8 else 448.0)
    w2 = w2 / scale[:, None]
    w2 = w2.nan_to_num(127.0).round() if dtype == torch.int8 else w2
    return w2.to(dtype), scale


def draft_case(*axes, **named) -> DraftCase:
    """The inputs of a `DraftSpec` with these axes."""
    return DraftSpec(*axes, **named).inputs()
