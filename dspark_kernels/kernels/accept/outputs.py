"""What a request emits: the correction or bonus token, drawn or named, and every output of acceptance.

Draws are races of exponential clocks in two levels, between blocks by their sums and inside the winning block by id, so that noise
is drawn for NB + 1024 entries alone and only the winning block is read again. Symbols: R requests, K drafts, V vocabulary, NB
blocks of 1024 ids. Reference: reference/accept.py.
"""

import triton
import triton.language as tl

from ..primitives.constants import (
    BAD_TOKEN_ID,
    EMPTY_RESIDUAL,
    LN2,
    LOG2E,
    MISSING_DRAFT,
    NAN,
    NEG_INF,
    NONFINITE_ROW,
    POS_INF,
    ROW_IDS,
    ROW_VALUES,
    VOCAB_BLOCK,
)
from ..primitives.philox import CORRECT, LEAF as LEAF_STREAM, lane_words, log2_exponential
from ..primitives.race import pack, unpack_id
from ..primitives.sumexp import below_max
from ..primitives.vocab_blocks import SUMEXP_BITS
from .rows import (
    DRAFT_PROB,
    FIRST,
    INV_SUMEXP,
    RAW_LOG_SUMEXP,
    RAW_MAX,
    ROW_MAX,
    SOFTMAX,
    STATUS,
    TARGET_OF,
    finite_or_zero,
    load_block,
)
from .target import read_each, read_row


@triton.jit
def _race(log_weight, ids, first_lane, seed, position, anchor, STREAM: tl.constexpr, LANES: tl.constexpr):
    """Id that wins by log2 weight (-inf = excluded); ids are first_lane + 0, 1, ..."""
    words = lane_words(seed, first_lane, position, anchor, STREAM, 1, LANES)
    key = log_weight - tl.reshape(log2_exponential(words), [LANES])
    return unpack_id(tl.max(pack(tl.where(log_weight > NEG_INF, key, NEG_INF), ids), axis=0))


@triton.jit
def log2_weight(weight):
    """-inf where there is none."""
    return tl.where(weight > 0, tl.log2(tl.where(weight > 0, weight, 1).to(tl.float32)), NEG_INF)


