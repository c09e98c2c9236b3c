"""One call of draft_block: over the whole vocabulary, or on candidates."""

from __future__ import annotations

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
    settings_of,
)


def draft_call(requests, *, drafts=DRAFTS, vocab=VOCAB, rank=RANK, dtype=torch.bfloat16, sampled=True, confidence=True,
           slots=None, kind="vanilla", w2_dtype=None, targets=None, adjusted=False, filtered=False, **options):  # fmt: skip
    size = requests if slots is None else slots
    head = head_of(kind, vocab, targets or vocab, rank, dtype, w2_dtype) if rank else None
    ids = None if targets is None else id_map(vocab)
    confidence_head = None
    if confidence:
        sts = torch.ones(drafts)
        confidence_head = dk.ConfidenceHead(empty(HIDDEN + rank, dtype=dtype), empty(1, dtype=dtype), sts)
    lse = empty(size, drafts, dtype=torch.float32)
    proposal = dk.DenseProposal(empty(size, drafts, vocab, dtype=dtype), lse=lse, draft_to_target=ids)
    scores = [empty(size, drafts, dtype=torch.float32) if confidence else None for _ in range(2)]
    dk.draft_block(
        empty(requests, drafts, vocab, dtype=dtype),
        ints(size),
        head,
        anchor_positions=ints(size),
        sampling=settings_of(size, (size, drafts), targets or vocab, adjusted, filtered) if sampled else None,
        hidden=empty(requests, drafts, HIDDEN, dtype=dtype) if confidence or kind != "vanilla" else None,
        confidence=confidence_head,
        draft_to_target=ids,
        head_state=empty(size, rank, dtype=torch.float32) if kind == "rnn" else None,
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        out=dk.DraftBlock(
            ints(size, drafts),
            proposal if sampled else dk.OneHotProposal(),
            ints(requests, dtype=torch.int32),
            *scores,
        ),
        workspace=dk.Workspace(requests, drafts, vocab, "cpu", markov_rank=rank),
        **options,
    )


def candidates_call(requests, candidates=64, *, kind="vanilla", drafts=DRAFTS, vocab=VOCAB, rank=RANK, dtype=torch.bfloat16,
                w2_dtype=None, sampled=True, confidence=True, slots=None, successors=0, mapped=False, adjusted=False, filtered=False,
                **options):  # fmt: skip
    size, width = requests if slots is None else slots, candidates + successors
    head = head_of(kind, vocab, vocab, rank, dtype, w2_dtype) if rank else None
    confidence_head = None
    if confidence:
        confidence_head = dk.ConfidenceHead(empty(HIDDEN + rank, dtype=dtype), empty(1, dtype=dtype), torch.ones(drafts))
    logits = empty(size, drafts, width, dtype=dtype)
    proposal = dk.SparseProposal(ints(size, drafts, width), logits, lse=empty(size, drafts, dtype=torch.float32))
    scores = [empty(size, drafts, dtype=torch.float32) if confidence else None for _ in range(2)]
    dk.draft_block(
        empty(requests, drafts, vocab, dtype=dtype),
        ints(size),
        head,
        anchor_positions=ints(size),
        sampling=settings_of(size, (size, drafts), vocab, adjusted, filtered) if sampled else None,
        hidden=empty(requests, drafts, HIDDEN, dtype=dtype) if confidence or kind != "vanilla" else None,
        confidence=confidence_head,
        candidates=candidates,
        bigrams=ints(vocab, successors, dtype=torch.int32) if successors else None,
        draft_to_target=id_map(vocab) if mapped else None,
        head_state=empty(size, rank, dtype=torch.float32) if kind == "rnn" else None,
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        out=dk.DraftBlock(
            ints(size, drafts),
            proposal if sampled else dk.OneHotProposal(),
            ints(requests, dtype=torch.int32),
            *scores,
        ),
        workspace=dk.Workspace(requests, drafts, vocab, "cpu", markov_rank=rank),
        **options,
    )
