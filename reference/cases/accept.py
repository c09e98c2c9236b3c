"""Inputs of `accept_chain`: target logits, the draft distributions that drafts were drawn from, and a layout of random lengths.

    draft logits = closeness * target logits + (1 - closeness) * noise;   x ~ softmax(draft logits / T)

Symbols: R requests, S request slots, K drafts, V vocabulary (Vd the drafter's), C candidates of a sparse proposal, T temperature.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.types import DenseProposal, DraftBlock, OneHotProposal, SamplingTensors, SparseProposal, VerifyLayout

from .. import layout as layouts
from ..sources import PhiloxSource
from .sampling import TEMPERATURES, sampling_tensors
from .tensors import Case, generator, normal, slot_map


@dataclasses.dataclass
class AcceptCase(Case):
    """Arguments of `accept_chain`."""

    target_logits: Tensor
    layout: VerifyLayout
    proposal: OneHotProposal | DenseProposal | SparseProposal | None
    sampling: SamplingTensors | None
    state_indices: Tensor | None
    rule: str = "token"
    logprobs: str | None = None
    synthetic_rates: Tensor | None = None


class Drafted(NamedTuple):
    """What drafting leaves behind, by slot; slots outside the batch hold what no read may use."""

    tokens: Tensor  # int64 [S, K]
    logits: Tensor  # [S, K, Vd]
    sparse_ids: Tensor  # int64 [S, K, C]
    sparse_logits: Tensor  # [S, K, C]


@dataclasses.dataclass(frozen=True)
class AcceptSpec:
    """The axes of `accept_chain`."""

    seed: int = 0
    requests: int = 5
    drafts: int = 4
    vocab: int = 1500
    dtype: torch.dtype = torch.bfloat16
    proposal: str = "dense"  # "dense", "sparse", "one_hot" or "none"
    sampled: bool = True
    scattered: bool = False  # S = R + 3 slots in shuffled order
    padding: int = 0  # requests without a slot
    closeness: float = 0.7  # how much of a draft row is the target's
    sharpness: float = 3.0  # standard deviation of the logits
    grid: float | None = None  # logits are multiples of it
    draft_vocab: int | None = None
    draft_temperature: bool = False  # the drafter has temperatures of its own, 0 among them
    lengths: Tensor | None = None  # int [R], admitted drafts; None: random, the first request all
    exact_rows: bool = False  # as many logit rows as the layout uses; otherwise one per allocated row, the rest NaN
    temperatures: tuple[float, ...] = TEMPERATURES
    rule: str = "token"
    candidates: int = 5  # C
    odd_lists: bool = False  # sparse ids in any order, some of them twice, some of no token
    logprobs: str | None = None
    forced: bool = False  # random synthetic_rates
    mapped: bool = False  # columns of a dense proposal are ids in shuffled order, some of them outside the vocabulary
    adjust: tuple = ()  # see sampling_tensors
    filters: tuple = ()
    filter_order: str = "top_k_first"

    @property
    def width(self) -> int:
        return self.draft_vocab or self.vocab

    def inputs(self) -> AcceptCase:
        # The order of the calls with `g` fixes the values of every case: keep it.
        g = generator(self.seed)
        slots = self.requests + 3 if self.scattered else self.requests
        state_indices = slot_map(self.seed + 2, self.requests, self.padding) if self.scattered else None
        slot_of = torch.arange(self.requests) if state_indices is None else state_indices.long()
        sampling = sampling_tensors(
            self.seed + 1, slots, self.temperatures, vocab=self.vocab, mask_rows=self.requests * (self.drafts + 1),
            adjust=self.adjust, filters=self.filters, filter_order=self.filter_order,
        )  # fmt: skip
        target = normal(g, self.requests, self.drafts + 1, self.vocab, scale=self.sharpness, grid=self.grid)
        ids = torch.randperm(max(self.vocab, self.width), generator=g)[: self.width] if self.mapped else torch.arange(self.width)
        near = self._near(g, target, ids)
        temperatures = sampling.temperature.clone()
        if self.draft_temperature:
            temperatures = torch.tensor(TEMPERATURES)[torch.randint(0, len(TEMPERATURES), (slots,), generator=g)]
        drafted = self._drafted(g, near, ids, slot_of, temperatures)
        layout = self._layout(g, drafted.tokens, state_indices)
        rows = int(layout.cu_num_logits[-1]) if self.exact_rows else layout.logits_indices.shape[0]
        if sampling.token_bitmask is not None:
            sampling = dataclasses.replace(sampling, token_bitmask=sampling.token_bitmask[:rows])
        logits = torch.full((rows, self.vocab), float("nan"), dtype=self.dtype)
        for r in range(self.requests):
            first, last = layout.cu_num_logits[r : r + 2].tolist()
            logits[first:last] = target[r, : last - first].to(self.dtype)
        if self.rule == "coupled":
            self._couple(g, layout, target.to(self.dtype), sampling, slot_of)
        return AcceptCase(
            logits,
            layout,
            self._proposal(drafted, ids, temperatures if self.draft_temperature else None),
            sampling if self.sampled else None,
            state_indices,
            self.rule,
            self.logprobs,
            torch.rand(self.drafts, generator=g) if self.forced else None,
        )

    def _near(self, g, target: Tensor, ids: Tensor) -> Tensor:
        """Draft logits [R, K, Vd] that share `closeness` of their value with the target's logit of the same id."""
        common = torch.full((self.requests, self.drafts, self.width), -self.sharpness)
        shared = min(self.vocab, self.width)
        common[..., :shared] = target[:, : self.drafts, :shared]
        if self.mapped:
            known = target[:, : self.drafts, ids.clamp(max=self.vocab - 1)]
            common = torch.where(ids < self.vocab, known, -self.sharpness)
        noise = normal(g, self.requests, self.drafts, self.width, scale=self.sharpness)
        near = self.closeness * common + (1 - self.closeness) * noise
        return near if self.grid is None else (near / self.grid).round() * self.grid

    def _drafted(self, g, near: Tensor, ids: Tensor, slot_of: Tensor, temperatures: Tensor) -> Drafted:
        """Draw every request's drafts from its own draft distribution."""
        shape = (temperatures.shape[0], self.drafts)
        drafted = Drafted(
            tokens=torch.full(shape, -1, dtype=torch.int64),
            logits=torch.full((*shape, self.width), float("nan"), dtype=self.dtype),
            sparse_ids=torch.full((*shape, self.candidates), 2**40),
            sparse_logits=torch.full((*shape, self.candidates), float("nan"), dtype=self.dtype),
        )
        for row, slot in zip(near, slot_of.tolist(), strict=True):
            if slot < 0:
                continue
            drafted.logits[slot] = row.to(self.dtype)
            logits = drafted.logits[slot].double()
            if self.proposal == "sparse":
                drafted.sparse_ids[slot], drafted.sparse_logits[slot] = self._sparse(g, drafted.logits[slot])
                logits = drafted.sparse_logits[slot].double()
            if float(temperatures[slot]) > 0 and self.proposal in ("dense", "sparse"):
                distribution = torch.softmax(logits / float(temperatures[slot]), -1)
                tokens = torch.multinomial(distribution, 1, generator=g)[:, 0]
            else:
                tokens = logits.argmax(-1)
            if self.mapped:
                tokens = ids[tokens]
            if self.proposal == "sparse":
                tokens = drafted.sparse_ids[slot].gather(1, tokens[:, None])[:, 0]
            drafted.tokens[slot] = tokens
        return drafted

    def _sparse(self, g, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, logits) [K, C] of a sparse proposal: the best of dense logits [K, Vd]."""
        drafts, vocab = logits.shape
        count = min(self.candidates, vocab)
        best, ids = logits.float().topk(count, -1)
        # A list longer than the vocabulary is filled up with entries of probability 0.
        ids = torch.cat([ids, torch.full((drafts, self.candidates - count), -1)], 1)
        best = torch.cat([best, torch.full((drafts, self.candidates - count), -torch.inf)], 1)
        if self.odd_lists:
            order = torch.rand(drafts, self.candidates, generator=g).argsort(-1)
            ids, best = ids.gather(1, order), best.gather(1, order)
            repeated = torch.rand(drafts, self.candidates, generator=g) < 0.3
            ids = torch.where(repeated, ids.roll(1, 1), ids)
            nowhere = torch.rand(drafts, self.candidates, generator=g) < 0.1
            ids = torch.where(nowhere, torch.tensor([-3, vocab, 2**40])[torch.randint(0, 3, ids.shape, generator=g)], ids)
        return ids, best.to(logits.dtype)

    def _layout(self, g, tokens: Tensor, state_indices: Tensor | None) -> VerifyLayout:
        lengths, slots = self.lengths, tokens.shape[0]
        if lengths is None:
            lengths = torch.randint(0, self.drafts + 1, (self.requests,), generator=g)
            lengths[0] = self.drafts
        return layouts.fixed_layout(
            DraftBlock(tokens, OneHotProposal(), torch.zeros(self.requests, dtype=torch.int32)),
            lengths.to(torch.int32),
            anchors=torch.randint(0, self.vocab, (slots,), generator=g),
            anchor_positions=torch.randint(0, 100000, (slots,), generator=g),
            state_indices=state_indices,
        )

    def _couple(self, g, layout: VerifyLayout, target: Tensor, sampling: SamplingTensors, slot_of: Tensor) -> None:
        """Give most drafts the token that the target will choose with the noise that both share."""
        for r, slot in enumerate(slot_of.tolist()):
            first, length = int(layout.query_start_loc[r]), int(layout.draft_lens[r])
            for i in range(length):
                if slot >= 0 and torch.rand((), generator=g) < self.closeness:
                    temperature, position = float(sampling.temperature[slot]), int(layout.positions[first])
                    scale = 1 / temperature if temperature > 0 else 1e30
                    source = PhiloxSource(int(sampling.seed[slot]), position)
                    layout.token_ids[first + i + 1] = source.coupled(position + i + 1, target[r, i].double() * scale)

    def _proposal(self, drafted: Drafted, ids: Tensor, temperature: Tensor | None):
        if self.proposal == "none":
            return None
        if self.proposal == "one_hot":
            return OneHotProposal()
        if self.proposal == "sparse":
            return SparseProposal(drafted.sparse_ids, drafted.sparse_logits, temperature=temperature)
        draft_to_target = torch.where(ids < self.vocab, ids, -1) if self.mapped else None
        return DenseProposal(drafted.logits, temperature=temperature, draft_to_target=draft_to_target)


def accept_case(*axes, **named) -> AcceptCase:
    """The inputs of an `AcceptSpec` with these axes."""
    return AcceptSpec(*axes, **named).inputs()
