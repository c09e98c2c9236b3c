"""One call of draft_tree or expand_tree."""

from __future__ import annotations

import dataclasses

import torch

import dspark_kernels as dk
from bench.shared.offline.calls.inputs import (
    DRAFTS,
    HIDDEN,
    RANK,
    VOCAB,
    empty,
    head_of,
    id_map,
    ints,
    sampling_of,
    tree_of,
)


def draft_tree_call(requests, method, branching, *, nodes=32, drafts=DRAFTS, vocab=VOCAB, rank=RANK, dtype=torch.bfloat16,
                kind="vanilla", w2_dtype=None, slots=None, biased=False):  # fmt: skip
    size = requests if slots is None else slots
    sampled = method in ("iid", "without_replacement")
    sampling = sampling_of(size) if sampled or biased else None
    if biased:
        sampling = dataclasses.replace(sampling, logit_bias=empty(size, vocab, dtype=torch.float32))
    proposal = dk.DenseProposal(empty(size, nodes, vocab, dtype=dtype)) if sampled else dk.OneHotProposal()
    out = tree_of(size, nodes, proposal, method if sampled else "one_hot")
    dk.draft_tree(
        empty(requests, drafts, vocab, dtype=dtype),
        ints(size),
        head_of(kind, vocab, vocab, rank, dtype, w2_dtype) if rank else None,
        anchor_positions=ints(size),
        method=method,
        num_nodes=nodes,
        branching=branching,
        sampling=sampling,
        hidden=None if kind == "vanilla" else empty(requests, drafts, HIDDEN, dtype=dtype),
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        out=dataclasses.replace(out, flags=ints(requests, dtype=torch.int32)),
        workspace=dk.Workspace(requests, nodes - 1, vocab, "cpu", markov_rank=rank),
    )


# op -> case -> call.
def draft_paths_call(requests, *, method="conditioned", candidates=None, kind="vanilla", nodes=32, drafts=DRAFTS, vocab=VOCAB,
                 rank=RANK, dtype=torch.bfloat16, confidence=False, budgets=False):  # fmt: skip
    scored = dk.ConfidenceHead(empty(HIDDEN + rank, dtype=dtype), empty(1, dtype=dtype), torch.ones(drafts))
    dk.draft_tree(
        empty(requests, drafts, vocab, dtype=dtype),
        ints(requests),
        head_of(kind, vocab, vocab, rank, dtype, None),
        anchor_positions=ints(requests),
        method=method,
        num_nodes=nodes,
        node_budgets=ints(requests, dtype=torch.int32) if budgets else None,
        sampling=sampling_of(requests),
        hidden=empty(requests, drafts, HIDDEN, dtype=dtype),
        confidence=scored if confidence else None,
        candidates=candidates,
    )


def expand_tree_call(requests, method, *, nodes=32, width=8, branching=4, vocab=VOCAB, dtype=torch.bfloat16, mapped=False):
    ids, logits = id_map(vocab) if mapped else None, empty(requests, nodes, vocab, dtype=dtype)
    proposal = dk.OneHotProposal() if method == "top_k" else dk.DenseProposal(logits, draft_to_target=ids)
    tree = tree_of(requests, nodes, proposal, "one_hot" if method == "top_k" else method)
    dk.expand_tree(
        tree,
        empty(requests, width, vocab, dtype=dtype),
        depth=1,
        branching=branching,
        anchor_positions=ints(requests),
        method=method,
        sampling=None if method == "top_k" else sampling_of(requests),
        draft_to_target=ids,
        out=tree,
        workspace=dk.Workspace(requests, nodes - 1, vocab, "cpu"),
    )
