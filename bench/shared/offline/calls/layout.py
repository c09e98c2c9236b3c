"""One call of schedule_prefixes or of an op that lays rows out."""

from __future__ import annotations

import functools

import torch

import dspark_kernels as dk
from bench.shared.offline.calls.inputs import (
    DRAFTS,
    VOCAB,
    ints,
)


def layout_call(requests, *, drafts=DRAFTS, prefill=False, paged=False, slots=None):
    size = requests if slots is None else slots
    block = dk.DraftBlock(ints(size, drafts), dk.OneHotProposal(), ints(requests, dtype=torch.int32))
    return dk.fixed_layout(
        block,
        ints(requests, dtype=torch.int32),
        anchors=ints(size),
        anchor_positions=ints(size),
        max_rows=requests * (drafts + 1) if prefill else None,
        num_prefill_tokens=ints(requests, dtype=torch.int32) if prefill else None,
        emits=torch.ones(requests, dtype=torch.bool) if prefill else None,
        block_tables=ints(size, 2048, dtype=torch.int32) if paged else None,
        page_size=16 if paged else None,
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
    )


def tree_layout_call(requests, *, nodes=32, paged=False):
    int32 = functools.partial(ints, dtype=torch.int32)
    links = [int32(requests, nodes) for _ in range(4)]
    tree = dk.DraftTree(
        ints(requests, nodes), *links, ints(requests, nodes), int32(requests), dk.OneHotProposal(), "one_hot", int32(requests)
    )
    pages = dict(block_tables=int32(requests, 2048), page_size=16) if paged else {}
    return dk.tree_layout(tree, anchor_positions=ints(requests), **pages)


def draft_layout_call(requests, *, anchor_first=True, paged=False):
    pages = dict(block_tables=ints(requests, 2048, dtype=torch.int32), page_size=16) if paged else {}
    return dk.draft_layout(
        ints(requests), ints(requests), block_size=DRAFTS, mask_token_id=151643, anchor_first=anchor_first, **pages
    )


def schedule_call(requests, *, drafts=DRAFTS, policy="causal", stale=False, paged=True, drafting=True, slots=None, **options):
    size = requests if slots is None else slots
    int32 = functools.partial(ints, dtype=torch.int32)
    block = dk.DraftBlock(ints(size, drafts), dk.OneHotProposal(), int32(requests), torch.ones(size, drafts))
    cost = dk.CostTable(torch.full((4097,), 0.1), torch.full((1025,), 0.1) if drafting else None)
    pages = dict(block_tables=int32(size, 2048), page_size=16) if paged else {}
    return dk.schedule_prefixes(
        block,
        None if policy == "budget" and not stale else cost,
        anchors=ints(size),
        anchor_positions=ints(size),
        policy=policy,
        budget=int32(1) if policy == "budget" and not stale else None,
        stale_confidence=torch.ones(size, drafts) if stale else None,
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        workspace=dk.Workspace(requests, drafts, VOCAB, "cpu"),
        **pages,
        **options,
    )
