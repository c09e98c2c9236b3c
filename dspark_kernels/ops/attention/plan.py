"""plan_attention: the keys of all requests shared out over the GPU, in one launch. Reference: reference/attention.py.

Source: Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import INT_DTYPES, LOGIT_DTYPES, check_choice, check_int, check_optional, check_tensor, check_type
from ...kernels.attention.args import AttentionScratch, PlanInputs, WorkTable
from ...kernels.sizes import PLAN_COLUMNS
from ...launch import arch, attention as attention_launch
from ...library import Out
from ...types import AttentionPlan, PagedKV, VerifyLayout
from ...workspace import Workspace

OP = "tree_attention"  # which the workspace is for


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """The sizes that a plan is made for, all known on the host."""

    config: attention_launch.AttentionConfig
    max_items: int
    partial_rows: int


def _sizes(
    here: arch.Arch,
    requests: int,
    rows: int,
    most_rows: int | None,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    element_size: int,
    cached_size: int,
    max_keys: int | None,
    invariant: bool,
) -> _Sizes:
    """Bounds of the work table. most_rows: largest number of rows of a request, None = unknown; max_keys: of keys of a context."""
    group = query_heads // kv_heads
    packed = None if invariant else group * (rows if most_rows is None else min(rows, most_rows))
    config = attention_launch.pick(here, packed, head_dim, element_size, cached_size, kv_heads)
    tiles = min(requests, rows) + rows * group // config.block_m
    # Parts beyond one per tile: work / chunk with chunk >= work / (finer * programs of a head); no part under min_blocks.
    longest = 2**31 if max_keys is None else -(-max_keys // (config.block_n * config.min_blocks))
    more = config.finer * -(-config.programs // kv_heads)
    if invariant:
        parts = max(1, min(config.invariant_parts, longest))
        items, partial_rows = tiles * parts, rows * group * parts
    else:
        parts = max(1, min(more + 1, longest))
        items = min(tiles + more, tiles * parts)
        # A tile of several parts is longer than a chunk, so at most `more` tiles are, and they have 2 * more parts in all.
        partial_rows = min(2 * more * config.block_m, rows * group * parts)
    return _Sizes(config, max(1, items), 0 if parts == 1 else partial_rows)


def counters_of(take: workspaces.Take, max_items: int, kv_heads: int) -> Tensor:
    return take(max_items * kv_heads, torch.int32)


def scratch_of(take: workspaces.Take, partial_rows: int, kv_heads: int, head_dim: int) -> AttentionScratch:
    """Partial results of `tree_attention`, without its counters."""
    partial = take(partial_rows * kv_heads * attention_launch.head_tile(head_dim), torch.float32)
    return AttentionScratch(None, partial, take(2 * partial_rows * kv_heads, torch.float32))


def words_needed(max_items: int, partial_rows: int, kv_heads: int, head_dim: int) -> tuple[int, int]:
    """int64 words of counters and scratch of a launch of `tree_attention`."""
    return workspaces.measured(counters_of, max_items, kv_heads), workspaces.measured(scratch_of, partial_rows, kv_heads, head_dim)


@workspaces.declare_heads(OP)
def _needs(
    requests: int, rows: int, query_heads: int, kv_heads: int, head_dim: int, invariant: bool, device: torch.device
) -> tuple[int, int]:
    # Any mask, context and dtype: the most that any of them needs.
    here = arch.current(device)
    needs = [
        _sizes(here, requests, rows, most, query_heads, kv_heads, head_dim, element_size, cached_size, None, any_batch)
        for element_size, cached_size in ((2, 2), (2, 1), (4, 4), (4, 1))
        for any_batch in {False, invariant}
        for most in {1 << shift for shift in range(rows.bit_length())} | {None}
    ]
    words = [words_needed(size.max_items, size.partial_rows, kv_heads, head_dim) for size in needs]
    return max(counters for counters, _ in words), max(scratch for _, scratch in words)


def plan_attention(
    layout: VerifyLayout,
    kv: PagedKV,
    *,
    query_heads: int,
    dtype: torch.dtype | None = None,
    window: int | None = None,
    batch_invariant: bool = False,
    max_programs: int | None = None,
    state_indices: Tensor | None = None,
    out: AttentionPlan | None = None,
    workspace: Workspace | None = None,
) -> AttentionPlan:
    """Divide the keys of all requests among the programs of `tree_attention`, in one launch. The host need not know any length.

    One plan serves every layer of a step with these heads and this window: it depends on the rows of each request and on its
    context length, not on keys. A part of a context is as long as an even share of all work, or up to four times shorter where that
    balances better. With batch_invariant its length depends on the request's own context length alone.

    Args:
        layout: the rows of each request (layout.max_drafts bounds the tile, where it is known).
        kv: lengths from kv.context_lens; sizes and dtype of the cache.
        query_heads: Hq, a multiple of the cache's Hkv.
        dtype: of the queries; default the cache's, bf16 for an fp8 cache.
        window: as in `tree_attention`.
        max_programs: largest number of programs of the attention launch (to leave multiprocessors to a collective).
        state_indices: int32 or int64 [R], slot of each request in kv.context_lens and kv.block_tables, -1 = padding request.
        out: an AttentionPlan made for the same sizes; nothing else is allocated.
        workspace: accepted for uniformity; this op needs no scratch memory.

    tree_attention with this plan needs 4 * partial_rows * Hkv * (D + 2) bytes of scratch, D rounded up to a power of two of at
    least 16. plan.partial_rows is bounded by the size of the GPU, except with batch_invariant: there it is rows * Hq / Hkv *
    parts, with up to 128 / Hkv parts, whatever the lengths are. Example: 266 KB per row for Hq = 32, Hkv = 8, D = 128 and 16
    parts. Give prompts of thousands of rows to another launch, without batch_invariant.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or stride.
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    plan, config = _plan_for(
        layout, kv, query_heads, dtype, window, batch_invariant, max_programs, state_indices, out, workspace
    )  # fmt: skip
    requests, rows = layout.draft_lens.shape[0], layout.token_ids.shape[0]
    if requests == 0 or rows == 0:
        plan.counts.zero_()
        return plan
    arguments = Arguments(
        query_start_loc=layout.query_start_loc,
        context_lens=kv.context_lens,
        state_indices=state_indices,
        items=plan.items,
        counts=plan.counts,
        rows=rows,
        max_keys=plan.max_keys,
        group=query_heads // plan.kv_heads,
        kv_heads=plan.kv_heads,
        block_m=plan.block_m,
        block_n=plan.block_n,
        programs=plan.programs,
        min_blocks=config.min_blocks,
        finer=config.finer,
        invariant_parts=config.invariant_parts if batch_invariant else 0,
        partial_rows=plan.partial_rows,
        window=window,
    )
    _plan_attention(arguments)
    return plan


