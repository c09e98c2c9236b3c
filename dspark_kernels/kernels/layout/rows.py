"""The packed rows of a forward pass from a length per request: what every layout writes, and how requests are read.

A request's rows are its anchor row, then its drafts (or the rows of a prompt, ids left to the engine). Every program scans the
lengths of the whole batch, a few kilobytes, and writes its own tile of rows, so that no program waits for another. Symbols: R
requests, K drafts, N rows allocated, S request slots.
"""

import triton
import triton.language as tl

from ..primitives.constants import BAD_TOKEN_ID
from ..primitives.packing import gather_fields, owners_of
from ..primitives.slots import state_slots


@triton.jit
def read_requests(r, inputs, strides, num_requests, num_slots, num_rows):
    """Per request [REQUESTS]: request slots (-1 = padding), prompt rows, whether it emits, where its anchor stands int64, and the
    flag of its anchor.

    inputs: LayoutInputs. A prompt longer than all rows there are counts as one row longer, which is as much too long.
    """
    # Per request, not per slot: these loads need not wait for the slots.
    batch = r < num_requests
    prompt = tl.zeros(r.shape, tl.int32)
    if inputs.prefill_ptr is not None:
        prompt = tl.load(inputs.prefill_ptr + r, mask=batch, other=0)
    emits = batch
    if inputs.emits_ptr is not None:
        emits = tl.load(inputs.emits_ptr + r, mask=batch, other=0)
    slots = state_slots(inputs.slots_ptr, r, num_requests, num_slots)
    live = slots >= 0
    anchor = tl.load(inputs.anchors_ptr + slots * strides.anchors, mask=live, other=0).to(tl.int64)
    position = tl.load(inputs.positions_ptr + slots * strides.positions, mask=live, other=0).to(tl.int64)
    if inputs.prefill_ptr is not None:
        prompt = tl.where(live, tl.minimum(tl.maximum(prompt, 0), num_rows + 1).to(tl.int32), 0)
    emits = live & (emits.to(tl.int32) != 0)
    flags = tl.where((anchor < 0) & (prompt == 0), BAD_TOKEN_ID, 0)
    return slots, prompt, emits, position, flags


@triton.jit
def of_draft(array_ptr, slots, k, num_drafts, stride_s):
    """[REQUESTS]: what an array [S, K] holds of draft k, or beyond the last draft of that one: a condition per load would have them
    wait for one another."""
    here = tl.where(num_drafts > 0, slots, -1)
    return tl.load(array_ptr + here * stride_s + tl.minimum(k, num_drafts - 1), mask=here >= 0, other=0)


@triton.jit
def of_drafts(array_ptr, slots, num_drafts, stride_s, DRAFTS: tl.constexpr):
    """The same of every draft."""
    loaded = ()
    for k in tl.static_range(DRAFTS):
        loaded += (of_draft(array_ptr, slots, k, num_drafts, stride_s),)
    return loaded


@triton.jit
def first_missing(tokens, slots, num_drafts, DRAFTS: tl.constexpr):
    """How many drafts come before the first below 0, which was never made: nothing from there on can be verified."""
    made = tl.where(slots >= 0, num_drafts, 0)
    for back in tl.static_range(DRAFTS):
        made = tl.where(tokens[DRAFTS - 1 - back] < 0, DRAFTS - 1 - back, made)
    return made


@triton.jit
def made_drafts(drafts_ptr, slots, num_drafts, stride_ds):
    """The same without registers for every draft."""
    made = tl.where(slots >= 0, num_drafts, 0)
    for back in range(num_drafts):
        k = num_drafts - 1 - back
        made = tl.where(of_draft(drafts_ptr, slots, k, num_drafts, stride_ds) < 0, k, made)
    return made


@triton.jit
def fixed_rows(slots, prompt):
    """Rows that a request brings whatever is drafted: its anchor's, or its prompt's."""
    return tl.where(slots >= 0, tl.maximum(prompt, 1), 0)


@triton.jit
def fitting_lens(lens, slots, prompt, num_rows):
    """Lengths cut to the rows there are: anchor and prompt rows come first, drafts share what is left in the order of requests."""
    left = tl.maximum(num_rows - tl.sum(fixed_rows(slots, prompt).to(tl.int64), axis=0), 0).to(tl.int32)
    before = tl.cumsum(lens, axis=0) - lens
    return tl.minimum(lens, tl.maximum(left - before, 0))


