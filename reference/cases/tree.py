"""Inputs of `accept_tree`: trees drawn from stored draft distributions, their layout, and target logits near the drafter's.

    target logits = closeness * draft logits + (1 - closeness) * noise;   children of v ~ softmax(draft logits of v / T)

Symbols: R requests, S request slots, M nodes, V vocabulary, W columns of a draft row, T temperature.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dspark_kernels.types import DenseProposal, DraftTree, OneHotProposal, SamplingTensors, SparseProposal, VerifyLayout

from .. import layout as layouts
from ..tree_draft import Growing, packed
from .sampling import TEMPERATURES, sampling_tensors
from .tensors import Case, generator, slot_map


@dataclasses.dataclass
class AcceptTreeCase(Case):
    """Arguments of `accept_tree`."""

    target_logits: Tensor
    layout: VerifyLayout
    tree: DraftTree
    sampling: SamplingTensors | None
    state_indices: Tensor | None
    rule: str = "walk"
    logprobs: str | None = None


@dataclasses.dataclass(frozen=True)
class AcceptTreeSpec:
    """The axes of `accept_tree`."""

    seed: int = 0
    requests: int = 3
    nodes: int = 7  # M; a tree has 1 to M of them
    vocab: int = 300
    drawn: str = "iid"  # "iid", "without_replacement" or "one_hot": the most probable tokens
    rule: str = "walk"
    dtype: torch.dtype = torch.float32
    sampled: bool = True
    scattered: bool = False  # S = R + 3 slots in shuffled order
    padding: int = 0  # requests without a slot
    closeness: float = 0.8  # share of the draft's logits in the target's, 1 = equal distributions
    draft_temperature: bool = False  # the drafter has temperatures of its own, 0 among them
    draft_vocab: int | None = None
    sharpness: float = 3.0  # standard deviation of the logits
    temperatures: tuple[float, ...] = TEMPERATURES
    counts: list[int] | None = None  # nodes by slot; None: random
    reach: int | None = None  # a parent is one of so many nodes before; None: any
    parents: list[int] | None = None  # the shape of every tree; None: random shapes
    max_rows: int | None = None
    emits: Tensor | None = None
    proposal: str = "dense"  # "dense"; "mapped": columns are ids in shuffled order, some outside the vocabulary; "sparse"
    candidates: int = 5  # of a sparse proposal: ids in no order, some of them twice, some of no token
    adjust: tuple = ()  # see sampling_tensors
    filters: tuple = ()
    filter_order: str = "top_k_first"
    logprobs: str | None = None

    def inputs(self) -> AcceptTreeCase:
        # The order of the calls with `g` fixes the values of every case: keep it.
        g = generator(self.seed)
        slots = self.requests + 3 if self.scattered else self.requests
        state_indices = slot_map(self.seed, self.requests, self.padding) if self.scattered else None
        sampling = sampling_tensors(
            self.seed, slots, self.temperatures, vocab=self.vocab, mask_rows=self.requests * self.nodes, adjust=self.adjust,
            filters=self.filters, filter_order=self.filter_order,
        )  # fmt: skip
        own = None
        if self.draft_temperature:
            own = torch.tensor(self.temperatures)[torch.randint(0, len(self.temperatures), (slots,), generator=g)]
        ids = self._ids(g, slots)
        draft_logits = (torch.randn(ids.shape, generator=g) * self.sharpness).to(self.dtype)
        positions = torch.randint(0, 5000, (slots,), generator=g)
        temperatures = (sampling.temperature if own is None else own).tolist()
        grown = {slot: self._grown(g, slot, ids, draft_logits, temperatures[slot]) for slot in range(slots)}
        flags = torch.zeros(self.requests, dtype=torch.int32)
        proposal = self._proposal(ids, draft_logits, own)
        tree = packed(grown, slots, self.nodes, torch.device("cpu"), proposal, self.drawn, flags)
        layout = layouts.tree_layout(
            tree, anchor_positions=positions, state_indices=state_indices, max_rows=self.max_rows, emits=self.emits
        )
        slot_of = list(range(slots)) if state_indices is None else state_indices.tolist()
        logits = self._target_logits(g, layout, slot_of, ids, draft_logits)
        if sampling.token_bitmask is not None:
            sampling = dataclasses.replace(sampling, token_bitmask=sampling.token_bitmask[: logits.shape[0]])
        sampling = sampling if self.sampled else None
        return AcceptTreeCase(logits.to(self.dtype), layout, tree, sampling, state_indices, self.rule, self.logprobs)

    def _ids(self, g, slots: int) -> Tensor:
        """Token ids of the columns of every node's draft row, int64 [S, M, W]."""
        width = self.vocab if self.draft_vocab is None else self.draft_vocab
        ids = torch.arange(width)
        if self.proposal == "mapped":
            ids = torch.randperm(max(self.vocab, width), generator=g)[:width]
        if self.proposal == "sparse":
            return torch.randint(-1, self.vocab + 1, (slots, self.nodes, self.candidates), generator=g)
        return ids.expand(slots, self.nodes, width)

    def _grown(self, g, slot: int, ids: Tensor, draft_logits: Tensor, temperature: float) -> Growing:
        """A tree whose children are drawn from the draft distribution of their parent."""
        count = int(torch.randint(1, self.nodes + 1, (1,), generator=g))
        count = count if self.counts is None else self.counts[slot]
        tree = Growing(int(torch.randint(0, self.vocab, (1,), generator=g)), self.nodes)
        left: dict[int, Tensor] = {}  # by parent: the logits of the tokens that may still be drawn
        for parent in (random_parents(g, count, self.reach) if self.parents is None else self.parents)[1:]:
            logits = left.setdefault(parent, draft_logits[slot, parent].double())
            if self.drawn == "one_hot" or temperature == 0 or float(logits.max()) == -torch.inf:
                column = int(logits.argmax())
            else:
                column = int(torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=g))
            token = int(ids[slot, parent, column])
            tree.add(parent, token if token >= 0 else self.vocab)  # an id outside the vocabulary
            if self.drawn != "iid":
                logits[ids[slot, parent] == token] = -torch.inf
        return tree

    def _proposal(self, ids: Tensor, draft_logits: Tensor, temperature: Tensor | None):
        if self.drawn == "one_hot":
            return OneHotProposal()
        if self.proposal == "sparse":
            return SparseProposal(ids, draft_logits, temperature=temperature)
        draft_to_target = ids[0, 0].contiguous() if self.proposal == "mapped" else None
        return DenseProposal(draft_logits, temperature=temperature, draft_to_target=draft_to_target)

    def _target_logits(self, g, layout: VerifyLayout, slot_of: list[int], ids: Tensor, draft_logits: Tensor) -> Tensor:
        """fp32 [L, V], one row per logit row of the layout."""
        offsets = layout.cu_num_logits.tolist()
        logits = torch.randn(max(1, offsets[-1]), self.vocab, generator=g) * self.sharpness
        for r, slot in enumerate(slot_of):
            first, last = offsets[r], offsets[r + 1]
            for node in range(last - first):
                inside = (ids[slot, node] >= 0) & (ids[slot, node] < self.vocab)
                at = ids[slot, node, inside]
                shared = self.closeness * draft_logits[slot, node, inside].float()
                logits[first + node, at] = shared + (1 - self.closeness) * logits[first + node, at]
        return logits


def random_parents(g: torch.Generator, count: int, reach: int | None = None) -> list[int]:
    """Parents of `count` nodes, each one of the `reach` nodes before (None: any)."""
    low = lambda node: 0 if reach is None else max(0, node - reach)  # noqa: E731
    return [-1] + [int(torch.randint(low(node), node, (1,), generator=g)) for node in range(1, count)]


def accept_tree_case(*axes, **named) -> AcceptTreeCase:
    """The inputs of an `AcceptTreeSpec` with these axes."""
    return AcceptTreeSpec(*axes, **named).inputs()
