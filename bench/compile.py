"""What each kernel compiles to on each architecture, without a GPU: registers, spills, memory, matrix instructions.

The launches are the ops' own: every case calls a public op on CPU tensors under another architecture's launch
configuration, and the launch is compiled instead of run. Each row is keyed by two digests: `source`, of the code of the
kernel and all device functions it can call, and `launch`, of everything else that decides the binary (types and
alignment of arguments, constants, options). `--check` computes both again, without compiling, and compares.

    python -m bench.compile                    compile everything and write bench/results/compile.csv
    python -m bench.compile --arch sm_90       the same for one architecture; other rows stay
    python -m bench.compile --check            are the committed rows those of the code as it is?
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import hashlib
import inspect
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Callable
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # kernels imported below are to be compiled

import torch  # noqa: E402

import dspark_kernels as dk  # noqa: E402
from dspark_kernels.launch import arch as archs  # noqa: E402
from dspark_kernels.ops import accept_shards, attention, draft_shards  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "bench" / "results" / "compile.csv"
KERNELS = ROOT / "dspark_kernels" / "kernels"

# --- cases: one call of a public op each ------------------------------------------------------------------------------

VOCAB, DRAFTS, RANK, HIDDEN = 151936, 7, 256, 2560  # Qwen3-4B with its published drafter


def _empty(*shape, dtype=torch.bfloat16):
    # Never touched, so the memory of full-size tensors is never really taken.
    return torch.empty(*shape, dtype=dtype)


def _ints(*shape, dtype=torch.int64):
    return torch.zeros(*shape, dtype=dtype)


def _sampling(slots):
    return dk.SamplingTensors(torch.ones(slots), _ints(slots))


def _head(kind, vocab, targets, rank, dtype, w2_dtype):
    tables = _empty(targets, rank, dtype=dtype), _empty(vocab, rank, dtype=w2_dtype or dtype)
    scale = _empty(vocab, dtype=torch.float32) if w2_dtype in (torch.int8, torch.float8_e4m3fn) else None
    if kind == "gated":
        mixing = dict(gate_weight=_empty(rank, HIDDEN + rank, dtype=dtype), gate_bias=_empty(rank, dtype=dtype))
        return dk.GatedMarkovHead(*tables, scale, **mixing)
    if kind == "rnn":
        mixing = dict(joint_weight=_empty(3 * rank, 2 * rank + HIDDEN, dtype=dtype), joint_bias=_empty(3 * rank, dtype=dtype))
        return dk.RnnMarkovHead(*tables, scale, **mixing)
    return dk.MarkovHead(*tables, scale)


def _settings(slots, drafts, vocab, adjusted, filtered):
    """Everything a request can ask for."""
    number = functools.partial(torch.ones, slots)
    found = {}
    if adjusted:
        lists = _ints(slots, 1000), _ints(slots, 1000, dtype=torch.int32)
        found |= dict(
            logit_bias=_empty(slots, vocab, dtype=torch.float32),
            token_bitmask=_ints(slots, drafts, -(-vocab // 32), dtype=torch.int32),
            penalties=dk.Penalties(*lists, number(), number(), number()),
        )
    if filtered:
        found |= dict(top_k=_ints(slots, dtype=torch.int32), top_p=number(), min_p=number())
    return dataclasses.replace(_sampling(slots), **found)


def _draft(requests, *, drafts=DRAFTS, vocab=VOCAB, rank=RANK, dtype=torch.bfloat16, sampled=True, confidence=True,
           slots=None, kind="vanilla", w2_dtype=None, targets=None, adjusted=False, filtered=False, **options):  # fmt: skip
    size = requests if slots is None else slots
    head = _head(kind, vocab, targets or vocab, rank, dtype, w2_dtype) if rank else None
    ids = None if targets is None else _ints(vocab)
    confidence_head = None
    if confidence:
        sts = torch.ones(drafts)
        confidence_head = dk.ConfidenceHead(_empty(HIDDEN + rank, dtype=dtype), _empty(1, dtype=dtype), sts)
    lse = _empty(size, drafts, dtype=torch.float32)
    proposal = dk.DenseProposal(_empty(size, drafts, vocab, dtype=dtype), lse=lse, draft_to_target=ids)
    scores = [_empty(size, drafts, dtype=torch.float32) if confidence else None for _ in range(2)]
    dk.draft_block(
        _empty(requests, drafts, vocab, dtype=dtype),
        _ints(size),
        head,
        anchor_positions=_ints(size),
        sampling=_settings(size, drafts, targets or vocab, adjusted, filtered) if sampled else None,
        hidden=_empty(requests, drafts, HIDDEN, dtype=dtype) if confidence or kind != "vanilla" else None,
        confidence=confidence_head,
        draft_to_target=ids,
        head_state=_empty(size, rank, dtype=torch.float32) if kind == "rnn" else None,
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        out=dk.DraftBlock(
            _ints(size, drafts),
            proposal if sampled else dk.OneHotProposal(),
            _ints(requests, dtype=torch.int32),
            *scores,
        ),
        workspace=dk.Workspace(requests, drafts, vocab, "cpu", markov_rank=rank),
        **options,
    )


def _candidates(requests, candidates=64, *, kind="vanilla", drafts=DRAFTS, vocab=VOCAB, rank=RANK, dtype=torch.bfloat16,
                w2_dtype=None, sampled=True, confidence=True, slots=None, listed=0, mapped=False, adjusted=False, filtered=False,
                **options):  # fmt: skip
    size, width = requests if slots is None else slots, candidates + listed
    head = _head(kind, vocab, vocab, rank, dtype, w2_dtype) if rank else None
    confidence_head = None
    if confidence:
        confidence_head = dk.ConfidenceHead(_empty(HIDDEN + rank, dtype=dtype), _empty(1, dtype=dtype), torch.ones(drafts))
    logits = _empty(size, drafts, width, dtype=dtype)
    proposal = dk.SparseProposal(_ints(size, drafts, width), logits, lse=_empty(size, drafts, dtype=torch.float32))
    scores = [_empty(size, drafts, dtype=torch.float32) if confidence else None for _ in range(2)]
    dk.draft_block(
        _empty(requests, drafts, vocab, dtype=dtype),
        _ints(size),
        head,
        anchor_positions=_ints(size),
        sampling=_settings(size, drafts, vocab, adjusted, filtered) if sampled else None,
        hidden=_empty(requests, drafts, HIDDEN, dtype=dtype) if confidence or kind != "vanilla" else None,
        confidence=confidence_head,
        candidates=candidates,
        bigrams=_ints(vocab, listed, dtype=torch.int32) if listed else None,
        draft_to_target=_ints(vocab) if mapped else None,
        head_state=_empty(size, rank, dtype=torch.float32) if kind == "rnn" else None,
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        out=dk.DraftBlock(
            _ints(size, drafts),
            proposal if sampled else dk.OneHotProposal(),
            _ints(requests, dtype=torch.int32),
            *scores,
        ),
        workspace=dk.Workspace(requests, drafts, vocab, "cpu", markov_rank=rank),
        **options,
    )


def _layout(requests, *, drafts=DRAFTS, prefill=False, paged=False, slots=None):
    size = requests if slots is None else slots
    block = dk.DraftBlock(_ints(size, drafts), dk.OneHotProposal(), _ints(requests, dtype=torch.int32))
    return dk.fixed_layout(
        block,
        _ints(requests, dtype=torch.int32),
        anchors=_ints(size),
        anchor_positions=_ints(size),
        max_rows=requests * (drafts + 1) if prefill else None,
        num_prefill_tokens=_ints(requests, dtype=torch.int32) if prefill else None,
        emits=torch.ones(requests, dtype=torch.bool) if prefill else None,
        block_tables=_ints(size, 2048, dtype=torch.int32) if paged else None,
        page_size=16 if paged else None,
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
    )


def _tree_layout(requests, *, nodes=32, paged=False):
    int32 = functools.partial(_ints, dtype=torch.int32)
    links = [int32(requests, nodes) for _ in range(4)]
    tree = dk.DraftTree(
        _ints(requests, nodes), *links, _ints(requests, nodes), int32(requests), dk.OneHotProposal(), "one_hot", int32(requests)
    )
    pages = dict(block_tables=int32(requests, 2048), page_size=16) if paged else {}
    return dk.tree_layout(tree, anchor_positions=_ints(requests), **pages)


def _draft_layout(requests, *, anchor_first=True, paged=False):
    pages = dict(block_tables=_ints(requests, 2048, dtype=torch.int32), page_size=16) if paged else {}
    return dk.draft_layout(
        _ints(requests), _ints(requests), block_size=DRAFTS, mask_token_id=151643, anchor_first=anchor_first, **pages
    )


def _schedule(requests, *, drafts=DRAFTS, policy="causal", stale=False, paged=True, drafting=True, slots=None, **options):
    size = requests if slots is None else slots
    int32 = functools.partial(_ints, dtype=torch.int32)
    block = dk.DraftBlock(_ints(size, drafts), dk.OneHotProposal(), int32(requests), torch.ones(size, drafts))
    cost = dk.CostTable(torch.ones(4097), torch.ones(1025) if drafting else None)
    pages = dict(block_tables=int32(size, 2048), page_size=16) if paged else {}
    return dk.schedule_prefixes(
        block,
        None if policy == "budget" and not stale else cost,
        anchors=_ints(size),
        anchor_positions=_ints(size),
        policy=policy,
        budget=int32(1) if policy == "budget" and not stale else None,
        stale_confidence=torch.ones(size, drafts) if stale else None,
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        workspace=dk.Workspace(requests, drafts, VOCAB, "cpu"),
        **pages,
        **options,
    )


def _rows(requests, drafts):
    """The layout of a full batch, made without a launch."""
    rows = requests * (drafts + 1)
    int32 = functools.partial(_ints, dtype=torch.int32)
    return dk.VerifyLayout(
        draft_lens=int32(requests),
        query_start_loc=int32(requests + 1),
        cu_num_logits=int32(requests + 1),
        token_ids=_ints(rows),
        positions=_ints(rows),
        batch_indices=int32(rows),
        logits_indices=int32(rows),
        num_rows=int32(1),
        flags=int32(requests),
        max_drafts=drafts,
    )


def _accept(requests, *, drafts=DRAFTS, vocab=VOCAB, dtype=torch.bfloat16, proposal="lse", sampled=True, slots=None, candidates=64,
            forced=False, filters=False, adjust=False, **options):  # fmt: skip
    """proposal "lse" or "no lse" (dense), "mapped", "sparse", "rebuilt" or "one_hot"."""
    size = requests if slots is None else slots
    law = None
    if proposal == "sparse":
        law = dk.SparseProposal(_ints(size, drafts, candidates), _empty(size, drafts, candidates, dtype=dtype))
    elif proposal == "rebuilt":
        head = dk.MarkovHead(_empty(vocab, RANK, dtype=dtype), _empty(vocab, RANK, dtype=dtype))
        law = dk.RebuiltProposal(_empty(size, drafts, vocab, dtype=dtype), head, _empty(size, drafts, dtype=torch.float32))
    elif proposal != "one_hot":
        width = 32000 if proposal == "mapped" else vocab
        lse = None if proposal == "no lse" else _empty(size, drafts, dtype=torch.float32)
        law = dk.DenseProposal(
            _empty(size, drafts, width, dtype=dtype), lse, draft_to_target=_ints(width) if proposal == "mapped" else None
        )
    sampling = _sampling(size) if sampled else None
    if filters:
        limits = dict(top_k=_ints(size, dtype=torch.int32), top_p=torch.ones(size), min_p=torch.ones(size))
        sampling = dataclasses.replace(sampling, **limits)
    if adjust:
        sampling = dataclasses.replace(
            sampling,
            logit_bias=_empty(size, vocab, dtype=torch.float32),
            token_bitmask=_ints(requests * (drafts + 1), -(-vocab // 32), dtype=torch.int32),
            penalties=dk.Penalties(_ints(size, 256), _ints(size, 256, dtype=torch.int32), *(torch.ones(size) for _ in range(3))),
        )
    dk.accept_chain(
        _empty(requests * (drafts + 1), vocab, dtype=dtype),
        _rows(requests, drafts),
        law,
        sampling=sampling,
        anchors=_ints(size),
        anchor_positions=_ints(size),
        synthetic_rates=torch.ones(drafts) if forced else None,
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        workspace=dk.Workspace(requests, drafts, vocab, "cpu"),
        **options,
    )


def _cut(shards):
    """The first of `shards` equal shards of the vocabulary."""
    return dict(vocab_start=0, vocab_shards=shards, vocab_size=VOCAB)


def _draft_shard(requests, *, shards=8, dtype=torch.bfloat16, rank=RANK, sampled=True, lse=True, confidence=True, finish=False,
                 w2_dtype=None, **options):  # fmt: skip
    """The second position of a block on a rank: its part, or the draft from the parts of all ranks."""
    width = -(-VOCAB // shards)
    head = None
    if rank:
        scale = _empty(width, dtype=torch.float32) if w2_dtype else None
        head = dk.MarkovHead(_empty(VOCAB, rank, dtype=dtype), _empty(width, rank, dtype=w2_dtype or dtype), scale)
    proposal = dk.OneHotProposal()
    if sampled:
        scores = _empty(requests, DRAFTS, dtype=torch.float32) if lse else None
        proposal = dk.DenseProposal(_empty(requests, DRAFTS, width, dtype=dtype), lse=scores)
    scores = [_empty(requests, DRAFTS, dtype=torch.float32) if confidence else None for _ in range(2)]
    block = dk.DraftBlock(_ints(requests, DRAFTS), proposal, _ints(requests, dtype=torch.int32), *scores)
    scorer = dk.ConfidenceHead(_empty(HIDDEN + rank, dtype=dtype), _empty(1, dtype=dtype), torch.ones(DRAFTS))
    common = dict(position=1, sampling=_sampling(requests) if sampled else None, confidence=scorer if confidence else None)
    common |= _cut(shards)
    if not finish:
        base = _empty(requests, DRAFTS, width, dtype=dtype)
        workspace = dk.Workspace(requests, DRAFTS, VOCAB, "cpu")
        return dk.draft_block_partial(
            base, _ints(requests), head, anchor_positions=_ints(requests), block=block, workspace=workspace, **common, **options
        )
    hidden = _empty(requests, DRAFTS, HIDDEN, dtype=dtype) if confidence else None
    gathered = _ints(shards, draft_shards.part_words(requests, width, sampled and lse))
    return dk.draft_block_finish(gathered, block, _ints(requests), head, hidden=hidden, **common)


def _accept_shard(requests, phase, *, shards=8, dtype=torch.bfloat16, proposal="lse", sampled=True, rule="token"):
    """A phase of acceptance on a rank, or its finish."""
    width = -(-VOCAB // shards)
    law = None
    if proposal != "one_hot":
        lse = _empty(requests, DRAFTS, dtype=torch.float32) if proposal == "lse" else None
        law = dk.DenseProposal(_empty(requests, DRAFTS, width, dtype=dtype), lse=lse)
    common = dict(sampling=_sampling(requests) if sampled else None, rule=rule) | _cut(shards)
    logits, layout = _empty(requests * (DRAFTS + 1), width, dtype=dtype), _rows(requests, DRAFTS)
    phases = dk.accept_phases(law, sampling=common["sampling"], rule=rule)
    before = phases if phase == "finish" else phases[: phases.index(phase)]
    gathered = tuple(_ints(shards, accept_shards.part_words(logits, layout, law, phase=name, **common)) for name in before)
    if phase == "finish":
        anchors = dict(anchors=_ints(requests), anchor_positions=_ints(requests))
        return dk.accept_finish(logits, layout, law, gathered=gathered, **anchors, **common)
    workspace = dk.Workspace(requests, DRAFTS, VOCAB, "cpu")
    return dk.accept_partial(logits, layout, law, phase=phase, gathered=gathered, workspace=workspace, **common)


def _attention(requests, *, drafts=DRAFTS, group=4, kv_heads=8, head_dim=128, page_size=16, dtype=torch.bfloat16, cache=None,
               mask="chain", cached=False, invariant=False, slots=None, sinks=False, **options):  # fmt: skip
    """The attention of a step whose plan is there already, or with `head_dim` None the plan itself."""
    size, heads = requests if slots is None else slots, kv_heads * group
    rows = requests * (drafts + 1)
    plan_only = head_dim is None
    head_dim = head_dim or 128
    fp8 = cache == torch.float8_e4m3fn
    scales = dict(k_scale=torch.ones(kv_heads), v_scale=torch.ones(kv_heads)) if fp8 else {}
    pages = [_empty(2**18 // page_size, page_size, kv_heads, head_dim, dtype=cache or dtype) for _ in range(2)]
    kv = dk.PagedKV(*pages, _ints(size, 131072 // page_size, dtype=torch.int32), _ints(size, dtype=torch.int32), **scales)
    layout = dataclasses.replace(_rows(requests, drafts), slot_mapping=_ints(rows))
    state_indices = None if slots is None else torch.arange(requests, dtype=torch.int32)
    shared = dict(window=options.get("window"), batch_invariant=invariant)
    planning = dict(shared, query_heads=heads, dtype=dtype)
    if plan_only:
        return dk.plan_attention(layout, kv, state_indices=state_indices, **planning)
    q = _empty(rows, heads, head_dim, dtype=dtype)
    own = [None if cached else _empty(rows, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    return dk.tree_attention(
        q, kv, layout, mask=mask, ancestors=_ints(rows) if mask == "tree" else None, k_new=own[0], v_new=own[1],
        sinks=_empty(heads) if sinks else None, batch_invariant=invariant, state_indices=state_indices,
        plan=attention.empty_plan(layout, kv, state_indices=state_indices, **planning), **options,
    )  # fmt: skip


def _tree(slots, nodes, proposal, drawn):
    links = [_ints(slots, nodes, dtype=torch.int32) for _ in range(4)]
    int32 = functools.partial(_ints, dtype=torch.int32)
    return dk.DraftTree(_ints(slots, nodes), *links, _ints(slots, nodes), int32(slots), proposal, drawn, int32(slots))


def _accept_tree(requests, *, nodes=32, vocab=VOCAB, dtype=torch.bfloat16, rule="walk", drawn="one_hot", sampled=True, slots=None):
    size = requests if slots is None else slots
    law = dk.OneHotProposal() if drawn == "one_hot" else dk.DenseProposal(_empty(size, nodes, vocab, dtype=dtype))
    dk.accept_tree(
        _empty(requests * nodes, vocab, dtype=dtype),
        _rows(requests, nodes - 1),
        _tree(size, nodes, law, drawn),
        sampling=_sampling(size) if sampled else None,
        rule=rule,
        anchors=_ints(size),
        anchor_positions=_ints(size),
        state_indices=None if slots is None else torch.arange(requests, dtype=torch.int32),
        workspace=dk.Workspace(requests, nodes - 1, vocab, "cpu"),
    )


def _compact(requests, *, nodes=32, layers=36, kv_heads=8, head_dim=128, dtype=torch.bfloat16, extra=0):
    """Keys and values of all layers; extra: odd bytes per slot, so that nothing wider than a byte moves."""
    pages = [_empty(64, 16, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    int32 = functools.partial(_ints, dtype=torch.int32)
    rows = _rows(requests, nodes - 1)
    counts = [int32(requests) for _ in range(5)]
    acceptance = dk.Acceptance(
        _ints(requests, nodes), *counts[:3], _ints(requests), counts[3], torch.zeros(len(rows.token_ids), dtype=torch.bool),
        counts[4], kv_source=int32(requests, nodes),
    )  # fmt: skip
    more = [_empty(64, 16, extra, dtype=torch.uint8)] if extra else []
    layout = dataclasses.replace(rows, slot_mapping=_ints(len(rows.token_ids)))
    dk.compact_kv(dk.KVLayers.of([pages] * layers), acceptance, layout, extra=more)


# op -> case -> call. A case for every constant and optional argument that makes another binary.
CASES: dict[str, dict[str, Callable[[], object]]] = {
    "draft_block": {
        "sampled_r1": lambda: _draft(1),
        "sampled_r2": lambda: _draft(2),
        "sampled_r4": lambda: _draft(4),
        "sampled_r8": lambda: _draft(8),
        "sampled_r16": lambda: _draft(16),
        "sampled_r64": lambda: _draft(64),
        "sampled_r64_slots": lambda: _draft(64, slots=80),
        "sampled_r1_fp32": lambda: _draft(1, dtype=torch.float32),
        "sampled_r64_fp32": lambda: _draft(64, dtype=torch.float32),
        "sampled_r8_k5_v129280": lambda: _draft(8, drafts=5, vocab=129280),
        "sampled_r64_rank64": lambda: _draft(64, rank=64),
        "coupled_r64": lambda: _draft(64, noise="coupled"),
        "plain_r1": lambda: _draft(1, rank=0, confidence=False),
        "plain_r64": lambda: _draft(64, rank=0, confidence=False),
        "greedy_r1": lambda: _draft(1, sampled=False),
        "greedy_r64": lambda: _draft(64, sampled=False, confidence=False),
        "gated_r1": lambda: _draft(1, kind="gated"),
        "gated_r64": lambda: _draft(64, kind="gated"),
        "gated_r1_rank1000": lambda: _draft(1, kind="gated", rank=1000),
        "rnn_r1": lambda: _draft(1, kind="rnn"),
        "rnn_r64": lambda: _draft(64, kind="rnn"),
        "rnn_r8_fp32": lambda: _draft(8, kind="rnn", dtype=torch.float32),
        "rank1024_r64": lambda: _draft(64, rank=1024),
        "int8_r1": lambda: _draft(1, w2_dtype=torch.int8),
        "int8_r64": lambda: _draft(64, w2_dtype=torch.int8),
        "fp8_r1": lambda: _draft(1, w2_dtype=torch.float8_e4m3fn),
        "fp8_r64": lambda: _draft(64, w2_dtype=torch.float8_e4m3fn),
        "rnn_fp8_r64": lambda: _draft(64, kind="rnn", w2_dtype=torch.float8_e4m3fn),
        "mapped_r64_v32000": lambda: _draft(64, vocab=32000, targets=VOCAB),
        "filtered_r1": lambda: _draft(1, filtered=True),
        "filtered_r64": lambda: _draft(64, filtered=True),
        "adjusted_r8": lambda: _draft(8, adjusted=True),
        "adjusted_filtered_r64": lambda: _draft(64, adjusted=True, filtered=True),
        "rnn_filtered_r64": lambda: _draft(64, kind="rnn", filtered=True),
    },
    "draft_candidates": {
        "c64_r1": lambda: _candidates(1),
        "c64_r64": lambda: _candidates(64),
        "c64_r64_slots": lambda: _candidates(64, slots=80),
        "c16": lambda: _candidates(64, 16),
        "c256": lambda: _candidates(64, 256),
        "c64_fp32": lambda: _candidates(64, dtype=torch.float32),
        "c64_fp16": lambda: _candidates(64, dtype=torch.float16),
        "c64_plain": lambda: _candidates(64, rank=0, confidence=False),
        "c64_rank1024": lambda: _candidates(64, rank=1024),
        "c64_int8": lambda: _candidates(64, w2_dtype=torch.int8),
        "c64_fp8": lambda: _candidates(64, w2_dtype=torch.float8_e4m3fn),
        "c64_gated": lambda: _candidates(64, kind="gated"),
        "c64_rnn": lambda: _candidates(64, kind="rnn"),
        "c64_rnn_fp32": lambda: _candidates(64, kind="rnn", dtype=torch.float32),
        "c56_bigrams8": lambda: _candidates(64, 56, listed=8),
        "c64_coupled_map": lambda: _candidates(64, vocab=32000, mapped=True, noise="coupled"),
        "c64_greedy": lambda: _candidates(64, sampled=False),
        "c64_adjusted": lambda: _candidates(64, adjusted=True),
        "c64_filtered": lambda: _candidates(64, filtered=True),
    },
    "fixed_layout": {
        "r1": lambda: _layout(1),
        "r64": lambda: _layout(64),
        "r256_paged": lambda: _layout(256, paged=True, slots=300),
        "r1024_prefill": lambda: _layout(1024, prefill=True, paged=True, slots=1100),
    },
    "tree_layout": {
        "r8": lambda: _tree_layout(8),
        "r64_paged": lambda: _tree_layout(64, nodes=64, paged=True),
    },
    "draft_layout": {
        "r64": lambda: _draft_layout(64),
        "r256_paged": lambda: _draft_layout(256, anchor_first=False, paged=True),
    },
    "schedule_prefixes": {
        "causal_r1": lambda: _schedule(1),
        "causal_r16": lambda: _schedule(16),
        "causal_r64": lambda: _schedule(64),
        "causal_r256": lambda: _schedule(256, slots=300),
        "causal_r256_plain": lambda: _schedule(256, drafting=False, paged=False),
        "causal_r1024_k16": lambda: _schedule(1024, drafts=16),
        "budget_r64": lambda: _schedule(64, policy="budget"),
        "budget_r1024_k16": lambda: _schedule(1024, drafts=16, policy="budget"),
        "stale_r64": lambda: _schedule(64, policy="budget", stale=True),
        "stale_r256": lambda: _schedule(256, policy="budget", stale=True),
        "stale_r1024_k16": lambda: _schedule(1024, drafts=16, policy="budget", stale=True),
    },
    "plan_attention": {
        "r1": lambda: _attention(1, head_dim=None),
        "r64_slots": lambda: _attention(64, head_dim=None, slots=80),
        "r64_window": lambda: _attention(64, head_dim=None, window=4096),
        "r64_invariant": lambda: _attention(64, head_dim=None, invariant=True),
        "r1024": lambda: _attention(1024, head_dim=None),
    },
    "tree_attention": {
        "chain": lambda: _attention(64),
        "chain_r1": lambda: _attention(1),
        "chain_cached": lambda: _attention(64, cached=True, slots=80),
        "decode": lambda: _attention(64, drafts=0),
        "decode_group16": lambda: _attention(64, drafts=0, group=16, kv_heads=2),
        "group8": lambda: _attention(64, group=8),
        "group5_page1": lambda: _attention(64, group=5, page_size=1),
        "page128": lambda: _attention(64, page_size=128),
        "full": lambda: _attention(64, mask="full"),
        "tree": lambda: _attention(64, drafts=63, mask="tree"),
        "tree_window": lambda: _attention(64, drafts=15, mask="tree", window=4096, cached=True),
        "gemma": lambda: _attention(64, head_dim=256, group=2, window=1024, softcap=50.0),
        "gpt_oss": lambda: _attention(64, head_dim=64, group=8, window=128, sinks=True),
        "d64": lambda: _attention(64, head_dim=64),
        "d256": lambda: _attention(64, head_dim=256, group=2),
        "d80": lambda: _attention(64, head_dim=80),
        "fp8": lambda: _attention(64, cache=torch.float8_e4m3fn),
        "fp8_cached": lambda: _attention(64, cache=torch.float8_e4m3fn, cached=True),
        "fp16": lambda: _attention(64, dtype=torch.float16),
        "fp32": lambda: _attention(64, dtype=torch.float32),
        "fp32_d256": lambda: _attention(64, dtype=torch.float32, head_dim=256, group=2),
        "invariant": lambda: _attention(64, invariant=True, return_lse=True),
    },
    "accept_tree": {
        "walk": lambda: _accept_tree(64),
        "walk_m64": lambda: _accept_tree(8, nodes=64, slots=10),
        "greedy": lambda: _accept_tree(64, sampled=False),
        "recursive_iid": lambda: _accept_tree(64, rule="recursive", drawn="iid"),
        "traversal_replaced": lambda: _accept_tree(64, rule="traversal", drawn="without_replacement", slots=80),
        "traversal_v1000": lambda: _accept_tree(8, rule="traversal", drawn="without_replacement", vocab=1000, nodes=8),
    },
    "compact_kv": {
        "r64": lambda: _compact(64),
        "r1_fp8": lambda: _compact(1, dtype=torch.float8_e4m3fn),
        "r64_bytes": lambda: _compact(64, layers=1, extra=7),
    },
    "accept_chain": {
        "dense": lambda: _accept(64),
        "dense_r1": lambda: _accept(1),
        "dense_slots": lambda: _accept(64, slots=80),
        "dense_fp32": lambda: _accept(64, dtype=torch.float32),
        "dense_k5_v32000": lambda: _accept(64, drafts=5, vocab=32000),
        "dense_swept": lambda: _accept(64, proposal="no lse"),
        "one_hot": lambda: _accept(64, proposal="one_hot"),
        "one_hot_v1000": lambda: _accept(64, proposal="one_hot", vocab=1000),
        "greedy": lambda: _accept(64, proposal="one_hot", sampled=False),
        "sparse": lambda: _accept(64, proposal="sparse"),
        "sparse_c16": lambda: _accept(64, proposal="sparse", candidates=16),
        "sparse_c512": lambda: _accept(64, proposal="sparse", candidates=512),
        "dense_block": lambda: _accept(64, rule="block"),
        "dense_block_swept": lambda: _accept(64, rule="block", proposal="no lse"),
        "sparse_block": lambda: _accept(64, rule="block", proposal="sparse"),
        "one_hot_block": lambda: _accept(64, rule="block", proposal="one_hot"),
        "coupled": lambda: _accept(64, rule="coupled", proposal="one_hot"),
        "dense_raw": lambda: _accept(64, logprobs="raw"),
        "dense_processed": lambda: _accept(64, logprobs="processed"),
        "coupled_raw": lambda: _accept(64, rule="coupled", proposal="one_hot", logprobs="raw"),
        "forced": lambda: _accept(64, forced=True),
        "mapped": lambda: _accept(64, proposal="mapped"),
        "rebuilt": lambda: _accept(64, proposal="rebuilt"),
        "rebuilt_block": lambda: _accept(64, rule="block", proposal="rebuilt"),
        "dense_filters": lambda: _accept(64, filters=True),
        "dense_block_filters": lambda: _accept(64, rule="block", filters=True),
        "sparse_filters": lambda: _accept(64, proposal="sparse", filters=True),
        "coupled_filters": lambda: _accept(64, rule="coupled", proposal="one_hot", filters=True),
        "dense_adjust": lambda: _accept(64, adjust=True),
        "one_hot_all": lambda: _accept(64, proposal="one_hot", filters=True, adjust=True, logprobs="raw"),
        "sparse_all": lambda: _accept(64, proposal="sparse", filters=True, adjust=True, logprobs="processed"),
    },
    "draft_block_partial": {
        "sampled_r1": lambda: _draft_shard(1),
        "sampled_r64": lambda: _draft_shard(64),
        "sampled_r64_two": lambda: _draft_shard(64, shards=2),
        "no_lse_r64": lambda: _draft_shard(64, lse=False),
        "coupled_r64": lambda: _draft_shard(64, noise="coupled"),
        "int8_r64": lambda: _draft_shard(64, w2_dtype=torch.int8),
        "fp8_r64": lambda: _draft_shard(64, w2_dtype=torch.float8_e4m3fn),
        "plain_r64": lambda: _draft_shard(64, rank=0, confidence=False),
        "greedy_r64": lambda: _draft_shard(64, sampled=False),
    },
    "draft_block_finish": {
        "sampled_r64": lambda: _draft_shard(64, finish=True),
        "greedy_r64": lambda: _draft_shard(64, sampled=False, confidence=False, finish=True),
    },
    "accept_partial": {
        "normalise_dense": lambda: _accept_shard(64, "normalise"),
        "normalise_dense_fp32": lambda: _accept_shard(64, "normalise", dtype=torch.float32),
        "normalise_swept": lambda: _accept_shard(64, "normalise", proposal="no lse"),
        "normalise_one_hot": lambda: _accept_shard(64, "normalise", proposal="one_hot"),
        "normalise_greedy": lambda: _accept_shard(64, "normalise", sampled=False),
        "normalise_coupled": lambda: _accept_shard(64, "normalise", rule="coupled"),
        "residual": lambda: _accept_shard(64, "residual"),
        "residual_two": lambda: _accept_shard(64, "residual", shards=2),
        "residual_swept": lambda: _accept_shard(64, "residual", proposal="no lse"),
        "residual_block": lambda: _accept_shard(64, "residual", rule="block"),
        "draw_dense": lambda: _accept_shard(64, "draw"),
        "draw_one_hot": lambda: _accept_shard(64, "draw", proposal="one_hot"),
        "draw_block": lambda: _accept_shard(64, "draw", rule="block"),
        "draw_block_one_hot": lambda: _accept_shard(64, "draw", proposal="one_hot", rule="block"),
    },
    "accept_finish": {
        "drawn": lambda: _accept_shard(64, "finish"),
        "drawn_swept": lambda: _accept_shard(64, "finish", proposal="no lse"),
        "greedy": lambda: _accept_shard(64, "finish", sampled=False),
    },
}


# --- what a launch is -------------------------------------------------------------------------------------------------


@functools.cache
def code_digest(path: Path, root: Path = KERNELS) -> str:
    """Digest of the code (not comments, docstrings, layout) of a module and of all modules under `root` it imports."""
    seen: dict[str, str] = {}

    def visit(file: Path):
        name = str(file.relative_to(root))
        if name in seen:
            return
        text = file.read_text()
        seen[name] = " ".join(_code_tokens(text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                target = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                for found in (target.with_suffix(".py"), *(target / f"{alias.name}.py" for alias in node.names)):
                    if found.is_file():
                        visit(found)

    visit(path)
    return _digest("\n".join(f"{name}: {code}" for name, code in sorted(seen.items())))


def _code_tokens(text: str):
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in skip]
    start = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for i, token in enumerate(tokens):
        alone = token.type == tokenize.STRING and (i == 0 or tokens[i - 1].type in start)
        if alone and tokens[i + 1].type == tokenize.NEWLINE:
            continue  # a docstring
        yield tokenize.tok_name[token.type] if token.type in start else token.string


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _constant(value) -> str:
    value = getattr(value, "value", value) if type(value).__name__ == "constexpr" else value
    if hasattr(value, "fn"):
        return f"{value.fn.__module__}.{value.fn.__qualname__}"
    return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def _argument(value, parameter) -> str:
    """What the compiler sees of an argument: its type, and whether its value is 1 or a multiple of 16; of a tuple, its parts."""
    if parameter.is_constexpr:
        return f"constant {_constant(value)}"
    if value is None:
        return "None"
    if isinstance(value, tuple):
        return f"({', '.join(_argument(part, parameter) for part in value)})"
    if hasattr(value, "fn") or type(value).__name__ == "constexpr":
        return f"constant {_constant(value)}"  # inside a tuple the type says what is constant
    if isinstance(value, torch.Tensor):
        return f"*{value.dtype}" + (":16" if value.data_ptr() % 16 == 0 else "")
    if isinstance(value, tuple):
        return f"({', '.join(_argument(part, parameter) for part in value)})"
    if isinstance(value, int) and not isinstance(value, bool):
        width = "i32" if -(2**31) <= value < 2**31 else "i64"
        if parameter.do_not_specialize:
            return width
        return f"{width}:1" if value == 1 else f"{width}:16" if value % 16 == 0 else width
    return type(value).__name__


@dataclasses.dataclass(frozen=True)
class Launch:
    """One captured launch: what it is compiled from, and, if it was compiled, the result and the time it took."""

    kernel: str
    source: str
    launch: str
    compiled: object = None
    seconds: float = 0.0


@contextlib.contextmanager
def capture(arch: str, compiled: bool):
    """Within it launches are appended to the list it gives instead of being run; kernels compile only if asked to."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    original, active = JITFunction.run, driver._active
    done: dict[str, tuple] = _COMPILED.setdefault(arch, {})

    def run(self, *args, grid, warmup, **kwargs):
        names = {p.name for p in self.params}
        bound = self.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in names})
        bound.apply_defaults()
        text = [f"{p.name} {_argument(bound.arguments[p.name], p)}" for p in self.params]
        text += [f"{k}={_constant(v)}" for k, v in sorted(kwargs.items()) if k not in names]
        file = Path(inspect.getfile(self.fn))
        source = code_digest(file, KERNELS if file.is_relative_to(KERNELS) else file.parent)
        launch = _digest("\n".join(text))
        key = f"{self.fn.__qualname__} {source} {launch}"
        if compiled and key not in done:
            self.device_caches.clear()  # it is kept per device, and here one device stands for every target
            started = time.perf_counter()
            done[key] = original(self, *args, grid=grid, warmup=True, **kwargs), time.perf_counter() - started
        launches.append(Launch(self.fn.__name__, source, launch, *done.get(key, ())))

    JITFunction.run = run
    if compiled:
        number = arch.removeprefix("sm_")
        target = GPUTarget("cuda", int(number), 32) if number.isdigit() else GPUTarget("hip", arch, 64)
        driver.set_active(_stub_driver(target))
    try:
        with archs.override(arch):
            yield launches
    finally:
        JITFunction.run = original
        driver._active = active