def empty_plan(
    layout: VerifyLayout,
    kv: PagedKV,
    *,
    query_heads: int,
    dtype: torch.dtype | None = None,
    window: int | None = None,
    batch_invariant: bool = False,
    max_programs: int | None = None,
    state_indices: Tensor | None = None,
) -> AttentionPlan:
    """An uninitialised plan of these sizes, for `out` of plan_attention. Launches nothing."""
    return _plan_for(layout, kv, query_heads, dtype, window, batch_invariant, max_programs, state_indices, None, None)[0]


def _plan_for(
    layout: VerifyLayout,
    kv: PagedKV,
    query_heads: int,
    dtype: torch.dtype | None,
    window: int | None,
    batch_invariant: bool,
    max_programs: int | None,
    state_indices: Tensor | None,
    out: AttentionPlan | None,
    workspace: Workspace | None,
) -> tuple[AttentionPlan, attention_launch.AttentionConfig]:
    """The plan to write, checked or new, and the launch configuration it is made for."""
    check_type("layout", layout, VerifyLayout)
    check_type("kv", kv, PagedKV)
    requests, rows = layout.draft_lens.shape[0], layout.token_ids.shape[0]
    device = layout.token_ids.device
    check_tensor("kv.k_cache", kv.k_cache, device=device)
    _, page_size, kv_heads, head_dim = kv.k_cache.shape
    check_int("query_heads", query_heads, low=1)
    if query_heads % kv_heads:
        raise ValueError(f"query_heads: expected a multiple of {kv_heads} KV heads, got {query_heads}")
    fp8 = kv.k_cache.dtype == torch.float8_e4m3fn
    dtype = dtype or (torch.bfloat16 if fp8 else kv.k_cache.dtype)
    check_choice("dtype", dtype, LOGIT_DTYPES)
    check_window(window)
    if max_programs is not None:
        check_int("max_programs", max_programs, low=1)
    check_slots(state_indices, requests, kv, device)
    if workspace is not None:
        check_type("workspace", workspace, Workspace)
    most_rows = None if layout.max_drafts is None or rows > requests * (layout.max_drafts + 1) else layout.max_drafts + 1
    sizes = _sizes(
        arch.current(device), requests, rows, most_rows, query_heads, kv_heads, head_dim, dtype.itemsize,
        kv.k_cache.element_size(), kv.block_tables.shape[1] * page_size, batch_invariant,
    )  # fmt: skip
    config = sizes.config
    programs = config.programs if max_programs is None else min(config.programs, max_programs)
    facts: dict[str, Any] = dict(
        **places(rows, requests, kv),
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        element_size=dtype.itemsize,
        block_m=config.block_m,
        block_n=config.block_n,
        programs=programs,
        partial_rows=sizes.partial_rows,
        window=window,
        batch_invariant=bool(batch_invariant),
    )
    if out is None:
        new = torch.empty if requests and rows else torch.zeros  # without rows nothing is launched
        out = AttentionPlan(
            new(sizes.max_items, PLAN_COLUMNS, dtype=torch.int32, device=device),
            new(3, dtype=torch.int32, device=device),
            **facts,
        )
    else:
        check_type("out", out, AttentionPlan)
        for name, fact in facts.items():
            if getattr(out, name) != fact:
                raise ValueError(f"out.{name}: expected {fact}, got {getattr(out, name)}")
        check_tensor("out.items", out.items, shape=(sizes.max_items, PLAN_COLUMNS), device=device)
    return out, config


