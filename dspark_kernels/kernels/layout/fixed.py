"""Packed rows of a forward pass for lengths chosen elsewhere, for trees, and for the drafter's own block, one launch each.

The rows themselves: layout/rows.py. Symbols: R requests, K drafts, M tree nodes, N rows allocated, S request slots. Reference:
reference/layout.py.
"""

import triton
import triton.language as tl

from ..primitives.constants import MISSING_DRAFT
from ..primitives.options import options_of
from .args import AnchorRows, BlockTables, Depths, Drafts
from .rows import first_missing, fitting_lens, of_drafts, read_requests, write_rows


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "max_pages"])
def fixed_layout_kernel(
    lens_ptr,  # [R]; of a tree num_nodes [S]
    drafts_ptr,  # [S, K]
    depths_ptr,  # [S, K+1] or None
    inputs,  # LayoutInputs
    out,  # LayoutOutputs
    num_requests, num_slots, num_rows, num_drafts, max_pages, page_size,
    strides,  # FixedStrides
    REQUESTS: tl.constexpr, LOG_REQUESTS: tl.constexpr, DRAFTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, REQUESTS)
    slots, prompt, emits, anchor_position, flags = read_requests(r, inputs, strides, num_requests, num_slots, num_rows)
    live = slots >= 0
    if depths_ptr is None:
        lens = tl.load(lens_ptr + r, mask=live, other=0)
    else:
        lens = tl.load(lens_ptr + slots, mask=live, other=1) - 1  # node 0 is the anchor
    lens = tl.minimum(tl.maximum(lens, 0), num_drafts).to(tl.int32)
    lens = tl.where((prompt > 0) | (emits == 0), 0, lens)
    tokens = of_drafts(drafts_ptr, slots, num_drafts, strides.drafts, DRAFTS)
    made = first_missing(tokens, slots, num_drafts, DRAFTS)
    flags |= tl.where(lens > made, MISSING_DRAFT, 0)
    write_rows(
        slots, prompt, emits, anchor_position, fitting_lens(tl.minimum(lens, made), slots, prompt, num_rows), flags,
        AnchorRows(inputs.anchors_ptr, strides.anchors),
        Drafts(drafts_ptr, strides.drafts),
        Depths(depths_ptr, strides.depths),
        BlockTables(inputs.block_tables_ptr, strides.block_tables, max_pages, page_size),
        out, num_requests, num_rows, num_drafts, 0, 0, inputs.prefill_ptr is not None, REQUESTS, LOG_REQUESTS, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "max_pages", "mask_token"])
def draft_layout_kernel(
    inputs,  # LayoutInputs
    out,  # LayoutOutputs
    num_requests, num_slots, num_rows, num_masks, max_pages, page_size, mask_token, silent_rows,
    strides,  # DraftLayoutStrides
    REQUESTS: tl.constexpr, LOG_REQUESTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, REQUESTS)
    slots, prompt, emits, anchor_position, flags = read_requests(r, inputs, strides, num_requests, num_slots, num_rows)
    write_rows(
        slots, prompt, emits, anchor_position, fitting_lens(tl.where(slots >= 0, num_masks, 0), slots, prompt, num_rows), flags,
        AnchorRows(inputs.anchors_ptr, strides.anchors),
        Drafts(None, 0),
        Depths(None, 0),
        BlockTables(inputs.block_tables_ptr, strides.block_tables, max_pages, page_size),
        out, num_requests, num_rows, num_masks, mask_token, silent_rows, inputs.prefill_ptr is not None, REQUESTS, LOG_REQUESTS, BLOCK,
    )  # fmt: skip


def launch_fixed_layout(programs, args, *, log_requests, drafts, config):
    """Launch one program per `block` rows."""
    fixed_layout_kernel[(programs,)](
        *args,
        REQUESTS=1 << log_requests,
        LOG_REQUESTS=log_requests,
        DRAFTS=drafts,
        BLOCK=config.block,
        **options_of(config),
    )


def launch_draft_layout(programs, args, *, log_requests, config):
    """Launch one program per `block` rows."""
    draft_layout_kernel[(programs,)](
        *args,
        REQUESTS=1 << log_requests,
        LOG_REQUESTS=log_requests,
        BLOCK=config.block,
        **options_of(config),
    )