_COMPILED: dict[str, dict[str, tuple]] = {}  # arch -> launch -> (kernel, seconds): cases may share a binary


def _stub_driver(target):
    """A driver for a GPU that is not there, enough to compile."""
    from triton.backends.driver import DriverBase

    answers = {
        "is_active": True,
        "get_current_target": target,
        "get_active_torch_device": torch.device("cpu"),
        "get_current_device": 0,
        "get_current_stream": 0,
        "set_current_device": None,
        "map_python_to_cpp_type": "",
        "get_device_interface": torch.cpu,
        "get_benchmarker": None,
        "get_empty_cache_for_benchmark": None,
        "clear_cache": None,
    }
    methods = {name: (lambda self, *args, answer=answer: answer) for name, answer in answers.items()}
    return type("OfflineDriver", (DriverBase,), {"__init__": lambda self: None, **methods})()


# --- what a binary is -------------------------------------------------------------------------------------------------


def inspect_binary(kernel) -> dict:
    """Registers, spills (bytes of spill code on NVIDIA, registers on AMD), stack, matrix instructions, size."""
    if "cubin" in kernel.asm:
        return _inspect_cubin(kernel.asm["cubin"])
    text = kernel.asm["amdgcn"]

    def field(name):
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    spilled = field("vgpr_spill_count")
    return dict(
        registers=field("vgpr_count"),
        spill_stores=spilled,
        spill_loads=spilled,
        scalar_spills=field("sgpr_spill_count"),
        stack=field("private_segment_fixed_size"),
        matrix_instructions=len(re.findall(r"^\s*v_(?:s?mfmac?|wmma)_", text, re.M)),
        binary_bytes=len(kernel.asm["hsaco"]),
    )