def places(rows: int, requests: int, kv: PagedKV) -> dict[str, int]:
    """What bounds the rows, slots and keys that a plan names: one made for other bounds would reach other memory."""
    slots, max_pages = kv.block_tables.shape
    return dict(rows=rows, requests=requests, slots=slots, max_keys=max_pages * kv.k_cache.shape[1])


def check_window(window: int | None) -> None:
    if window is not None:
        check_int("window", window, low=1, high=2**30)


def check_slots(state_indices: Tensor | None, requests: int, kv: PagedKV, device: torch.device) -> None:
    check_optional("state_indices", state_indices, dtype=INT_DTYPES, shape=(requests,), device=device, contiguous=True)
    if state_indices is None and kv.block_tables.shape[0] != requests:
        raise ValueError(
            f"kv.block_tables: expected {requests} rows (one per request, no state_indices), got {kv.block_tables.shape[0]}"
        )


class Arguments(NamedTuple):
    """`plan_attention` as torch.library knows it."""

    query_start_loc: Tensor
    context_lens: Tensor
    state_indices: Tensor | None
    items: Out[Tensor]
    counts: Out[Tensor]
    rows: int
    max_keys: int
    group: int
    kv_heads: int
    block_m: int
    block_n: int
    programs: int
    min_blocks: int
    finer: int
    invariant_parts: int
    partial_rows: int
    window: int | None


@library.register("plan_attention", Arguments)
def _plan_attention(a: Arguments) -> None:
    device = a.items.device
    kernels = library.kernels("attention.plan", device)
    requests, max_items = a.query_start_loc.shape[0] - 1, a.items.shape[0]
    log_requests = (requests - 1).bit_length()
    config = attention_launch.pick_plan(arch.current(device), requests)
    block = min(config.block, 1 << (max_items - 1).bit_length())
    kernels.launch_plan_attention(
        -(-max_items // block),
        (
            PlanInputs(query_start_ptr=a.query_start_loc, context_lens_ptr=a.context_lens, slots_ptr=a.state_indices),
            WorkTable(items_ptr=a.items, counts_ptr=a.counts),
            requests, a.context_lens.shape[0], a.rows, max_items, a.max_keys, a.partial_rows, a.window,
        ),
        constants=dict(
            GROUP=a.group,
            KV_HEADS=a.kv_heads,
            BLOCK_M=a.block_m,
            BLOCK_N=a.block_n,
            PROGRAMS=a.programs,
            MIN_BLOCKS=a.min_blocks,
            FINER=a.finer,
            INVARIANT_PARTS=a.invariant_parts,
            REQUESTS=1 << log_requests,
            LOG_REQUESTS=log_requests,
            BLOCK=block,
        ),
        num_warps=config.num_warps,
    )  # fmt: skip
