"""tree_attention: attention of a step's packed rows over paged contexts, split over all programs, in one launch.

    out_i = sum over visible j of exp(score_{i,j} - lse_i) v_j,  score = softcap(scale q_i . k_j)

A chain, a block that sees itself in both directions, or a tree given by ancestor words. Reference: reference/attention.py. Sources:
arXiv 2211.17192 (chains), arXiv 2305.09781 (tree masks), Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import LOGIT_DTYPES, check_choice, check_optional, check_tensor, check_type
from ...choices import MASKS, Mask
from ...kernels.attention.args import (
    AttentionInputs,
    AttentionResults,
    CacheStrides,
    NewStrides,
    RowStrides,
    WorkTable,
)
from ...launch import arch, attention as attention_launch
from ...library import Out
from ...types import AttentionPlan, DraftTree, PagedKV, VerifyLayout
from ...workspace import Workspace
from .plan import check_slots, check_window, counters_of, places, plan_attention, scratch_of, words_needed

MAX_NODES = 64  # bits of an ancestor word
MAX_HEAD_DIM = 256


def tree_attention(
    q: Tensor,
    kv: PagedKV,
    layout: VerifyLayout,
    *,
    mask: Mask = "chain",
    ancestors: Tensor | DraftTree | None = None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    plan: AttentionPlan | None = None,
    state_indices: Tensor | None = None,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    workspace: Workspace | None = None,
    validate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of all rows over each request's paged context and its own rows of this step, in one launch.

    Args:
        q: [N_max, Hq, D] bf16, fp16 or fp32, last dimension contiguous, D at most 256.
        kv: the layer's cache, in q's dtype or fp8 e4m3; Hq must be a multiple of its Hkv.
        layout: which rows belong to which request. Rows of no request, and rows of a padding request, get 0 and lse -inf.
        mask: how a request's own rows see each other: "chain" (causal), "full" (both directions), "tree" (ancestors).
        ancestors: with "tree": int64 [N_max] by forward row, or [S, M] by slot, or a DraftTree; M <= 64. Bit s is set where a row
            sees row s of its request, itself included; a row's depth is the number of its bits minus 1. The rows of a request
            with more than 64 rows (a piece of a prompt) are a chain.
        k_new, v_new: [N_max, Hkv, D] in q's dtype, keys and values of the rows themselves (an fp8 cache's scales do not
            apply to them); None = already in the cache, at layout.slot_mapping.
        scale: factor of the scores, default 1 / sqrt(D).
        softcap: cap; a score becomes cap * tanh(score / cap). None = off.
        sinks: [Hq] float, per head a logit that takes part in the softmax without a value.
        window: a row sees the last `window` keys, counted by depth, itself included; keys after a row stay visible. A NaN or inf
            among the values of a hidden context key may still reach a row if another row of the same request sees that key.
        return_lse: also ln of the sum of exponentials, sinks included, fp32 [N_max, Hq].
        batch_invariant: a request's bits depend on nothing else in the batch, nor on the sizes of batch and layout.
        plan: plan_attention(...) of this step, shared by all layers. None = the op makes one by a launch of its own before the
            attention, and allocates it.
        state_indices: int32 or int64 [R], slot of each request, -1 = padding request. A plan has the slots already; with a plan, only
            validate reads them (None: 0 to R - 1).
        out: [N_max, Hq, D], or with return_lse the pair. With plan, out and workspace nothing is allocated.
        validate: read lengths, page ids and ancestor words back and raise ValueError for impossible ones (waits for the GPU).
            Without it, a page id out of range, a slot of -1 or an ancestor bit beyond the request's rows hides that key.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or stride.
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    check_tensor("q", q, dtype=LOGIT_DTYPES, shape=("N_max", "Hq", "D"), last_contiguous=True)
    check_type("kv", kv, PagedKV)
    check_type("layout", layout, VerifyLayout)
    device, (rows, query_heads, head_dim) = q.device, q.shape
    requests = layout.draft_lens.shape[0]
    check_tensor("layout.token_ids", layout.token_ids, shape=(rows,), device=device)
    kv_heads = _check_heads(q, kv)
    check_choice("mask", mask, MASKS)
    words = _check_ancestors(ancestors, mask, rows, kv, device)
    _check_own(k_new, v_new, layout, q, kv_heads)
    check_window(window)
    _check_scores(scale, softcap)
    check_optional("sinks", sinks, dtype=LOGIT_DTYPES, shape=(query_heads,), device=device, contiguous=True)
    if plan is None or state_indices is not None:
        check_slots(state_indices, requests, kv, device)
    result, lse = _outputs(out, return_lse, q)
    if validate:
        if plan is not None and state_indices is None:
            raise ValueError("state_indices: expected those that plan was made with, to validate their slots, got None")
        _validate(layout, kv, words, state_indices, k_new is None)
    if rows == 0 or requests == 0:
        result.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
        return result if lse is None else (result, lse)
    if plan is None:
        plan = plan_attention(
            layout, kv, query_heads=query_heads, dtype=q.dtype, window=window, batch_invariant=batch_invariant,
            state_indices=state_indices,
        )  # fmt: skip
    else:
        _check_plan(plan, query_heads, kv, head_dim, q.element_size(), window, batch_invariant, rows, requests, device)
    lent = _lend(workspace, plan, requests, q, kv_heads, batch_invariant)
    arguments = Arguments(
        q=q,
        k_cache=kv.k_cache,
        v_cache=kv.v_cache,
        k_scale=kv.k_scale,
        v_scale=kv.v_scale,
        block_tables=kv.block_tables,
        slot_mapping=None if k_new is not None else layout.slot_mapping,
        k_new=k_new,
        v_new=v_new,
        ancestors=words,
        sinks=sinks,
        items=plan.items,
        counts=plan.counts,
        out=result,
        lse=lse,
        lent=lent,
        scale=1.0 / math.sqrt(head_dim) if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        window=window,
        full=mask == "full",
        block_m=plan.block_m,
        block_n=plan.block_n,
        programs=plan.programs,
        partial_rows=plan.partial_rows,
    )
    _tree_attention(arguments)
    return result if lse is None else (result, lse)


def _check_heads(q: Tensor, kv: PagedKV) -> int:
    """Queries against the cache; returns Hkv."""
    query_heads, head_dim = q.shape[1:]
    _, _, kv_heads, cached_dim = kv.k_cache.shape
    check_tensor("kv.k_cache", kv.k_cache, device=q.device)
    if query_heads == 0 or query_heads % kv_heads:
        raise ValueError(f"q: expected a multiple of {kv_heads} heads (those of kv.k_cache), got {query_heads}")
    if head_dim != cached_dim or not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected head size {cached_dim} (that of kv.k_cache), at most {MAX_HEAD_DIM}, got {head_dim}")
    if kv.k_cache.dtype not in (q.dtype, torch.float8_e4m3fn):
        raise TypeError(f"kv.k_cache: expected dtype {q.dtype} (that of q) or float8_e4m3fn, got {kv.k_cache.dtype}")
    return kv_heads


def _check_own(k_new: Tensor | None, v_new: Tensor | None, layout: VerifyLayout, q: Tensor, kv_heads: int) -> None:
    """Keys and values of the rows themselves: given, or in the cache."""
    if (k_new is None) != (v_new is None):
        raise ValueError(f"{'k_new' if k_new is None else 'v_new'}: expected both k_new and v_new or neither, got None")
    own: dict[str, Any] = dict(dtype=q.dtype, shape=(q.shape[0], kv_heads, q.shape[2]), device=q.device, last_contiguous=True)
    check_optional("k_new", k_new, **own)
    check_optional("v_new", v_new, **own)
    if k_new is None and layout.slot_mapping is None:
        raise ValueError("k_new: expected [N_max, Hkv, D] with a layout without slot_mapping, got None")


def _check_scores(scale: float | None, softcap: float | None) -> None:
    for name, number in (("scale", scale), ("softcap", softcap)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float))):
            raise TypeError(f"{name}: expected a number or None, got {type(number).__name__}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap: expected a finite number above 0, got {softcap}")


def _check_ancestors(
    ancestors: Tensor | DraftTree | None, mask: Mask, rows: int, kv: PagedKV, device: torch.device
) -> Tensor | None:
    """Ancestor words as a tensor [N_max] or [S, M]."""
    if (mask == "tree") != (ancestors is not None):
        expected = "int64 words or a DraftTree" if mask == "tree" else "None"
        raise ValueError(f"ancestors: expected {expected} with mask {mask!r}, got {type(ancestors).__name__}")
    if ancestors is None:
        return None
    words = ancestors.ancestors if isinstance(ancestors, DraftTree) else ancestors
    check_tensor("ancestors", words, dtype=torch.int64, device=device)
    if words.dim() == 2:
        check_tensor("ancestors", words, shape=(kv.block_tables.shape[0], "M"))
        if words.shape[1] > MAX_NODES:
            raise ValueError(f"ancestors: expected at most {MAX_NODES} nodes, got {words.shape[1]}")
    else:
        check_tensor("ancestors", words, shape=(rows,))
    return words


def _check_plan(
    plan: AttentionPlan,
    query_heads: int,
    kv: PagedKV,
    head_dim: int,
    element_size: int,
    window: int | None,
    batch_invariant: bool,
    rows: int,
    requests: int,
    device: torch.device,
) -> None:
    check_type("plan", plan, AttentionPlan)
    check_tensor("plan.items", plan.items, device=device)
    facts: dict[str, Any] = dict(
        query_heads=query_heads, kv_heads=kv.k_cache.shape[2], head_dim=head_dim, element_size=element_size, window=window,
        batch_invariant=bool(batch_invariant), **places(rows, requests, kv),
    )  # fmt: skip
    for name, fact in facts.items():
        if getattr(plan, name) != fact:
            raise ValueError(f"plan.{name}: expected {fact}, as this call has it, got {getattr(plan, name)}")


def _lend(
    workspace: workspaces.Workspace | None,
    plan: AttentionPlan,
    requests: int,
    q: Tensor,
    kv_heads: int,
    batch_invariant: bool,
) -> workspaces.Lent:
    """Memory of a launch with a plan."""
    rows, query_heads, head_dim = q.shape
    counter_words, scratch_words = words_needed(plan.items.shape[0], plan.partial_rows, kv_heads, head_dim)
    return workspaces.lend_words(
        workspace, counter_words, scratch_words, q.device,
        f"expected room for attention of {requests} requests and {rows} rows over {query_heads} query and {kv_heads} KV heads of "
        f"{head_dim}: Workspace(..., query_heads={query_heads}, kv_heads={kv_heads}, head_dim={head_dim}, max_rows={rows}, "
        f"batch_invariant={bool(batch_invariant)})",
    )  # fmt: skip


def _outputs(out: Tensor | tuple[Tensor, Tensor] | None, return_lse: bool, q: Tensor) -> tuple[Tensor, Tensor | None]:
    result: Tensor | tuple[Tensor, Tensor]
    lse: Tensor | None
    if out is None:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
        return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse
    if return_lse:
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            raise TypeError(f"out: expected a pair (out, lse) with return_lse, got {type(out).__name__}")
        result, lse = out
        check_tensor("out[1]", lse, dtype=torch.float32, shape=tuple(q.shape[:2]), device=q.device)
    else:
        result, lse = out, None
    name = "out[0]" if return_lse else "out"
    return check_tensor(name, result, dtype=q.dtype, shape=tuple(q.shape), device=q.device, last_contiguous=True), lse


def _validate(layout: VerifyLayout, kv: PagedKV, words: Tensor | None, state_indices: Tensor | None, from_cache: bool) -> None:
    """Read back what only the device knows, and raise ValueError for what a kernel would silently hide."""
    starts = layout.query_start_loc.tolist()
    requests = len(starts) - 1
    slots = range(requests) if state_indices is None else state_indices.tolist()
    lens = kv.context_lens.tolist()
    pages, page_size = kv.k_cache.shape[:2]
    for request, slot in enumerate(slots):
        count = starts[request + 1] - starts[request]
        if not 0 <= slot < len(lens) or count == 0:
            continue
        most = kv.block_tables.shape[1] * page_size
        if not 0 <= lens[slot] <= most:
            raise ValueError(f"kv.context_lens: expected 0 to {most} (pages of a block table) for slot {slot}, got {lens[slot]}")
        table = kv.block_tables[slot, : -(-lens[slot] // page_size)]
        wrong = table[(table < 0) | (table >= pages)].tolist()
        if wrong:
            raise ValueError(f"kv.block_tables: expected page ids from 0 to {pages - 1} for slot {slot}, got {wrong[0]}")
        if from_cache and layout.slot_mapping is not None:
            at = layout.slot_mapping[starts[request] : starts[request + 1]]
            wrong = at[(at < 0) | (at >= pages * page_size)].tolist()
            if wrong:
                most = pages * page_size - 1
                raise ValueError(f"layout.slot_mapping: expected 0 to {most} for request {request}, got {wrong[0]}")
        if words is None or count > MAX_NODES:
            continue
        if words.dim() == 2 and count > words.shape[1]:
            raise ValueError(f"ancestors: expected a word for each of the {count} rows of request {request}, got {words.shape[1]}")
        own = words[slot, :count] if words.dim() == 2 else words[starts[request] : starts[request + 1]]
        for node, word in enumerate(own.tolist()):
            word &= (1 << 64) - 1
            if not word >> node & 1 or word >> (node + 1):
                what = "to name the node itself" if not word >> node & 1 else "not to name later slots"
                raise ValueError(f"ancestors: expected word {node} of request {request} {what}, got {word:#x}")


class Arguments(NamedTuple):
    """`tree_attention` as torch.library knows it."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    block_tables: Tensor
    slot_mapping: Tensor | None
    k_new: Tensor | None
    v_new: Tensor | None
    ancestors: Tensor | None
    sinks: Tensor | None
    items: Tensor
    counts: Tensor
    out: Out[Tensor]
    lse: Out[Tensor | None]
    lent: workspaces.Lent
    scale: float
    softcap: float | None
    window: int | None
    full: bool
    block_m: int
    block_n: int
    programs: int
    partial_rows: int


