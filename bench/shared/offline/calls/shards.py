"""One call of an op on a rank that holds a shard of the vocabulary, or of its finish."""

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
    rows_of,
    settings_of,
)
from dspark_kernels.ops.accept import shards as accept_shards
from dspark_kernels.ops.draft import candidate_shards, shards as draft_shards


def _cut(shards):
    """The first of `shards` equal shards of the vocabulary."""
    return dict(vocab_start=0, vocab_shards=shards, vocab_size=VOCAB)


def draft_shard_call(requests, candidates=None, *, shards=8, dtype=torch.bfloat16, rank=RANK, sampled=True, lse=True, confidence=True,
                 finish=False, w2_dtype=None, kind="vanilla", whole=True, mapped=False, adjusted=False, filtered=False,
                 **options):  # fmt: skip
    """A rank's part of the second position of a block, or with `candidates` of a whole block; or the finish from all parts.

    whole: of candidates, every rank has all of W2."""
    width = -(-VOCAB // shards)
    head = head_of(kind, VOCAB if candidates and whole else width, VOCAB, rank, dtype, w2_dtype) if rank else None
    ids = id_map(width) if mapped else None
    proposal = dk.OneHotProposal()
    if sampled:
        scores = empty(requests, DRAFTS, dtype=torch.float32) if lse else None
        logits = empty(requests, DRAFTS, candidates or width, dtype=dtype)
        if candidates:
            proposal = dk.SparseProposal(ints(requests, DRAFTS, candidates), logits, lse=scores)
        else:
            proposal = dk.DenseProposal(logits, lse=scores, draft_to_target=ids)
    scores = [empty(requests, DRAFTS, dtype=torch.float32) if confidence else None for _ in range(2)]
    block = dk.DraftBlock(ints(requests, DRAFTS), proposal, ints(requests, dtype=torch.int32), *scores)
    scorer = dk.ConfidenceHead(empty(HIDDEN + rank, dtype=dtype), empty(1, dtype=dtype), torch.ones(DRAFTS))
    base = empty(requests, DRAFTS, width, dtype=dtype)
    common = dict(
        sampling=settings_of(requests, (requests, DRAFTS), VOCAB, adjusted, filtered) if sampled else None,
        hidden=empty(requests, DRAFTS, HIDDEN, dtype=dtype) if confidence or kind != "vanilla" else None,
        confidence=scorer if confidence else None,
        **(dict(candidates=candidates, draft_to_target=ids) if candidates else dict(position=1)),
        **_cut(shards),
    )
    of_all = dict(anchor_positions=ints(requests), workspace=dk.Workspace(requests, DRAFTS, VOCAB, "cpu", markov_rank=rank))
    if kind == "rnn":
        of_all["head_state"] = empty(requests, rank, dtype=torch.float32)
    if not finish:
        of_all |= dict(draft_to_target=ids)
        return dk.draft_block_partial(base, ints(requests), head, block=block, **(common | of_all), **options)
    if not candidates:
        gathered = ints(shards, draft_shards.part_words(requests, width, sampled and lse))
        return dk.draft_block_finish(gathered, block, ints(requests), head, **common)
    gathered = ints(shards, candidate_shards.part_words(base, head, candidates=candidates, draft_to_target=ids))
    return dk.draft_block_finish(gathered, block, ints(requests), head, base_logits=base, **common, **of_all, **options)


def accept_shard_call(requests, phase, *, shards=8, dtype=torch.bfloat16, proposal="lse", sampled=True, rule="token", adjust=False):
    """A phase of acceptance on a rank, or its finish."""
    width = -(-VOCAB // shards)
    made = None
    if proposal == "sparse":
        made = dk.SparseProposal(ints(requests, DRAFTS, 64), empty(requests, DRAFTS, 64, dtype=dtype))
    elif proposal != "one_hot":
        lse = empty(requests, DRAFTS, dtype=torch.float32) if proposal == "lse" else None
        made = dk.DenseProposal(empty(requests, DRAFTS, width, dtype=dtype), lse=lse)
    sampling = settings_of(requests, (requests * (DRAFTS + 1),), VOCAB, adjust, False) if sampled else None
    common = dict(sampling=sampling, rule=rule) | _cut(shards)
    logits, layout = empty(requests * (DRAFTS + 1), width, dtype=dtype), rows_of(requests, DRAFTS)
    phases = dk.accept_phases(made, sampling=common["sampling"], rule=rule)
    before = phases if phase == "finish" else phases[: phases.index(phase)]
    gathered = tuple(ints(shards, accept_shards.part_words(logits, layout, made, phase=name, **common)) for name in before)
    if phase == "finish":
        anchors = dict(anchors=ints(requests), anchor_positions=ints(requests))
        return dk.accept_finish(logits, layout, made, gathered=gathered, **anchors, **common)
    workspace = dk.Workspace(requests, DRAFTS, VOCAB, "cpu")
    return dk.accept_partial(logits, layout, made, phase=phase, gathered=gathered, workspace=workspace, **common)
