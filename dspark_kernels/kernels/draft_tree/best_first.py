"""Draft trees of the most probable paths on the C best of each position's base logits, in one launch without a barrier.

    survival(child) = survival(node) c(node) q(child | node),  q = softmax over the C best of (base + bias(node's token)) / T

Without a head q is the same after every node of a depth, and may be that of the whole vocabulary: of its children M - 1 are enough
then. Symbols: R requests, K positions, V vocabulary, C candidates, M nodes, r rank, H hidden size, S request slots, U sub-blocks of
GROUP ids, block = 1024 ids. Reference: reference/tree_draft.py. Source: DSpark, arXiv 2607.05147.

As in candidates.py: a part of a row keeps the key of the largest logit of each sub-block, the last part of a row keeps its C best,
and the last row of a request grows the tree, a depth at a time: all its nodes of the depth get their children in one product, and
the best nodes stay (nodes.py). That takes K steps, where a best-first search takes one per node.
"""

import triton
import triton.language as tl

from ..draft.args import RowSettings
from ..draft.candidate_heads import awaited, hidden_score, latent_item, latent_programs
from ..draft.selection import best_ids, finish_part, prefetch_best, selection_tile, slot_of, sweep_part
from ..primitives.constants import BAD_TOKEN_ID, NAN, NEG_INF, NODE_FIELDS, NONFINITE_ROW, POS_INF, SUMEXP_ONE, VOCAB_BLOCK
from ..primitives.options import options_of
from ..primitives.sumexp import below_max, numbers
from ..primitives.sync import arrive
from ..primitives.vocab_blocks import SAW_FINITE, merge_blocks
from .args import BlockSums, PathScratch, PathSizes, PathTile
from .heads import advance_gated_nodes, advance_rnn_nodes, latents_of, node_bias
from .nodes import (
    DEPTH,
    ORIGIN,
    SEEN,
    TOKEN,
    field,
    init_tree,
    log_confidence,
    log_shares,
    merge_children,
    row_scale,
    survivals,
    write_tree,
)

__all__ = ["latent_programs", "launch_draft_paths"]


@triton.jit
def _store_logits(ids_ptr, row, row_ptr, x_ptr, head, row_ptrs, known, live, sizes, TILE: tl.constexpr):
    """Logits of the candidates after each live node, to x [NODES, WIDTH]; -inf where there is no candidate."""
    NODES: tl.constexpr = TILE.NODES
    WIDTH: tl.constexpr = TILE.WIDTH
    i = tl.arange(0, NODES)
    for first in range(0, WIDTH, TILE.PIECE):
        c = first + tl.arange(0, TILE.PIECE)
        ids = best_ids(ids_ptr, row, sizes.num_rows, c, sizes.num_candidates, sizes.vocab)
        used = ids >= 0
        x = tl.load(row_ptr + ids, mask=used, other=NEG_INF).to(tl.float32)[None, :] + tl.zeros([NODES, 1], tl.float32)
        if head is not None:
            x += node_bias(ids, used, row_ptrs, known, head, TILE.BLOCK_R)
        x = tl.where(used[None, :], x, NEG_INF)
        tl.store(x_ptr + i[:, None] * WIDTH + c[None, :], x, mask=live[:, None])
    tl.debug_barrier()


@triton.jit
def _read_logits(x_ptr, live, first, TILE: tl.constexpr):
    """PIECE of the logits of each live node from `first` on, NaN where they are: fp32 [NODES, PIECE], a warp having whole rows."""
    where = tl.arange(0, TILE.NODES)[:, None] * TILE.WIDTH + (first + tl.arange(0, TILE.PIECE))[None, :]
    return tl.load(x_ptr + where, mask=live[:, None], other=NEG_INF, volatile=True)


