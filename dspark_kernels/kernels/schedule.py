"""Packed rows of the target's forward pass from draft lengths, in one launch.

A request's rows are its anchor row, then its admitted drafts; row j of a request sits at anchor position + j. Every program scans
the lengths of the whole batch (a few kilobytes) and writes its own tile of rows, so that no program waits for another. Symbols: R
requests, K drafts, N rows allocated, S state slots. Oracle: reference/schedule.py.
"""

import triton
import triton.language as tl

from .primitives.slots import state_slots

BAD_TOKEN_ID = tl.constexpr(4)
MISSING_DRAFT = tl.constexpr(8)


@triton.jit
def _owner(ends, n, REQUESTS: tl.constexpr, LOG_REQUESTS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the sorted `ends` [REQUESTS] are at or before n [BLOCK], at most REQUESTS - 1: by bisection."""
    found = tl.zeros([BLOCK], tl.int32)
    for halving in tl.static_range(LOG_REQUESTS):
        last = found + ((REQUESTS >> (halving + 1)) - 1)
        found = tl.where(tl.gather(ends, last, axis=0) <= n, last + 1, found)
    return found


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "max_pages"])
def fixed_layout_kernel(
    lens_ptr,  # [R]
    drafts_ptr,  # [S, K]
    anchors_ptr, anchor_positions_ptr,  # [S]
    prefill_ptr, emits_ptr,  # [R] or None
    block_tables_ptr,  # [S, max_pages] or None
    slots_ptr,  # [R] or None
    draft_lens_ptr,  # [R]
    query_start_ptr, cu_logits_ptr,  # [R+1]
    token_ids_ptr, positions_ptr, batch_indices_ptr, slot_mapping_ptr,  # [N]; slot_mapping None without block tables
    logits_indices_ptr,  # [N]
    num_rows_ptr,  # [1]
    flags_ptr,  # [R]
    num_requests, num_slots, num_rows, num_drafts, max_pages, page_size,
    stride_ds, stride_a, stride_p, stride_bs,
    REQUESTS: tl.constexpr, LOG_REQUESTS: tl.constexpr, DRAFTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, REQUESTS)
    batch = r < num_requests
    slots = state_slots(slots_ptr, r, num_requests, num_slots)
    live = batch & (slots >= 0)

    # A draft of -1 was never made: nothing from there on can be verified.
    lens = tl.minimum(tl.maximum(tl.load(lens_ptr + r, mask=live, other=0).to(tl.int32), 0), num_drafts)
    k = tl.arange(0, DRAFTS)
    ids = tl.load(drafts_ptr + slots[:, None] * stride_ds + k[None, :], mask=live[:, None] & (k < num_drafts)[None, :], other=0)
    made = tl.min(tl.where((ids < 0) & (k < num_drafts)[None, :], k[None, :], num_drafts), axis=1)
    anchor = tl.load(anchors_ptr + slots * stride_a, mask=live, other=0).to(tl.int64)
    prompt = tl.zeros([REQUESTS], tl.int32)
    if prefill_ptr is not None:
        prompt = tl.maximum(tl.load(prefill_ptr + r, mask=live, other=0).to(tl.int32), 0)
    emits = live
    if emits_ptr is not None:
        emits = tl.load(emits_ptr + r, mask=live, other=0).to(tl.int32) != 0
    lens = tl.where((prompt > 0) | (emits == 0), 0, lens)
    flags = tl.where(lens > made, MISSING_DRAFT, 0) | tl.where((anchor < 0) & (prompt == 0), BAD_TOKEN_ID, 0)
    lens = tl.minimum(lens, made)

    # Anchor and prompt rows come first; drafts share what is left, in the order of requests.
    own = tl.where(live, tl.maximum(prompt, 1), 0)
    left = tl.maximum(num_rows - tl.sum(own, axis=0), 0)
    before = tl.cumsum(lens, axis=0) - lens
    lens = tl.minimum(lens, tl.maximum(left - before, 0))
    rows = own + lens
    end = tl.minimum(tl.cumsum(rows, axis=0), num_rows)
    start = tl.minimum(tl.cumsum(rows, axis=0) - rows, num_rows)
    logits = tl.where(live & emits & (end - start == rows), lens + 1, 0)
    logits_end = tl.cumsum(logits, axis=0)
    total = tl.max(end, axis=0)

    if tl.program_id(0) == 0:
        tl.store(draft_lens_ptr + r, lens, mask=batch)
        tl.store(query_start_ptr + r + 1, end, mask=batch)
        tl.store(cu_logits_ptr + r + 1, logits_end, mask=batch)
        tl.store(flags_ptr + r, flags, mask=batch)
        tl.store(query_start_ptr, 0)
        tl.store(cu_logits_ptr, 0)
        tl.store(num_rows_ptr, total)

    # Row n belongs to the request whose [start, end) holds it.
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < num_rows
    used = n < total
    owner = _owner(tl.where(batch, end, 2147483647), n, REQUESTS, LOG_REQUESTS, BLOCK)
    owner = tl.where(used, owner, 0)
    slot = tl.gather(slots, owner, axis=0)
    offset = n - tl.gather(start, owner, axis=0)
    is_prompt = tl.gather(prompt, owner, axis=0) > 0
    first = tl.load(anchors_ptr + slot * stride_a, mask=used, other=0).to(tl.int64)
    draft = tl.load(drafts_ptr + slot * stride_ds + offset - 1, mask=used & (offset > 0) & (offset <= num_drafts), other=0)
    token = tl.where(offset == 0, first, draft)
    token = tl.where(used & (is_prompt == 0), tl.maximum(token, 0), 0)
    position = tl.load(anchor_positions_ptr + slot * stride_p, mask=used, other=0).to(tl.int64) + offset
    position = tl.where(used, position, 0)
    tl.store(token_ids_ptr + n, token, mask=inside)
    tl.store(positions_ptr + n, position, mask=inside)
    tl.store(batch_indices_ptr + n, tl.where(used, owner, -1), mask=inside)
    if slot_mapping_ptr is not None:
        page = position // page_size
        mapped = used & (position >= 0) & (page < max_pages)
        base = tl.load(block_tables_ptr + slot * stride_bs + page, mask=mapped, other=0).to(tl.int64)
        tl.store(slot_mapping_ptr + n, tl.where(mapped & (base >= 0), base * page_size + position % page_size, -1), mask=inside)

    # Logit row m: the last rows of its request, one per draft and one for the bonus.
    logit_owner = _owner(tl.where(batch, logits_end, 2147483647), n, REQUESTS, LOG_REQUESTS, BLOCK)
    has_logits = n < tl.max(logits_end, axis=0)
    behind = tl.gather(logits_end, logit_owner, axis=0) - n  # 1 for the request's last row
    row = tl.gather(end, logit_owner, axis=0) - behind
    tl.store(logits_indices_ptr + n, tl.where(has_logits, row, 0), mask=inside)


def launch_fixed_layout(programs, args, *, log_requests, drafts, block, num_warps):
    """Launch one program per `block` rows."""
    fixed_layout_kernel[(programs,)](
        *args,
        REQUESTS=1 << log_requests,
        LOG_REQUESTS=log_requests,
        DRAFTS=drafts,
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
