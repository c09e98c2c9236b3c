"""Attention of a step's rows over the cached context and over the rows of the same step, dense and in high precision.

    score_{i,j} = softcap(scale * q_i . k_j),   softcap(s) = cap * tanh(s / cap)
    lse_i = ln(exp(sink) + sum over visible j of exp(score_{i,j}))
    out_i = sum over visible j of exp(score_{i,j} - lse_i) * v_j

Symbols: n own rows of a request, c context keys, N packed rows, Hq/Hkv query and key-value heads (GQA: query head h
reads head h // (Hq / Hkv)), D head size. Context key j is at position j. Own row s is at position c + depth_s, where
depth is s itself in a chain or a full block, and the number of proper ancestors in a tree.

Visibility of own rows: "chain" s <= i; "full" all (the drafter's block, both directions); "tree" bit s of row i's int64
ancestor word, itself included. Context keys are visible to every row. A window of w keys (itself counted) hides what
lies w or more positions back; in a tree this goes by depth, and nothing ahead of a row is ever hidden by it.

Sources: "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192 (chain rows); SpecInfer, arXiv
2305.09781 (tree mask); attention sinks as a logit without value: gpt-oss model card, arXiv 2508.10925.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_kernels.types import DraftTree, PagedKV, VerifyLayout

MASKS = ("chain", "full", "tree")
MAX_NODES = 64


def chain_ancestors(n: int) -> Tensor:
    """Ancestor words of a chain of n <= 64 rows, int64 [n]: word i has the bits 0..i."""
    if not 0 <= n <= MAX_NODES:
        raise ValueError(f"n: expected 0 to {MAX_NODES}, got {n}")
    bits = torch.ones(1, dtype=torch.int64) << torch.arange(n, dtype=torch.int64)
    return bits.cumsum(0)


def ancestor_bits(ancestors: Tensor) -> Tensor:
    """Ancestor words int64 [n] as bool [n, 64]: entry (i, s) tells whether row i sees own row s."""
    shifts = torch.arange(MAX_NODES, dtype=torch.int64, device=ancestors.device)
    return ((ancestors[:, None] >> shifts) & 1).bool()


def visible_keys(
    n: int,
    context_len: int,
    *,
    mask: str = "chain",
    ancestors: Tensor | None = None,
    window: int | None = None,
    device=None,
) -> Tensor:
    """Which keys each own row sees, bool [n, context_len + n], context first."""
    if mask not in MASKS:
        raise ValueError(f"mask: expected one of {', '.join(map(repr, MASKS))}, got {mask!r}")
    if (mask == "tree") != (ancestors is not None):
        raise ValueError(f"ancestors: expected int64 [{n}] with mask 'tree' and None otherwise, got {ancestors}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected >= 1 (a row counts itself), got {window}")
    rows = torch.arange(n, device=device)
    depth = rows
    if mask == "chain":
        own = rows[None, :] <= rows[:, None]
    elif mask == "full":
        own = torch.ones(n, n, dtype=torch.bool, device=device)
    else:
        if ancestors.dtype != torch.int64 or tuple(ancestors.shape) != (n,) or n > MAX_NODES:
            raise ValueError(
                f"ancestors: expected int64 [{n}] with at most {MAX_NODES} rows, got {ancestors.dtype} {list(ancestors.shape)}"
            )
        bits = ancestor_bits(ancestors.to(rows.device))
        own, depth = bits[:, :n], bits.sum(1) - 1
    seen = torch.cat([torch.ones(n, context_len, dtype=torch.bool, device=device), own], 1)
    if window is not None:
        positions = torch.cat([torch.arange(context_len, device=device), context_len + depth])
        seen &= (context_len + depth)[:, None] - positions[None, :] < window
    return seen


def dense_attention(
    q: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    *,
    mask: str = "chain",
    ancestors: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
):
    """Attention of one request's rows: [n, Hq, Dv] in `dtype`, with return_lse also lse [n, Hq].

    q [n, Hq, D]; k_context [c, Hkv, D], v_context [c, Hkv, Dv], c >= 0; k_new [n, Hkv, D], v_new [n, Hkv, Dv];
    ancestors int64 [n] with mask "tree"; scale defaults to 1 / sqrt(D); softcap > 0; sinks [Hq], a logit that takes
    part in the normaliser and has no value. dtype fp32 or fp64 is the arithmetic and the result's type.

    The lse covers the sink too, so that out * exp(lse) is the unnormalised sum and parts can be merged. A row that sees
    nothing gives 0 and lse -inf (the sink alone, where there is one). Keys and values that a row does not see cannot
    change its result, NaN and infinities included.
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected > 0, got {softcap}")
    n, query_heads, size = q.shape
    kv_heads = k_new.shape[1]
    if query_heads % kv_heads:
        raise ValueError(f"q: expected a multiple of {kv_heads} heads, got {query_heads}")
    group = query_heads // kv_heads
    seen = visible_keys(n, k_context.shape[0], mask=mask, ancestors=ancestors, window=window, device=q.device)
    keys = torch.cat([k_context.to(dtype), k_new.to(dtype)])
    values = torch.cat([v_context.to(dtype), v_new.to(dtype)])
    queries = q.to(dtype).reshape(n, kv_heads, group, size)

    scores = torch.einsum("nkgd,mkd->nkgm", queries, keys) * (1 / math.sqrt(size) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None, None, :], -math.inf)
    if sinks is not None:
        sink = sinks.to(dtype).reshape(1, kv_heads, group, 1).expand(n, -1, -1, -1)
        lse = torch.cat([scores, sink], -1).logsumexp(-1)
    elif scores.shape[-1]:
        lse = scores.logsumexp(-1)
    else:
        lse = scores.new_full(scores.shape[:-1], -math.inf)
    # A row without any visible key has lse -inf; 0 in its place makes all its weights exp(-inf) = 0.
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    out = _weighted_sum(weights, values, seen).reshape(n, query_heads, values.shape[-1])
    return (out, lse.reshape(n, query_heads)) if return_lse else out


