"""Packed rows of a forward pass for lengths chosen elsewhere, for trees, and for the drafter's own block, one launch each.

The rows themselves: layout/rows.py. Symbols: R requests, K drafts, M tree nodes, N rows allocated, S state slots. Oracle:
reference/layout.py.
"""

import triton
import triton.language as tl

from .rows import MISSING_DRAFT, made_drafts, read_requests, write_rows


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "max_pages"])
def fixed_layout_kernel(
    lens_ptr,  # [R]; of a tree num_nodes [S]
    drafts_ptr,  # [S, K]
    depths_ptr,  # [S, K+1] or None
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
    stride_ds, stride_ts, stride_a, stride_p, stride_bs,
    REQUESTS: tl.constexpr, LOG_REQUESTS: tl.constexpr, DRAFTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, REQUESTS)
    slots, prompt, emits, flags = read_requests(
        r, slots_ptr, anchors_ptr, prefill_ptr, emits_ptr, num_requests, num_slots, num_rows, stride_a
    )
    live = slots >= 0
    if depths_ptr is None:
        lens = tl.load(lens_ptr + r, mask=live, other=0)
    else:
        lens = tl.load(lens_ptr + slots, mask=live, other=1) - 1  # node 0 is the anchor
    lens = tl.minimum(tl.maximum(lens, 0), num_drafts).to(tl.int32)
    lens = tl.where((prompt > 0) | (emits == 0), 0, lens)
    made = made_drafts(drafts_ptr, slots, num_drafts, stride_ds, DRAFTS)
    flags |= tl.where(lens > made, MISSING_DRAFT, 0)
    write_rows(
        r, slots, prompt, emits, tl.minimum(lens, made), flags, anchors_ptr, anchor_positions_ptr, drafts_ptr, depths_ptr,
        block_tables_ptr, draft_lens_ptr, query_start_ptr, cu_logits_ptr, token_ids_ptr, positions_ptr, batch_indices_ptr,
        slot_mapping_ptr, logits_indices_ptr, num_rows_ptr, flags_ptr, num_requests, num_rows, num_drafts, max_pages, page_size,
        0, 0, stride_a, stride_p, stride_ds, stride_ts, stride_bs, REQUESTS, LOG_REQUESTS, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "max_pages", "mask_token"])
def draft_layout_kernel(
    anchors_ptr, anchor_positions_ptr,  # [S]
    block_tables_ptr,  # [S, max_pages] or None
    slots_ptr,  # [R] or None
    draft_lens_ptr,  # [R]
    query_start_ptr, cu_logits_ptr,  # [R+1]
    token_ids_ptr, positions_ptr, batch_indices_ptr, slot_mapping_ptr,  # [N]; slot_mapping None without block tables
    logits_indices_ptr,  # [N]
    num_rows_ptr,  # [1]
    flags_ptr,  # [R]
    num_requests, num_slots, num_rows, num_masks, max_pages, page_size, mask_token, silent_rows,
    stride_a, stride_p, stride_bs,
    REQUESTS: tl.constexpr, LOG_REQUESTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, REQUESTS)
    slots, prompt, emits, flags = read_requests(r, slots_ptr, anchors_ptr, None, None, num_requests, num_slots, num_rows, stride_a)
    write_rows(
        r, slots, prompt, emits, tl.where(slots >= 0, num_masks, 0), flags, anchors_ptr, anchor_positions_ptr, None, None,
        block_tables_ptr, draft_lens_ptr, query_start_ptr, cu_logits_ptr, token_ids_ptr, positions_ptr, batch_indices_ptr,
        slot_mapping_ptr, logits_indices_ptr, num_rows_ptr, flags_ptr, num_requests, num_rows, num_masks, max_pages, page_size,
        mask_token, silent_rows, stride_a, stride_p, 0, 0, stride_bs, REQUESTS, LOG_REQUESTS, BLOCK,
    )  # fmt: skip


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


def launch_draft_layout(programs, args, *, log_requests, block, num_warps):
    """Launch one program per `block` rows."""
    draft_layout_kernel[(programs,)](
        *args,
        REQUESTS=1 << log_requests,
        LOG_REQUESTS=log_requests,
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
