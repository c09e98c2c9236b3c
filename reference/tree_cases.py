"""Inputs of `accept_tree`, made from a seed; the rest as in cases.py.

Symbols: R requests, S state slots, M nodes, V vocabulary (Vd the drafter's).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dspark_kernels.types import DenseProposal, DraftTree, OneHotProposal, SamplingTensors, SparseProposal, VerifyLayout

from . import cases, layout as layouts
from .tree_draft import Growing, packed


@dataclasses.dataclass
class AcceptTreeCase:
    """Arguments of `accept_tree`: call it with **case.arguments()."""

    target_logits: Tensor
    layout: VerifyLayout
    tree: DraftTree
    sampling: SamplingTensors | None
    state_indices: Tensor | None
    rule: str = "walk"
    logprobs: str | None = None

    def arguments(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def random_parents(g: torch.Generator, count: int, reach: int | None = None) -> list[int]:
    """Parents of `count` nodes, each one of the `reach` nodes before (None: any)."""
    low = lambda node: 0 if reach is None else max(0, node - reach)  # noqa: E731
    return [-1] + [int(torch.randint(low(node), node, (1,), generator=g)) for node in range(1, count)]


def accept_tree_case(
    seed: int = 0,
    requests: int = 3,
    nodes: int = 7,
    vocab: int = 300,
    drawn: str = "iid",
    rule: str = "walk",
    dtype: torch.dtype = torch.float32,
    sampled: bool = True,
    scattered: bool = False,
    padding: int = 0,
    closeness: float = 0.8,
    draft_temperature: bool = False,
    draft_vocab: int | None = None,
    sharpness: float = 3.0,
    temperatures: tuple[float, ...] = cases.TEMPERATURES,
    counts: list[int] | None = None,
    reach: int | None = None,
    parents: list[int] | None = None,
    max_rows: int | None = None,
    emits: Tensor | None = None,
    proposal: str = "dense",
    candidates: int = 5,
    adjust=(),
    filters=(),
    filter_order: str = "top_k_first",
    logprobs: str | None = None,
) -> AcceptTreeCase:
    """Trees of random shape and 1 to `nodes` nodes (or `counts`), or all of the shape `parents`, children drawn from the stored law
    of their parent.

    drawn "one_hot": the best tokens of that law. closeness: share of the draft's logits in the target's, 1 = equal laws.
    draft_temperature: the drafter has temperatures of its own, 0 among them. proposal "dense"; "mapped", whose columns are ids in
    shuffled order, some of them outside the vocabulary; "sparse": `candidates` ids in no order, some of them twice, some of none.
    adjust, filters: see `cases.sampling_tensors`.
    """
    g = torch.Generator().manual_seed(seed)
    slots = requests + 3 if scattered else requests
    wide = vocab if draft_vocab is None else draft_vocab
    state_indices = cases.slot_map(seed, requests, padding) if scattered else None
    sampling = cases.sampling_tensors(
        seed, slots, temperatures, vocab=vocab, mask_rows=requests * nodes, adjust=adjust, filters=filters,
        filter_order=filter_order,
    )  # fmt: skip
    own = torch.tensor(temperatures)[torch.randint(0, len(temperatures), (slots,), generator=g)] if draft_temperature else None
    ids = torch.arange(wide).expand(slots, nodes, wide)
    if proposal == "mapped":
        ids = torch.randperm(max(vocab, wide), generator=g)[:wide].expand(slots, nodes, wide)
    if proposal == "sparse":
        wide = candidates
        ids = torch.randint(-1, vocab + 1, (slots, nodes, wide), generator=g)
    law = (torch.randn(slots, nodes, wide, generator=g) * sharpness).to(dtype)
    positions = torch.randint(0, 5000, (slots,), generator=g)
    grown = {}
    for slot in range(slots):
        count = int(torch.randint(1, nodes + 1, (1,), generator=g))
        count = count if counts is None else counts[slot]
        tree = grown[slot] = Growing(int(torch.randint(0, vocab, (1,), generator=g)), nodes)
        temperature = float((sampling.temperature if own is None else own)[slot])
        left = {}
        for parent in (random_parents(g, count, reach) if parents is None else parents)[1:]:
            weights = left.setdefault(parent, law[slot, parent].double())
            if drawn == "one_hot" or temperature == 0 or float(weights.max()) == -torch.inf:
                column = int(weights.argmax())
            else:
                column = int(torch.multinomial(torch.softmax(weights / temperature, 0), 1, generator=g))
            token = int(ids[slot, parent, column])
            tree.add(parent, token if token >= 0 else vocab)  # none of the vocabulary
            if drawn != "iid":
                weights[ids[slot, parent] == token] = -torch.inf
    if drawn == "one_hot":
        stored = OneHotProposal()
    elif proposal == "sparse":
        stored = SparseProposal(ids, law, temperature=own)
    else:
        stored = DenseProposal(law, temperature=own, draft_to_target=ids[0, 0].contiguous() if proposal == "mapped" else None)
    flags = torch.zeros(requests, dtype=torch.int32)
    tree = packed(grown, slots, nodes, torch.device("cpu"), stored, drawn, flags)
    layout = layouts.tree_layout(tree, anchor_positions=positions, state_indices=state_indices, max_rows=max_rows, emits=emits)
    rows = max(1, int(layout.cu_num_logits[-1]))
    logits = torch.randn(rows, vocab, generator=g) * sharpness
    for r, slot in enumerate(range(slots) if state_indices is None else state_indices.tolist()):
        first, last = int(layout.cu_num_logits[r]), int(layout.cu_num_logits[r + 1])
        for node in range(last - first):
            inside = (ids[slot, node] >= 0) & (ids[slot, node] < vocab)
            at = ids[slot, node, inside]
            logits[first + node, at] = closeness * law[slot, node, inside].float() + (1 - closeness) * logits[first + node, at]
    if sampling.token_bitmask is not None:
        sampling = dataclasses.replace(sampling, token_bitmask=sampling.token_bitmask[:rows])
    return AcceptTreeCase(logits.to(dtype), layout, tree, sampling if sampled else None, state_indices, rule, logprobs)