def _weighted_sum(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """weights [n, Hkv, G, m] times values [m, Hkv, Dv]; no 0 * NaN: a bad value reaches only rows that see it."""
    finite = values.isfinite()
    if finite.all():
        return torch.einsum("nkgm,mkd->nkgd", weights, values)
    out = torch.einsum("nkgm,mkd->nkgd", weights, values.where(finite, 0.0))
    for key in (~finite).flatten(1).any(1).nonzero().flatten().tolist():
        rows = seen[:, key].nonzero().flatten()
        bad = values[key].where(~finite[key], 0.0)[None, :, None, :]  # [1, Hkv, 1, Dv]
        share = weights[:, :, :, key].index_select(0, rows)[..., None]  # [rows, Hkv, G, 1]
        out[rows] += share * bad
    return out


def packed_attention(
    q: Tensor,
    contexts: Sequence[tuple[Tensor, Tensor]],
    k_new: Tensor,
    v_new: Tensor,
    query_start_loc: Tensor,
    *,
    ancestors: Tensor | None = None,
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
    **rules,
):
    """`dense_attention` over packed rows: [N, Hq, Dv] in `dtype`, with return_lse also lse [N, Hq].

    q [N, Hq, D]; k_new, v_new [N, Hkv, D]; query_start_loc int [R+1]: request r has the rows query_start_loc[r] up to
    query_start_loc[r+1]; contexts: R pairs (k [c_r, Hkv, D], v [c_r, Hkv, Dv]); ancestors int64 [N], bits counted
    within the request. Rows of no request give 0 and lse -inf. The other keywords go to `dense_attention`. With mask "tree" a
    request of more than 64 rows is a chain.
    """
    starts = query_start_loc.tolist()
    if len(contexts) != len(starts) - 1:
        raise ValueError(f"contexts: expected {len(starts) - 1} pairs (one per request), got {len(contexts)}")
    out = torch.zeros(*q.shape[:2], v_new.shape[-1], dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:2], -math.inf, dtype=dtype, device=q.device)
    for (k_context, v_context), begin, end in zip(contexts, starts[:-1], starts[1:], strict=True):
        rows = slice(begin, end)
        own = dict(rules, ancestors=None if ancestors is None else ancestors[rows])
        if ancestors is not None and end - begin > MAX_NODES:
            own = dict(rules, mask="chain")
        out[rows], lse[rows] = dense_attention(
            q[rows], k_context, v_context, k_new[rows], v_new[rows], return_lse=True, dtype=dtype, **own
        )
    return (out, lse) if return_lse else out


def tree_attention(
    q: Tensor,
    kv: PagedKV,
    layout: VerifyLayout,
    *,
    mask: str = "chain",
    ancestors: Tensor | DraftTree | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    plan=None,
    state_indices: Tensor | None = None,
    out=None,
    workspace=None,
    validate: bool = False,
    dtype: torch.dtype = torch.float64,
):
    """`packed_attention` over a paged cache, with the op's signature: [N_max, Hq, D] in `dtype`, with return_lse also lse.

    batch_invariant, plan, out, workspace and validate change nothing here. A padding request's rows give 0 and lse -inf.
    Pages and slots must be in range.
    """
    if isinstance(ancestors, DraftTree):
        ancestors = ancestors.ancestors
    starts = layout.query_start_loc.tolist()
    slots = list(range(len(starts) - 1)) if state_indices is None else state_indices.tolist()
    page_size = kv.k_cache.shape[1]
    wide = [
        cache.to(dtype) * (1 if one is None else one.to(dtype)[:, None])
        for cache, one in ((kv.k_cache, kv.k_scale), (kv.v_cache, kv.v_scale))
    ]

    def rows_at(cache, index):
        return cache[index // page_size, index % page_size]

    own = [k_new, v_new]
    if k_new is None:
        at = layout.slot_mapping.clamp(min=0)
        own = [rows_at(cache, at) for cache in wide]
    contexts, words = [], None if ancestors is None else torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
    for slot, begin, end in zip(slots, starts[:-1], starts[1:], strict=True):
        keys = torch.arange(int(kv.context_lens[slot]) if slot >= 0 else 0, device=q.device)
        table = kv.block_tables[max(slot, 0)].long()
        contexts.append(tuple(rows_at(cache, table[keys // page_size] * page_size + keys % page_size) for cache in wide))
        if ancestors is not None and end - begin <= MAX_NODES:
            words[begin:end] = ancestors[begin:end] if ancestors.dim() == 1 else ancestors[slot, : end - begin]
    result, lse = packed_attention(
        q, contexts, *own, layout.query_start_loc, mask=mask, ancestors=words, scale=scale, window=window, softcap=softcap,
        sinks=sinks, return_lse=True, dtype=dtype,
    )  # fmt: skip
    for slot, begin, end in zip(slots, starts[:-1], starts[1:], strict=True):
        if slot < 0:
            result[begin:end], lse[begin:end] = 0.0, -math.inf
    return (result, lse) if return_lse else result
