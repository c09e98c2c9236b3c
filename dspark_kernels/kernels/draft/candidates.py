"""Sparse draft block: K positions drafted left to right, each on the C best of its base logits, in one launch without a barrier.

x_k = argmax over v in S_k of logits_k(v) (greedy) or of logits_k(v) / T - ln E_k(v) (sampled), logits_k = round(base_k +
bias(x_{k-1})), S_k = the C ids of the largest base_k (ties: lowest ids) and the B ids listed for x_{k-1}. Symbols: R requests, K
positions, V vocabulary, C candidates, r rank, H hidden size, S request slots, U sub-blocks of GROUP ids. Reference:
reference/candidates.py. Source: DSpark, arXiv 2607.05147.

Three steps, each begun by the last to arrive from the one before. A part of a row: the key of the largest logit of each sub-block,
one pass over the logits. A row: its C largest sub-blocks hold its C largest logits (each has one at least as large as any other
sub-block), so C * GROUP logits are read again and the C largest kept. A request: the walk over its positions, on the rows of W2
that its candidates need, which are fetched a position ahead. What a head multiplies with hidden states is done by programs of its
own, for all positions, before the walk.
"""

import triton
import triton.language as tl

from ..primitives.options import options_of
from ..primitives.sync import arrive
from .args import RowSettings, WalkSizes
from .candidate_heads import (
    awaited,
    hidden_score,
    latent_item,
    latent_items_of,
    latent_programs as latent_programs,
)
from .candidate_walk import walk, walk_options
from .selection import (
    finish_part,
    prefetch_best,
    selection_tile,
    slot_of,
    sweep_part,
)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_drafts", "first_draft", "column"])
def draft_candidates_kernel(
    # Records of kernels/draft/args.py and kernels/args.py, by their fields' order.
    base,  # BaseLogits
    state,  # RequestState
    successors,  # Successors or None
    adjust,  # Adjustments or None
    filters,  # FilterSettings or None
    head,  # Head or None
    latent,  # Latent of a gated or rnn head, or None
    hidden,  # Hidden or None
    confidence,  # Confidence or None
    out,  # SparseOutputs
    selection,  # Selection
    scratch,  # WalkScratch
    num_requests, num_slots, num_drafts,
    widths,  # CandidateWidths
    first_draft, column,
    TILE: tl.constexpr,  # SelectionTile
    OPTIONS: tl.constexpr,  # WalkOptions
):  # fmt: skip
    num_rows = num_requests * num_drafts
    program = tl.program_id(0)
    latent_items = latent_items_of(latent, num_rows)
    parts = (tl.num_programs(0) - latent_items) // num_rows
    item = program - latent_items
    row = (item // parts).to(tl.int64)
    # Requests that this program arrives at when its part is done, and how many of them.
    first = tl.zeros((), tl.int32)
    count = tl.zeros((), tl.int32)
    if program < latent_items:
        if latent is not None:
            first, count = latent_item(
                program, state.slots_ptr, latent, hidden, scratch.products_ptr, num_requests, num_slots, num_drafts, OPTIONS.BLOCK_J
            )
    else:
        part = item % parts
        request = item // parts // num_drafts
        k = item // parts % num_drafts
        slot = slot_of(state.slots_ptr, request, num_requests, num_slots)
        if slot >= 0:
            row_ptr = base.ptr + request.to(tl.int64) * base.stride_request + k.to(tl.int64) * base.stride_position
            settings = RowSettings(widths.map_ptr, widths.num_targets, adjust, slot, slot * num_drafts + k)
            sweep_part(row, part, parts, row_ptr, settings, None, 1.0, selection, scratch.status_ptr + request, widths.vocab, TILE)
            if confidence is not None:
                if part == 0:
                    tl.store(scratch.score_ptr + row, hidden_score(request, k, hidden, confidence.weight_ptr))
            if finish_part(row, parts, row_ptr, settings, selection, widths.vocab, widths.num_candidates, TILE):
                first = request
                count = tl.full((), 1, tl.int32)
        else:
            if (k == 0) & (part == 0):
                tl.store(out.flags_ptr + request, 0)

    sizes = WalkSizes(num_drafts, first_draft, column)
    if latent is None:
        # One request at most: what a loop would prepare ahead of itself takes registers from the walk.
        if count > 0:
            if arrive(scratch.arrivals_ptr + first, num_drafts):
                slot = slot_of(state.slots_ptr, first, num_requests, num_slots)
                walk(
                    first, slot, scratch.status_ptr, base, state, successors, None, adjust, filters, head, latent,
                    hidden, confidence, out, selection, scratch, widths, sizes, OPTIONS,
                )  # fmt: skip
            elif head is not None:
                prefetch_best(row, head, widths.map_ptr, selection, num_rows, widths.vocab, widths.num_candidates, TILE)
    else:
        for request in range(first, first + count):
            slot = slot_of(state.slots_ptr, request, num_requests, num_slots)
            if slot >= 0:
                if arrive(scratch.arrivals_ptr + request, awaited(request, latent, num_drafts)):
                    walk(
                        request, slot, scratch.status_ptr, base, state, successors, None, adjust, filters, head, latent,
                        hidden, confidence, out, selection, scratch, widths, sizes, OPTIONS,
                    )  # fmt: skip
                elif program >= latent_items:
                    prefetch_best(row, head, widths.map_ptr, selection, num_rows, widths.vocab, widths.num_candidates, TILE)


def launch_draft_candidates(programs, args, *, kind, coupled, with_markov, joint, shift, rank, config):
    """Launch one program per part: the products of gated and rnn heads first, then a chunk of a row each."""
    draft_candidates_kernel[(programs,)](
        *args,
        TILE=selection_tile(config, shift),
        OPTIONS=walk_options(kind, coupled, with_markov, joint, shift, rank, config),
        **options_of(config),
    )
