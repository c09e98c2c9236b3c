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
    VOCAB_BLOCK,
)
from ..primitives.philox import CORRECT, LEAF as LEAF_STREAM, lane_words, log2_exponential
from ..primitives.race import pack, unpack_id
from ..primitives.sumexp import below_max
from ..primitives.vocab_blocks import SUMEXP_BITS
from .rows import SOFTMAX, load_block, load_row_blocks, pick
from .target import read_each, read_row


@triton.jit
def _noise(first_lane, seed, position, anchor, STREAM: tl.constexpr, LANES: tl.constexpr):
    """log2 of an Exp(1) variate for each of first_lane + 0, 1, ..."""
    return tl.reshape(log2_exponential(lane_words(seed, first_lane, position, anchor, STREAM, 1, LANES)), [LANES])


@triton.jit
def _race(log_weight, noise, ids):
    """Id that wins by log2 weight (-inf = excluded)."""
    return unpack_id(tl.max(pack(tl.where(log_weight > NEG_INF, log_weight - noise, NEG_INF), ids), axis=0))


@triton.jit
def log2_weight(weight):
    """-inf where there is none."""
    return tl.where(weight > 0, tl.log2(tl.where(weight > 0, weight, 1).to(tl.float32)), NEG_INF)


@triton.jit
def draw(
    i, row, request, wants_residual, pair, seed, position, anchor, view, draft, scratch, scales, num_blocks,
    PROPOSAL: tl.constexpr, SUMMED: tl.constexpr, BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Draw after row i of a request from its residual, or, where that is not wanted or empty, from the target distribution.

    SUMMED: whether the residual's sums are in memory. Gives the token int64 and whether a wanted residual was empty. Noise is made
    while the logits and sums that it is added to are on their way.
    """
    block = tl.arange(0, BLOCKS)
    there = block < num_blocks
    target = pair.target
    blocks = load_row_blocks(scratch.target, row, num_blocks, BLOCKS)
    residual = tl.zeros([BLOCKS], tl.int64)
    if SUMMED:
        wanted = block < tl.where(wants_residual, num_blocks, 0)
        residual = tl.load(scratch.residual_ptr + row * num_blocks + block, mask=wanted, other=0, volatile=True)
    noise = _noise(tl.zeros((), tl.int32), seed, position, anchor, LEAF_STREAM, BLOCKS)
    if PROPOSAL is not None and not SUMMED:
        if wants_residual:
            residual = PROPOSAL.residual_of_blocks(
                i, row, blocks, pair, view, draft, scratch, scales, num_blocks, BLOCKS, CANDIDATES
            )
    from_residual = tl.max(tl.where(there, residual, 0), axis=0) > 0
    relative = below_max(blocks.tops, target.reference) * scales.target
    weight = log2_weight(tl.where(from_residual, residual, blocks.words & SUMEXP_BITS)) + tl.where(from_residual, 0.0, relative)
    weight = tl.where(there, weight, NEG_INF)
    token = target.point.to(tl.int64)
    if from_residual | (target.point == SOFTMAX):
        winner = _race(weight, noise, block)
        ids = winner * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
        x = read_row(view, i, ids.to(tl.int32), ids < view.vocab)
        inner_noise = _noise(winner * VOCAB_BLOCK, seed, position, anchor, CORRECT, VOCAB_BLOCK)
        inner = tl.where(x == NEG_INF, NEG_INF, (x - target.reference) * scales.target)
        if PROPOSAL is not None:
            if from_residual:
                inner = log2_weight(PROPOSAL.residual_in_block(x, winner.to(tl.int32), i, request, pair, view, draft, scratch, scales,
                                                         PROPOSAL, CANDIDATES))  # fmt: skip
        token = _race(inner, inner_noise, ids)
    return token, wants_residual & (from_residual == 0)


@triton.jit
def _commit(commit_ptr, begin, end, request, num_requests, committed, num_forward, BLOCK: tl.constexpr):
    """commit_mask of a request's forward rows begin .. end - 1: True up to row `committed`; the last request also writes False for
    the padding rows."""
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        tl.store(commit_ptr + row, row <= committed, mask=row < end)
    if request == num_requests - 1:
        for first in range(end, num_forward, BLOCK):
            row = first + tl.arange(0, BLOCK)
            tl.store(commit_ptr + row, row < 0, mask=row < num_forward)


@triton.jit
def token_log_probs(i, rows, tokens, emitted, greedy, view, raw, stats, scale):
    """ln of the probability of each emitted token in its row: processed, or raw where the first pass summed that, too. stats:
    RequestStats of these rows."""
    if raw is not None:
        x = load_block(view.logits_ptr + rows * view.stride, tokens, emitted)
        top = stats.raw_max
        soft = below_max(x, top) - stats.raw_log_sumexp * LN2
        point = tl.where(x == POS_INF, 0.0, NEG_INF)
        is_point = tl.abs(top) == POS_INF
    else:
        x = read_each(view, tl.where(emitted, i, 0), tl.where(emitted, tokens, 0).to(tl.int32), emitted)
        top = stats.target.reference
        soft = (below_max(x, top) * (scale / LOG2E)) + tl.log2(stats.target.factor) * LN2
        point = tl.where((tokens == stats.first) & (x > NEG_INF), 0.0, NEG_INF)
        is_point = tl.where(greedy, emitted, tl.abs(top) == POS_INF)
    return tl.where(emitted, tl.where(is_point, point, soft), 0.0)


@triton.jit
def write_outputs(
    request, accepted, token, empty, known, view, outputs, raw, stats, scale, sizes,
    SUPPORT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Every output of a request with rows. stats: RequestStats. SUPPORT: whether a draft without probability is flagged."""
    length = view.length
    i = tl.arange(0, WIDTH)
    drafts = known.drafts
    here = i == accepted
    bad = (i < length) & (drafts.inside == 0) & (drafts.missing == 0)
    if SUPPORT:
        bad = bad | tl.where(known.sampled, (i < length) & (drafts.missing == 0) & (stats.draft_prob <= 0.0), i < 0)
    seen = tl.where(i <= accepted, stats.status & NAN, 0) | tl.where(here, stats.status & NONFINITE_ROW, 0)
    flags = tl.where(tl.max(seen & NAN, axis=0) > 0, NAN, 0)
    flags |= tl.max(seen & NONFINITE_ROW, axis=0)
    flags |= tl.max(tl.where(here & bad, BAD_TOKEN_ID, 0), axis=0)
    flags |= tl.max(tl.where(here & drafts.missing, MISSING_DRAFT, 0), axis=0)
    flags |= tl.where(empty, EMPTY_RESIDUAL, 0)
    tokens = tl.where(i < accepted, drafts.ids, tl.where(here, token, -1))
    of_token = request.to(tl.int64) * (sizes.num_drafts + 1) + i
    tl.store(outputs.tokens_ptr + of_token, tokens, mask=i <= sizes.num_drafts)
    if outputs.log_probs_ptr is not None:
        rows = (view.row0 + i).to(tl.int64)
        log_probs = token_log_probs(i, rows, tokens, i <= accepted, known.sampled == 0, view, raw, stats, scale)
        tl.store(outputs.log_probs_ptr + of_token, log_probs, mask=i <= sizes.num_drafts)
    tl.store(outputs.accepted_ptr + request, accepted)
    tl.store(outputs.emitted_ptr + request, accepted + 1)
    tl.store(outputs.rejected_ptr + request, length - accepted)
    tl.store(outputs.flags_ptr + request, flags)
    tl.store(outputs.next_token_ptr + request, token)
    last_row = tl.where(accepted == 0, known.rows.anchor, pick(known.rows.drafts, accepted - 1, i))
    tl.store(outputs.last_row_ptr + request, last_row)
    if outputs.anchors_ptr is not None:
        tl.store(outputs.anchors_ptr + view.slot * outputs.stride_anchors, token)
    if outputs.anchor_positions_ptr is not None:
        tl.store(outputs.anchor_positions_ptr + view.slot * outputs.stride_anchor_positions, known.anchor + accepted + 1)
    _commit(outputs.commit_ptr, known.query.begin, known.query.end, request, sizes.num_requests, last_row, sizes.num_forward, 128)


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
    begin = tl.load(layout.query_start_ptr + request)
    end = tl.minimum(tl.load(layout.query_start_ptr + request + 1), sizes.num_forward)
    _commit(outputs.commit_ptr, begin, end, request, sizes.num_requests, committed, sizes.num_forward, 128)