@triton.jit
def write_rows(
    slots, prompt, emits, anchor_position, lens, flags,  # [REQUESTS]; lens: as `fitting_lens` gives them
    anchors,  # AnchorRows
    drafts,  # Drafts; without, every draft is `filler`
    depths,  # Depths
    pages,  # BlockTables
    out,  # LayoutOutputs
    num_requests, num_rows, num_drafts, filler, silent_rows,
    PROMPTS: tl.constexpr, REQUESTS: tl.constexpr, LOG_REQUESTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write this program's BLOCK rows, and program 0 what is per request. silent_rows: first rows of a decoding request that
    give no logits (1 where the anchor's row predicts nothing). PROMPTS: some requests may have prompt rows."""
    r = tl.arange(0, REQUESTS)
    batch = r < num_requests
    emitting = (slots >= 0) & emits
    rows = fixed_rows(slots, prompt) + lens
    logits = tl.where(emitting, tl.maximum(lens + 1 - silent_rows, 0), 0)
    if PROMPTS:
        wanted = tl.cumsum(rows.to(tl.int64), axis=0)
        end = tl.minimum(wanted, num_rows).to(tl.int32)
        start = tl.minimum(wanted - rows, num_rows).to(tl.int32)
        logits = tl.where(prompt > 0, emitting.to(tl.int32), logits)
        logits = tl.where(end - start == rows, logits, 0)
        logits_end = tl.cumsum(logits, axis=0)
    else:  # nothing is cut, and one scan does for both
        both = tl.cumsum((rows.to(tl.int64) << 32) | logits, axis=0)
        end = (both >> 32).to(tl.int32)
        start = end - rows
        logits_end = both.to(tl.int32)

    if tl.program_id(0) == 0:
        tl.store(out.draft_lens_ptr + r, lens, mask=batch)
        tl.store(out.query_start_ptr + r + 1, end, mask=batch)
        tl.store(out.cu_logits_ptr + r + 1, logits_end, mask=batch)
        tl.store(out.flags_ptr + r, flags, mask=batch)
        tl.store(out.query_start_ptr, 0)
        tl.store(out.cu_logits_ptr, 0)
        tl.store(out.num_rows_ptr + r * 0, end, mask=r == num_requests - 1)

    # Row n belongs to the request whose [start, end) holds it; logit row n is one of the last rows of its request.
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < num_rows
    owner, logit_owner = owners_of(
        tl.where(batch, end, 2147483647), tl.where(batch, logits_end, 2147483647), n, REQUESTS, LOG_REQUESTS, BLOCK
    )
    # One exchange for all that is asked of a request.
    slot, start, end, prompt, low, high, logits_row_end, logits_end = gather_fields(
        (
            slots.to(tl.int32),
            start,
            end,
            prompt,
            anchor_position.to(tl.int32),
            (anchor_position >> 32).to(tl.int32),
            end,
            logits_end,
        ),
        (owner, owner, owner, owner, owner, owner, logit_owner, logit_owner),
    )
    slot = slot.to(tl.int64)
    used = n < end
    owner = tl.where(used, owner, 0)
    offset = n - start
    is_prompt = prompt > 0
    anchor_position = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    position = anchor_position + offset
    # All loads, then what depends on them.
    if out.slot_mapping_ptr is not None:
        # By row, not by depth: siblings of a tree share a position, and each needs a slot of its own.
        page = position // pages.page_size
        in_page = position - page * pages.page_size
        mapped = used & (position >= 0) & (page < pages.max_pages)
        base = tl.load(pages.ptr + slot * pages.stride + page, mask=mapped, other=0).to(tl.int64)
    token = tl.load(anchors.ptr + slot * anchors.stride, mask=used, other=0).to(tl.int64)
    if drafts.ptr is not None:
        is_draft = used & (offset > 0) & (offset <= num_drafts)
        draft = tl.load(drafts.ptr + slot * drafts.stride + offset - 1, mask=is_draft, other=0)
        token = tl.where(offset == 0, token, draft)
    else:
        token = tl.where(offset == 0, token, filler)
    token = tl.where(used & (is_prompt == 0), tl.maximum(token, 0), 0)
    if depths.ptr is not None:
        depth = tl.load(depths.ptr + slot * depths.stride + offset, mask=used & (is_prompt == 0), other=0)
        position = tl.where(is_prompt, position, anchor_position + depth)
    tl.store(out.token_ids_ptr + n, token, mask=inside)
    tl.store(out.positions_ptr + n, tl.where(used, position, 0), mask=inside)
    tl.store(out.batch_indices_ptr + n, tl.where(used, owner, -1), mask=inside)
    if out.slot_mapping_ptr is not None:
        tl.store(out.slot_mapping_ptr + n, tl.where(mapped & (base >= 0), base * pages.page_size + in_page, -1), mask=inside)
    behind = logits_end - n  # 1 for the request's last row, below 1 for no request's
    tl.store(out.logits_indices_ptr + n, tl.where(behind > 0, logits_row_end - behind, 0), mask=inside)