@library.register("tree_attention", Arguments)
def _tree_attention(a: Arguments) -> None:
    device = a.q.device
    kernels = library.kernels("attention.tree", device)
    rows, query_heads, head_dim = a.q.shape
    pages, page_size, kv_heads, _ = a.k_cache.shape
    max_items, k_cache, v_cache = a.items.shape[0], a.k_cache, a.v_cache
    config = attention_launch.pick(arch.current(device), a.block_m, head_dim, a.q.element_size(), k_cache.element_size(), kv_heads)
    widening = "as_stored"
    if k_cache.dtype == torch.float8_e4m3fn:
        # As bytes: not every GPU's compiler takes pointers to e4m3.
        widening = "fp8_by_cast" if config.native_fp8 else "fp8_by_bits"
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    arrivals = counters_of(workspaces.Carver(a.lent.counters, workspaces.RESERVED).take, max_items, kv_heads)
    scratch = scratch_of(workspaces.Carver(a.lent.scratch).take, a.partial_rows, kv_heads, head_dim)

    def stride(tensor: Tensor | None, dim: int) -> int:
        return 0 if tensor is None else tensor.stride(dim)

    def per_head(scale: Tensor | None) -> int:
        return 0 if scale is None or scale.shape[0] == 1 else scale.stride(0)

    by_slot = a.ancestors if a.ancestors is not None and a.ancestors.dim() == 2 else None
    kernels.launch_tree_attention(
        min(a.programs, max_items * kv_heads),
        (
            AttentionInputs(
                q_ptr=a.q, k_ptr=k_cache, v_ptr=v_cache, k_scale_ptr=a.k_scale, v_scale_ptr=a.v_scale,
                block_tables_ptr=a.block_tables, slot_mapping_ptr=a.slot_mapping, k_new_ptr=a.k_new, v_new_ptr=a.v_new,
                ancestors_ptr=a.ancestors, sinks_ptr=a.sinks,
            ),
            WorkTable(items_ptr=a.items, counts_ptr=a.counts), AttentionResults(out_ptr=a.out, lse_ptr=a.lse),
            scratch._replace(arrivals_ptr=arrivals),
            rows, pages, max_items, a.scale, a.softcap, a.window, MAX_NODES if by_slot is None else by_slot.shape[1],
            CacheStrides(
                q_row=a.q.stride(0), q_head=a.q.stride(1), k_page=k_cache.stride(0), k_slot=k_cache.stride(1),
                k_head=k_cache.stride(2), v_page=v_cache.stride(0), v_slot=v_cache.stride(1), v_head=v_cache.stride(2),
                k_scale=per_head(a.k_scale), v_scale=per_head(a.v_scale),
            ),
            a.block_tables.stride(0),
            NewStrides(k_row=stride(a.k_new, 0), k_head=stride(a.k_new, 1), v_row=stride(a.v_new, 0), v_head=stride(a.v_new, 1)),
            stride(by_slot, 0),
            RowStrides(
                ancestors_row=stride(a.ancestors, 0) if by_slot is None else 0, ancestors_index=stride(a.ancestors, -1),
                out_row=a.out.stride(0), out_head=a.out.stride(1), lse_row=stride(a.lse, 0), lse_head=stride(a.lse, 1),
            ),
        ),
        widening=widening,
        constants=dict(
            FULL=a.full,
            KV_HEADS=kv_heads,
            GROUP=query_heads // kv_heads,
            D=head_dim,
            HEAD=attention_launch.head_tile(head_dim),
            PAGE_SIZE=page_size,
            BLOCK_M=a.block_m,
            BLOCK_N=a.block_n,
        ),
        config=config,
    )  # fmt: skip
