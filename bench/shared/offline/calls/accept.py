"""One call of accept_chain or accept_tree."""

from __future__ import annotations

import torch

import dspark_kernels as dk
from bench.shared.offline.calls.inputs import (
    DRAFTS,
    VOCAB,
    empty,
    id_map,
    ints,
    rows_of,
    settings_of,
    tree_of,
)


def accept_call(requests, *, drafts=DRAFTS, vocab=VOCAB, dtype=torch.bfloat16, proposal="lse", sampled=True, slots=None,
                candidates=64, forced=False, filters=False, adjust=False, **options):  # fmt: skip
    """proposal "lse" or "no lse" (dense), "mapped", "sparse" or "one_hot"."""
    size = requests if slots is None else slots
    made = None
    if proposal == "sparse":
        made = dk.SparseProposal(ints(size, drafts, candidates), empty(size, drafts, candidates, dtype=dtype))
    elif proposal != "one_hot":
        width = 32000 if proposal == "mapped" else vocab
        lse = None if proposal == "no lse" else empty(size, drafts, dtype=torch.float32)
        made = dk.DenseProposal(
            empty(size, drafts, width, dtype=dtype), lse, draft_to_target=id_map(width) if proposal == "mapped" else None
        )
    sampling = settings_of(size, (requests * (drafts + 1),), vocab, adjust, filters) if sampled else None
    dk.accept_chain(
        empty(requests * (drafts + 1), vocab, dtype=dtype),
        rows_of(requests, drafts),
        made,
        sampling=sampling,
        anchors=ints(size),
        anchor_positions=ints(size),
        synthetic_rates=torch.ones(drafts) if forced else None,
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        workspace=dk.Workspace(requests, drafts, vocab, "cpu"),
        **options,
    )


def accept_tree_call(requests, *, nodes=32, vocab=VOCAB, dtype=torch.bfloat16, rule="walk", drawn="one_hot", proposal="dense",
                 sampled=True, slots=None, filters=False, adjust=False, logprobs=None):  # fmt: skip
    """proposal, where sampled: "dense", "mapped" or "sparse" (64 candidates)."""
    size = requests if slots is None else slots
    width = 32000 if proposal == "mapped" else vocab
    made = dk.OneHotProposal()
    if drawn != "one_hot" and proposal == "sparse":
        made = dk.SparseProposal(ints(size, nodes, 64), empty(size, nodes, 64, dtype=dtype))
    elif drawn != "one_hot":
        made = dk.DenseProposal(empty(size, nodes, width, dtype=dtype), draft_to_target=id_map(width) if width < vocab else None)
    dk.accept_tree(
        empty(requests * nodes, vocab, dtype=dtype),
        rows_of(requests, nodes - 1),
        tree_of(size, nodes, made, drawn),
        sampling=settings_of(size, (requests * nodes,), vocab, adjust, filters) if sampled else None,
        rule=rule,
        logprobs=logprobs,
        anchors=ints(size),
        anchor_positions=ints(size),
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        workspace=dk.Workspace(requests, nodes - 1, vocab, "cpu"),
    )