_WIDTH = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


def _inspect_cubin(cubin: bytes) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )

    def local(instruction):
        found = re.findall(rf"\b{instruction}((?:\.\w+)*)\s", sass)
        return sum(next((_WIDTH[part] for part in suffix.split(".") if part in _WIDTH), 4) for suffix in found)

    resource = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    return dict(
        registers=resource["REG"],
        spill_stores=local("STL"),
        spill_loads=local("LDL"),
        scalar_spills=0,
        stack=resource["STACK"],
        matrix_instructions=len(re.findall(r"\b(?:[A-Z]MMA|[A-Z]GMMA|UTC[A-Z]*MMA)\b", sass)),
        binary_bytes=len(cubin),
    )


# --- the report -------------------------------------------------------------------------------------------------------

KEY = ("op", "case", "kernel", "arch")
DIGESTS = ("source", "launch")
COLUMNS = (
    *KEY, "registers", "spill_stores", "spill_loads", "scalar_spills", "stack", "shared", "shared_limit",
    "matrix_instructions", "binary_bytes", "num_warps", "num_stages", "compile_seconds", *DIGESTS, "triton",
)  # fmt: skip


def rows_of(arch: str, op: str, compiled: bool, cases: list[str] | None = None) -> list[dict]:
    """The report's rows of one op on one architecture, without the measured columns if nothing is compiled."""
    rows = []
    for case, call in CASES[op].items():
        if cases is not None and case not in cases:
            continue
        with capture(arch, compiled) as launches:
            call()
        # A form of several launches runs one binary again and again.
        if len({(launch.kernel, launch.launch) for launch in launches}) != 1:
            raise RuntimeError(f"{op} {case}: expected one binary, got {[launch.kernel for launch in launches]}")
        launch = launches[0]
        row = dict(op=op, case=case, kernel=launch.kernel, arch=arch, source=launch.source, launch=launch.launch)
        if compiled:
            import triton

            metadata = launch.compiled.metadata
            row.update(inspect_binary(launch.compiled))
            row.update(
                shared=metadata.shared,
                shared_limit=archs.KNOWN[arch].shared_memory,
                num_warps=metadata.num_warps,
                num_stages=metadata.num_stages,
                compile_seconds=f"{launch.seconds:.2f}",
                triton=triton.__version__,
            )
        rows.append({name: str(value) for name, value in row.items()})
    return rows