@triton.jit
def _logits(all_x, x_ptr, live, first, TILE: tl.constexpr):
    """The same, from registers where all_x [NODES, WIDTH] is there."""
    if all_x is not None:
        x = all_x
    else:
        x = _read_logits(x_ptr, live, first, TILE)
    return x


@triton.jit
def _maxima(x):
    """Of rows of logits: (maxima, how many are finite and, in the high half, how many are NaN)."""
    seen = (tl.abs(x) < POS_INF).to(tl.int32) + ((x != x).to(tl.int32) << 16)
    return tl.max(numbers(x), axis=1), tl.sum(seen, axis=1)


@triton.jit
def _sumexps(x, top, scale):
    return tl.sum((tl.exp2(below_max(numbers(x), top[:, None]) * scale) * SUMEXP_ONE).to(tl.int64), axis=1)


@triton.jit
def _expand(
    d, count, live, row, row_ptr, head, latent, hidden, confidence, blocks, ids_ptr, own, nan, scale, sizes, TILE: tl.constexpr,
):  # fmt: skip
    """Children for all nodes of depth d, which are `live`; returns how many nodes there are then. own: PathScratch of the request.
    nan: a flag where the base logits have one."""
    kept_ptr, x_ptr = own.kept_ptr, own.logits_ptr
    NODES: tl.constexpr = TILE.NODES
    WIDTH: tl.constexpr = TILE.WIDTH
    PIECE: tl.constexpr = TILE.PIECE
    i = tl.arange(0, NODES)
    token = field(kept_ptr, TOKEN, i, count, NODES)
    reached = survivals(kept_ptr, i, count, NODES)
    row_ptrs = x_ptr + i
    known = live
    if head is not None:
        row_ptrs = head.w1_ptr + token.to(tl.int64) * head.stride_w1
        known = live & (token >= 0) & (token < head.vocab)
    if latent is not None:
        origin = field(kept_ptr, ORIGIN, i, count, NODES)
        TILE.ADVANCE(
            d, live, row_ptrs, known, origin, latent, hidden.size, own.latents, head.rank, TILE.BLOCK_O, TILE.BLOCK_J,
        )  # fmt: skip
        tl.debug_barrier()
        latent_ptrs = own.latents.latent_ptr + i.to(tl.int64) * head.rank
        _store_logits(ids_ptr, row, row_ptr, x_ptr, head, latent_ptrs, live, live, sizes, TILE)
    else:
        _store_logits(ids_ptr, row, row_ptr, x_ptr, head, row_ptrs, known, live, sizes, TILE)

    # Read back, so that a warp has whole rows: what follows needs no barrier then. One piece stays in registers.
    all_x = None
    if WIDTH == PIECE:
        all_x = _read_logits(x_ptr, live, 0, TILE)
    top = tl.full([NODES], NEG_INF, tl.float32)
    seen = tl.zeros([NODES], tl.int32)
    for first in range(0, WIDTH, PIECE):
        piece_top, piece_seen = _maxima(_logits(all_x, x_ptr, live, first, TILE))
        top = tl.maximum(top, piece_top)
        seen += piece_seen
    some_nan, finite = seen >> 16, seen & 0xFFFF
    if blocks is None:
        sumexp = tl.zeros([NODES], tl.int64)
        for first in range(0, WIDTH, PIECE):
            sumexp += _sumexps(_logits(all_x, x_ptr, live, first, TILE), top, scale)
    else:
        one = tl.zeros([1], tl.int64)
        whole_top, whole, words, _ = merge_blocks(
            blocks.max_ptr, blocks.sumexp_ptr, row + one, tl.cdiv(sizes.vocab, VOCAB_BLOCK), scale, TILE.BLOCKS
        )  # fmt: skip
        # By way of scalars, which have no layout: that of the blocks would give every warp all rows.
        finite += tl.max(tl.max((words & SAW_FINITE) >> 60, axis=1), axis=0).to(tl.int32)
        top = tl.max(whole_top, axis=0) + tl.zeros([NODES], tl.float32)
        sumexp = tl.max(whole, axis=0) + tl.zeros([NODES], tl.int64)
    flags = nan | tl.where(some_nan > 0, NAN, 0) | tl.where(finite > 0, 0, NONFINITE_ROW)
    tl.store(kept_ptr + SEEN * NODES + i, flags, mask=live)
    if confidence is not None:
        score = tl.load(own.score_ptr + d, volatile=True)
        reached += log_confidence(token, live, score, d, confidence, hidden.size, NODES)
    tl.debug_barrier()
    row_nodes = i
    for first in range(0, WIDTH, PIECE):
        x = _logits(all_x, x_ptr, live, first, TILE)
        c = first + tl.arange(0, PIECE)
        ids = tl.maximum(best_ids(ids_ptr, row, sizes.num_rows, c, sizes.num_candidates, sizes.vocab), 0)
        share = log_shares(numbers(x), ids[None, :], top, sumexp, scale)
        keys = tl.where((live & (row_nodes >= 0))[:, None], reached[:, None] + share, NEG_INF)
        every = ids[None, :] + tl.zeros([NODES, 1], tl.int32)
        count, row_nodes = merge_children(kept_ptr, count, sizes.num_nodes, d + 1, keys, every, row_nodes, NODES)
    return count


