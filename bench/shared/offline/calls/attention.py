"""One call of tree_attention or of its plan, or of compact_kv."""

from __future__ import annotations

import dataclasses
import functools

import torch

import dspark_kernels as dk
from bench.shared.offline.calls.inputs import (
    DRAFTS,
    empty,
    ints,
    rows_of,
)
from dspark_kernels.ops.attention import plan as attention


def attention_call(requests, *, drafts=DRAFTS, group=4, kv_heads=8, head_dim=128, page_size=16, dtype=torch.bfloat16, cache=None,
               mask="chain", cached=False, invariant=False, slots=None, sinks=False, **options):  # fmt: skip
    """The attention of a step whose plan is there already, or with `head_dim` None the plan itself."""
    size, heads = requests if slots is None else slots, kv_heads * group
    rows = requests * (drafts + 1)
    plan_only = head_dim is None
    head_dim = head_dim or 128
    fp8 = cache == torch.float8_e4m3fn
    scales = dict(k_scale=torch.ones(kv_heads), v_scale=torch.ones(kv_heads)) if fp8 else {}
    pages = [empty(2**18 // page_size, page_size, kv_heads, head_dim, dtype=cache or dtype) for _ in range(2)]
    kv = dk.PagedKV(*pages, ints(size, 131072 // page_size, dtype=torch.int32), ints(size, dtype=torch.int32), **scales)
    layout = dataclasses.replace(rows_of(requests, drafts), slot_mapping=ints(rows))
    state_indices = None if slots is None else torch.arange(requests, dtype=torch.int32)
    shared = dict(window=options.get("window"), batch_invariant=invariant)
    planning = dict(shared, query_heads=heads, dtype=dtype)
    if plan_only:
        return dk.plan_attention(layout, kv, state_indices=state_indices, **planning)
    q = empty(rows, heads, head_dim, dtype=dtype)
    own = [None if cached else empty(rows, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    return dk.tree_attention(
        q, kv, layout, mask=mask, ancestors=ints(rows) if mask == "tree" else None, k_new=own[0], v_new=own[1],
        sinks=empty(heads) if sinks else None, batch_invariant=invariant, state_indices=state_indices,
        plan=attention.empty_plan(layout, kv, state_indices=state_indices, **planning), **options,
    )  # fmt: skip


def compact_call(requests, *, nodes=32, layers=36, kv_heads=8, head_dim=128, dtype=torch.bfloat16, extra=0):
    """Keys and values of all layers; extra: odd bytes per slot, so that nothing wider than a byte moves."""
    pages = [empty(64, 16, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    int32 = functools.partial(ints, dtype=torch.int32)
    rows = rows_of(requests, nodes - 1)
    counts = [int32(requests) for _ in range(5)]
    acceptance = dk.Acceptance(
        ints(requests, nodes), *counts[:3], ints(requests), counts[3], torch.zeros(len(rows.token_ids), dtype=torch.bool),
        counts[4], kv_source=int32(requests, nodes),
    )  # fmt: skip
    more = [empty(64, 16, extra, dtype=torch.uint8)] if extra else []
    layout = dataclasses.replace(rows, slot_mapping=ints(len(rows.token_ids)))
    dk.compact_kv(dk.KVLayers.of([pages] * layers), acceptance, layout, extra=more)