def problems(row: dict) -> list[str]:
    """What a row may not show: registers kept in memory, or more shared memory than there is.

    AMD's scalar registers (kernels with many arguments run out of them) spill into lanes of vector registers, not into
    memory, as long as the stack is empty; they are reported and not judged.
    """
    where = " ".join(row[name] for name in KEY)
    found = []
    for name in ("spill_stores", "spill_loads", "stack"):
        if int(row[name]):
            found.append(f"{where}: {name} is {row[name]}, must be 0")
    if int(row["shared"]) > int(row["shared_limit"]):
        found.append(f"{where}: {row['shared']} bytes of shared memory, {row['shared_limit']} are there")
    return found


def stale(expected: list[dict], committed: list[dict]) -> list[str]:
    """Where the committed rows are not those of the code."""
    have = {tuple(row[name] for name in KEY): row for row in committed}
    want = {tuple(row[name] for name in KEY): row for row in expected}
    found = [f"{' '.join(key)}: not in the report" for key in want if key not in have]
    found += [f"{' '.join(key)}: in the report, but no such launch" for key in have if key not in want]
    for key in want.keys() & have.keys():
        changed = [name for name in DIGESTS if want[key][name] != have[key][name]]
        if changed:
            found.append(f"{' '.join(key)}: {' and '.join(changed)} changed since it was compiled")
    return sorted(found)