@triton.jit
def _grow(
    request, slot, base, state, head, latent, hidden, confidence, out, blocks, ids_ptr, scratch, status_ptr, sizes, TILE: tl.constexpr,
):  # fmt: skip
    """The tree of one request, whose candidates are there."""
    num_drafts, num_nodes = sizes.num_drafts, sizes.num_nodes
    NODES: tl.constexpr = TILE.NODES
    stride_anchors = state.stride_anchors
    wide = request.to(tl.int64)
    kept_ptr = scratch.kept_ptr + wide * (NODE_FIELDS * NODES)
    own = PathScratch(
        scratch.score_ptr + wide * num_drafts, kept_ptr, scratch.logits_ptr + wide * (NODES * TILE.WIDTH),
        latents_of(scratch.latents, wide, num_drafts, latent, head, NODES),
    )  # fmt: skip
    anchor = tl.load(state.anchors_ptr + slot * stride_anchors).to(tl.int64)
    scale = row_scale(state.temperature_ptr, slot)
    init_tree(kept_ptr, anchor, NODES)
    count = tl.full((), 1, tl.int32)
    i = tl.arange(0, NODES)
    for d in range(num_drafts):
        row = wide * num_drafts + d
        nan = tl.load(status_ptr + row, volatile=True)
        live = (i < count) & (field(kept_ptr, DEPTH, i, count, NODES) == d)
        if (tl.max(live.to(tl.int32), axis=0) > 0) & (num_nodes > 1):
            row_ptr = base.ptr + wide * base.stride_request + tl.cast(d, tl.int64) * base.stride_position
            count = _expand(
                d, count, live, row, row_ptr, head, latent, hidden, confidence, blocks, ids_ptr, own, nan, scale, sizes, TILE
            )
    tl.debug_barrier()
    for d in range(num_drafts):
        tl.store(status_ptr + wide * num_drafts + d, 0)
    flags = tl.zeros((), tl.int32)
    if head is not None:
        flags = tl.where((anchor < 0) | (anchor >= head.vocab), BAD_TOKEN_ID, 0)
    write_tree(kept_ptr, count, state.budgets_ptr, slot, anchor, request, flags, out, num_nodes, num_drafts, NODES)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_drafts", "num_nodes", "latent_items", "parts"])