@triton.jit
def draw(
    i, row, request, wants_residual, seed, position, anchor, view, draft, scratch, scales, num_blocks,
    PROPOSAL: tl.constexpr, BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Draw after row i of a request from its residual, or, where that is not wanted or empty, from the target distribution.

    Gives the token int64 and whether a wanted residual was empty.
    """
    block = tl.arange(0, BLOCKS)
    of_block = row * num_blocks + block
    there = block < num_blocks
    row_top = finite_or_zero(tl.load(scratch.stats.values_ptr + row * ROW_VALUES + ROW_MAX, volatile=True))
    target_of = tl.load(scratch.stats.ids_ptr + row * ROW_IDS + TARGET_OF, volatile=True)
    tops = tl.load(scratch.target.max_ptr + of_block, mask=there, other=NEG_INF, volatile=True)
    sumexp = tl.load(scratch.target.sumexp_ptr + of_block, mask=there, other=0, volatile=True) & SUMEXP_BITS
    weight = log2_weight(sumexp) + below_max(tops, row_top) * scales.target
    from_residual = wants_residual
    if PROPOSAL is not None:
        if wants_residual:
            residual = tl.load(scratch.residual_ptr + of_block, mask=there, other=0, volatile=True)
            from_residual = tl.max(residual, axis=0) > 0
            weight = tl.where(from_residual, log2_weight(residual), weight)
    weight = tl.where(there, weight, NEG_INF)
    token = target_of.to(tl.int64)
    if from_residual | (target_of == SOFTMAX):
        winner = _race(weight, block, tl.zeros((), tl.int32), seed, position, anchor, LEAF_STREAM, BLOCKS)
        ids = winner * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
        x = read_row(view, i, ids.to(tl.int32), ids < view.vocab)
        inner = tl.where(x == NEG_INF, NEG_INF, (x - row_top) * scales.target)
        if PROPOSAL is not None:
            if from_residual:
                inner = log2_weight(PROPOSAL.residual_in_block(winner.to(tl.int32), i, row, request, view, draft, scratch, scales,
                                                         PROPOSAL, CANDIDATES))  # fmt: skip
        token = _race(inner, ids, winner * VOCAB_BLOCK, seed, position, anchor, CORRECT, VOCAB_BLOCK)
    return token, wants_residual & (from_residual == 0)


@triton.jit
def _commit(commit_ptr, query_start_ptr, request, num_requests, committed, num_forward, BLOCK: tl.constexpr):
    """commit_mask of a request's forward rows: True up to row `committed`; the last request also writes False for the padding
    rows."""
    start = tl.load(query_start_ptr + request)
    end = tl.minimum(tl.load(query_start_ptr + request + 1), num_forward)
    for first in range(start, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        tl.store(commit_ptr + row, row <= committed, mask=row < end)
    if request == num_requests - 1:
        for first in range(end, num_forward, BLOCK):
            row = first + tl.arange(0, BLOCK)
            tl.store(commit_ptr + row, row < 0, mask=row < num_forward)


@triton.jit
def token_log_probs(i, rows, tokens, emitted, greedy, view, raw, stats, scale):
    """ln of the probability of each emitted token in its row: processed, or raw where the first pass summed that, too."""
    values, ids_of = stats.values_ptr + rows * ROW_VALUES, stats.ids_ptr + rows * ROW_IDS
    if raw is not None:
        x = load_block(view.logits_ptr + rows * view.stride, tokens, emitted)
        top = tl.load(values + RAW_MAX, mask=emitted, other=0.0, volatile=True)
        sumexp = tl.load(values + RAW_LOG_SUMEXP, mask=emitted, other=0.0, volatile=True)
        soft = below_max(x, top) - sumexp * LN2
        point = tl.where(x == POS_INF, 0.0, NEG_INF)
        is_point = tl.abs(top) == POS_INF
    else:
        x = read_each(view, tl.where(emitted, i, 0), tl.where(emitted, tokens, 0).to(tl.int32), emitted)
        top = tl.load(values + ROW_MAX, mask=emitted, other=0.0, volatile=True)
        inv_sumexp = tl.load(values + INV_SUMEXP, mask=emitted, other=1.0, volatile=True)
        soft = (below_max(x, top) * (scale / LOG2E)) + tl.log2(inv_sumexp) * LN2
        first = tl.load(ids_of + FIRST, mask=emitted, other=0, volatile=True)
        point = tl.where((tokens == first) & (x > NEG_INF), 0.0, NEG_INF)
        is_point = tl.where(greedy, emitted, tl.abs(top) == POS_INF)
    return tl.where(emitted, tl.where(is_point, point, soft), 0.0)


@triton.jit
def write_outputs(
    request, accepted, token, empty, known, view, layout, outputs, raw, stats, scale, sizes,
    SUPPORT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Every output of a request with rows. SUPPORT: whether a draft without probability is flagged."""
    length = view.length
    i = tl.arange(0, WIDTH)
    rows = (view.row0 + i).to(tl.int64)
    drafts = known.drafts
    here = i == accepted
    status = tl.load(stats.ids_ptr + rows * ROW_IDS + STATUS, mask=i <= accepted, other=0, volatile=True)
    bad = (i < length) & (drafts.inside == 0) & (drafts.missing == 0)
    if SUPPORT:
        draft_prob = tl.load(stats.values_ptr + rows * ROW_VALUES + DRAFT_PROB, mask=here & (i < length), other=1.0, volatile=True)
        bad = bad | tl.where(known.sampled, (i < length) & (drafts.missing == 0) & (draft_prob <= 0.0), i < 0)
    flags = tl.where(tl.max(status & NAN, axis=0) > 0, NAN, 0)
    flags |= tl.max(tl.where(here, status & NONFINITE_ROW, 0), axis=0)
    flags |= tl.max(tl.where(here & bad, BAD_TOKEN_ID, 0), axis=0)
    flags |= tl.max(tl.where(here & drafts.missing, MISSING_DRAFT, 0), axis=0)
    flags |= tl.where(empty, EMPTY_RESIDUAL, 0)
    tokens = tl.where(i < accepted, drafts.ids, tl.where(here, token, -1))
    of_token = request.to(tl.int64) * (sizes.num_drafts + 1) + i
    tl.store(outputs.tokens_ptr + of_token, tokens, mask=i <= sizes.num_drafts)
    if outputs.log_probs_ptr is not None:
        log_probs = token_log_probs(i, rows, tokens, i <= accepted, known.sampled == 0, view, raw, stats, scale)
        tl.store(outputs.log_probs_ptr + of_token, log_probs, mask=i <= sizes.num_drafts)
    tl.store(outputs.accepted_ptr + request, accepted)
    tl.store(outputs.emitted_ptr + request, accepted + 1)
    tl.store(outputs.rejected_ptr + request, length - accepted)
    tl.store(outputs.flags_ptr + request, flags)
    tl.store(outputs.next_token_ptr + request, token)
    last_row = tl.load(layout.logits_indices_ptr + view.row0 + accepted)
    tl.store(outputs.last_row_ptr + request, last_row)
    if outputs.anchors_ptr is not None:
        tl.store(outputs.anchors_ptr + view.slot * outputs.stride_anchors, token)
    if outputs.anchor_positions_ptr is not None:
        tl.store(outputs.anchor_positions_ptr + view.slot * outputs.stride_anchor_positions, known.anchor + accepted + 1)
    _commit(outputs.commit_ptr, layout.query_start_ptr, request, sizes.num_requests, last_row, sizes.num_forward, 128)


@triton.jit
def write_no_outputs(request, slot, layout, outputs, sizes, WIDTH: tl.constexpr):
    """A request without logit rows (a prefill chunk keeps all its rows) or a padding row."""
    i = tl.arange(0, WIDTH)
    of_token = request.to(tl.int64) * (sizes.num_drafts + 1) + i
    tl.store(outputs.tokens_ptr + of_token, (i * 0 - 1).to(tl.int64), mask=i <= sizes.num_drafts)
    if outputs.log_probs_ptr is not None:
        tl.store(outputs.log_probs_ptr + of_token, i * 0.0, mask=i <= sizes.num_drafts)
    tl.store(outputs.accepted_ptr + request, 0)
    tl.store(outputs.emitted_ptr + request, 0)
    tl.store(outputs.rejected_ptr + request, 0)
    tl.store(outputs.next_token_ptr + request, tl.full((), -1, tl.int64))
    tl.store(outputs.last_row_ptr + request, 0)
    tl.store(outputs.flags_ptr + request, 0)
    committed = tl.where(slot >= 0, sizes.num_forward, -1)
    _commit(outputs.commit_ptr, layout.query_start_ptr, request, sizes.num_requests, committed, sizes.num_forward, 128)