def read(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict]) -> None:
    order = [(op, case) for op in CASES for case in CASES[op]]
    rank = {name: i for i, name in enumerate(archs.KNOWN)}
    rows = sorted(rows, key=lambda row: (order.index((row["op"], row["case"])), rank[row["arch"]]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _compile(arch: str, op: str, cached: bool, cases: list[str] | None) -> list[dict]:
    import triton

    torch.set_num_threads(1)
    triton.knobs.compilation.always_compile = not cached
    return rows_of(arch, op, True, cases)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=archs.KNOWN, help="architecture (repeatable; default: all)")
    parser.add_argument("--op", action="append", choices=CASES, help="op (repeatable; default: all)")
    every_case = sorted({case for op in CASES.values() for case in op})
    parser.add_argument("--case", action="append", choices=every_case, metavar="CASE", help="case (default: all)")
    parser.add_argument("--check", action="store_true", help="compare the report with the code; compile nothing")
    parser.add_argument("--output", type=Path, default=REPORT, metavar="FILE", help="the report (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time (default %(default)s)")
    parser.add_argument("--cached", action="store_true", help="take binaries from Triton's cache where it has them")
    options = parser.parse_args(arguments)
    selected = options.arch or list(archs.KNOWN)
    ops = options.op or list(CASES)

    def is_selected(row):
        return row["arch"] in selected and row["op"] in ops and (not options.case or row["case"] in options.case)

    committed = read(options.output)
    if options.check:
        expected = [row for arch in selected for op in ops for row in rows_of(arch, op, False, options.case)]
        chosen = [row for row in committed if is_selected(row)]
        found = stale(expected, chosen) + [text for row in chosen for text in problems(row)]
        print("\n".join(found) or f"{len(chosen)} rows are fresh")
        return 1 if found else 0

    rows, found = [], []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(1, options.jobs), mp_context=context) as pool:
        pending = {
            pool.submit(_compile, arch, op, options.cached, options.case): (op, arch) for arch in selected for op in ops
        }
        for future in concurrent.futures.as_completed(pending):
            try:
                new = future.result()
            except Exception as error:
                found.append(f"{' '.join(pending[future])}: {type(error).__name__}: {error}")
                continue
            rows += new
            for row in new:
                print(" ".join(f"{row[name]:>{width}}" for name, width in _SHOWN.items()), flush=True)
                found += problems(row)
    # Rows of cases that are gone go too.
    kept = [row for row in committed if not is_selected(row) and row["case"] in CASES.get(row["op"], ())]
    write(options.output, kept + rows)
    print("\n".join(found) or f"{len(rows)} launches: no spill, shared memory within limits", file=sys.stderr)
    return 1 if found else 0


_SHOWN = dict(
    op=12, case=22, arch=7, registers=4, spill_stores=5, scalar_spills=4, stack=5, shared=7, matrix_instructions=4,
    binary_bytes=7, num_warps=2, num_stages=2, compile_seconds=6,
)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