def draft_paths_kernel(
    # Records of kernels/draft_tree/args.py and kernels/draft/args.py.
    base,  # BaseLogits
    state,  # PathState
    head,  # Head or None
    latent,  # Latent of a gated or rnn head, or None
    hidden,  # Hidden or None
    confidence,  # NodeConfidence or None
    out,  # PathTree
    blocks,  # BlockSums where distributions are those of the whole vocabulary, or None
    selection,  # Selection
    scratch,  # PathScratch
    counters,  # PathCounters
    num_requests, num_slots, num_drafts, num_nodes,
    widths,  # PathWidths
    latent_items, parts,
    SELECTION: tl.constexpr,  # SelectionTile
    TILE: tl.constexpr,  # PathTile
):  # fmt: skip
    vocab, slots_ptr = widths.vocab, state.slots_ptr
    num_rows = num_requests * num_drafts
    program = tl.program_id(0)
    # Requests that this program arrives at when its part is done, and how many parts a request has.
    first = tl.zeros((), tl.int32)
    count = tl.zeros((), tl.int32)
    if program < latent_items:
        if latent is not None:
            first, count = latent_item(
                program, slots_ptr, latent, hidden, scratch.latents.products_ptr, num_requests, num_slots, num_drafts, TILE.BLOCK_J
            )
    else:
        item = program - latent_items
        row = item // parts
        part = item % parts
        request = row // num_drafts
        k = row % num_drafts
        slot = slot_of(slots_ptr, request, num_requests, num_slots)
        if slot >= 0:
            row_ptr = base.ptr + request.to(tl.int64) * base.stride_request + k.to(tl.int64) * base.stride_position
            wide_row = row.to(tl.int64)
            own_blocks = None
            if blocks is not None:
                own_blocks = BlockSums(
                    blocks.max_ptr + wide_row * tl.cdiv(vocab, VOCAB_BLOCK),
                    blocks.sumexp_ptr + wide_row * tl.cdiv(vocab, VOCAB_BLOCK)
                )  # fmt: skip
            settings = RowSettings(None, 0, None, slot, 0)
            sweep_part(
                wide_row, part, parts, row_ptr, settings, own_blocks, row_scale(state.temperature_ptr, slot), selection,
                counters.status_ptr + row, vocab, SELECTION,
            )  # fmt: skip
            if confidence is not None:
                if part == 0:
                    tl.store(scratch.score_ptr + row, hidden_score(request, k, hidden, confidence.weight_ptr))
            if finish_part(wide_row, parts, row_ptr, settings, selection, vocab, widths.num_candidates, SELECTION):
                if head is not None:
                    tl.debug_barrier()
                    prefetch_best(wide_row, head, None, selection, num_rows, vocab, widths.num_candidates, SELECTION)
                first = request
                count = tl.full((), 1, tl.int32)
        else:
            if (k == 0) & (part == 0):
                tl.store(out.flags_ptr + request, 0)

    for request in range(first, first + count):
        slot = slot_of(slots_ptr, request, num_requests, num_slots)
        if slot >= 0:
            if arrive(counters.request_ptr + request, awaited(request, latent, num_drafts)):
                _grow(
                    request, slot, base, state, head, latent, hidden, confidence, out, blocks, selection.ids_ptr, scratch,
                    counters.status_ptr, PathSizes(num_rows, num_drafts, num_nodes, vocab, widths.num_candidates), TILE,
                )  # fmt: skip


_ADVANCE = {None: None, "vanilla": None, "gated": advance_gated_nodes, "rnn": advance_rnn_nodes}


def launch_draft_paths(programs, args, *, kind, blocks, shift, config):
    """Launch one program per part: the products of gated and rnn heads first, then a chunk of a row each."""
    draft_paths_kernel[(programs,)](
        *args,
        SELECTION=selection_tile(config, shift),
        TILE=PathTile(
            ADVANCE=_ADVANCE[kind],
            BLOCKS=blocks,
            NODES=config.nodes,
            WIDTH=config.width,
            PIECE=min(config.width, config.piece),
            BLOCK_R=config.block_r,
            BLOCK_O=config.block_o,
            BLOCK_J=config.block_j,
        ),
        **options_of(config),
    )
