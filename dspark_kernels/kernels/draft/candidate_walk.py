"""A request's walk over the positions of a sparse draft block, on candidates that are there: their logits, settings, noise, drafts.

A position waits for what only the draft before it decides; the rest is fetched a position ahead. The candidates are those of one
rank (kernels/draft/candidates.py) or merged from several (candidate_shards.py). Symbols as there. Reference:
reference/candidates.py. Source: DSpark, arXiv 2607.05147.
"""

import triton
import triton.language as tl

from ..primitives.constants import BAD_TOKEN_ID, NAN, NEG_INF, NONFINITE_ROW, POS_INF
from ..primitives.philox import COUPLED, DRAFT, log2_exponential, words_at
from ..primitives.race import largest_word, pack, unpack_id, unpack_key
from ..primitives.sumexp import log2_scale, numbers
from ..primitives.support import last_kept
from .args import RowSettings, Turn, WalkOptions
from .candidate_heads import (
    advance_gated,
    advance_rnn,
    latent_programs as latent_programs,
    no_latent,
    prefetch_rows,
    weighted_rows,
)
from .candidate_scores import score, store_lse, stored_logits
from .selection import (
    best_ids,
    with_settings,
    with_successors,
)

ENTRIES = 512  # candidates of several positions that are looked at at once


@triton.jit
def _drafted(j, path):
    """PATH of adjusted: the request's drafts of this round."""
    return tl.load(path + j + tl.arange(0, 1), volatile=True)


@triton.jit
def _filters_of(filters, slot):
    """A slot's (top_k, top_p, min_p), off where not given."""
    top_k = tl.zeros((), tl.int32)
    top_p = tl.full((), 1.0, tl.float32)
    min_p = tl.zeros((), tl.float32)
    if filters.top_k_ptr is not None:
        top_k = tl.load(filters.top_k_ptr + slot)
    if filters.top_p_ptr is not None:
        top_p = tl.load(filters.top_p_ptr + slot)
    if filters.min_p_ptr is not None:
        min_p = tl.load(filters.min_p_ptr + slot)
    return top_k, top_p, min_p


# --- on vocabulary shards: merged = Merged (kernels/draft/args.py), else None -----------------------------------------


@triton.jit
def _places(c, row, end, merged, num_candidates):
    """Where the candidates of rows below `end` are among all ranks' lists: rank * C + entry; anything where there is none."""
    there = c < tl.where(row < end, num_candidates, 0)
    return tl.load(merged.places_ptr + row * num_candidates + c, mask=there, other=0, volatile=True)


@triton.jit
def _of_rank(ranks, region_ptr, merged):
    """Where a region of these ranks' parts starts, in elements of its own type."""
    return ranks.to(tl.int64) * (merged.stride_part * (64 // region_ptr.dtype.element_ty.primitive_bitwidth))


@triton.jit
def _gathered_flags(status_ptr, request, merged, num_drafts, DRAFTS: tl.constexpr):
    k = tl.arange(0, DRAFTS)
    flags = tl.zeros([DRAFTS], tl.int32)
    for rank in range(merged.shards):
        at = tl.cast(rank, tl.int64) * (merged.stride_part * 2) + request.to(tl.int64) * num_drafts + k
        flags = flags | tl.load(status_ptr + at, mask=k < num_drafts, other=0)
    return tl.max(flags & NAN, axis=0)


# --- what a position needs of its candidates; where there are no successors, no draft decides any of it ------------------


@triton.jit
def _base_logits(ids, places, k_ptr, base, merged, num_candidates):
    """As stored, -inf where there is no candidate."""
    columns = ids
    if merged is not None:
        columns = _of_rank(places // num_candidates, base.ptr, merged) + places % num_candidates
    return tl.load(k_ptr + columns, mask=ids >= 0, other=NEG_INF)


@triton.jit
def _rows_of(ids, places, row, merged, head, num_candidates):
    """Offsets of the candidates' rows of W2 and of their scales, which are those of their ids or of their entries; 0 where there is
    none."""
    own = tl.maximum(ids, 0)
    rows = own.to(tl.int64) * head.stride_w2
    scales = own.to(tl.int64)
    if merged is not None:
        if merged.rows_ptr is not None:
            at = row * num_candidates + places % num_candidates
            ranks = places // num_candidates
            rows = _of_rank(ranks, merged.rows_ptr, merged) + at * head.rank
            scales = at
            if head.scale_ptr is not None:
                scales += _of_rank(ranks, head.scale_ptr, merged)
            rows = tl.where(ids >= 0, rows, 0)
            scales = tl.where(ids >= 0, scales, 0)
    return rows, scales


@triton.jit
def _targets(ids, places, row, merged, widths):
    """(target ids int32, which candidates are tokens of the target)."""
    num_targets, num_candidates = widths.num_targets, widths.num_candidates
    used = ids >= 0
    targets = ids
    if merged is None:
        if widths.map_ptr is not None:
            mapped = tl.load(widths.map_ptr + ids, mask=used, other=-1)
            used = (mapped >= 0) & (mapped < num_targets)
            targets = tl.where(used, mapped, 0).to(tl.int32)
    elif merged.targets_ptr is not None:
        at = _of_rank(places // num_candidates, merged.targets_ptr, merged) + row * num_candidates + places % num_candidates
        targets = tl.load(merged.targets_ptr + at, mask=used, other=-1)
        used = (targets >= 0) & (targets < num_targets)
        targets = tl.where(used, targets, 0)
    return targets, used


@triton.jit
def _several_ids(k, first, selection, widths, sizes, OPTIONS: tl.constexpr):
    """[ROWS, WIDTH] of positions from k on."""
    row = first + k + tl.arange(0, OPTIONS.ROWS)[:, None]
    c = tl.arange(0, OPTIONS.WIDTH)[None, :]
    return best_ids(selection.ids_ptr, row, first + sizes.num_drafts, c, widths.num_candidates, widths.vocab)


@triton.jit
def _prepare(
    k, ids, slot, seed, anchor, noise_anchor, first, merged, out, scratch, widths, sizes, SAMPLED: tl.constexpr,
    OPTIONS: tl.constexpr,
):  # fmt: skip
    """Of ROWS positions from k on what no draft decides: target ids, and log2 of the exponential variates of all candidates, to
    scratch. ids: `_several_ids`. Many positions at once keep every lane busy."""
    WIDTH: tl.constexpr = OPTIONS.WIDTH
    end = first + sizes.num_drafts
    c = tl.arange(0, WIDTH)[None, :]
    position = k + tl.arange(0, OPTIONS.ROWS)[:, None]
    row = first + position
    places = ids
    if merged is not None:
        places = _places(c, row, end, merged, widths.num_candidates)
    targets, used = _targets(ids, places, row, merged, widths)
    if out.ids_ptr is not None:
        place = slot * out.stride_ids + (sizes.column + position).to(tl.int64) * out.stride_ids_position + c
        tl.store(out.ids_ptr + place, tl.where(used, targets, 0), mask=(row < end) & (c < widths.num_candidates))
    if SAMPLED:
        words = words_at(seed, targets, anchor + (sizes.first_draft + position + 1), noise_anchor, OPTIONS.STREAM)
        tl.store(scratch.noise_ptr + row * WIDTH + c, log2_exponential(words), mask=row < end)


@triton.jit
def _temperature_and_seed(state, slot):
    """Of a slot; zeros where every row is greedy."""
    temperature = tl.zeros((), tl.float32)
    seed = tl.zeros((), tl.int64)
    if state.temperature_ptr is not None:
        temperature = tl.load(state.temperature_ptr + slot)
        seed = tl.load(state.seed_ptr + slot)
    return temperature, seed


@triton.jit
def _bias(
    turn, row, request, previous, ids, places, merged, head, latent, hidden, scratch, num_candidates, OPTIONS: tl.constexpr
):  # fmt: skip
    """fp32 [WIDTH]: the head's logits of the entries of a position after `previous`; a gated or rnn head goes on by a turn."""
    rows, scales = _rows_of(ids, places, row, merged, head, num_candidates)
    known = tl.where((previous >= 0) & (previous < head.vocab), head.rank, 0)
    latent_ptr = head.w1_ptr + previous * head.stride_w1
    if latent is not None:
        embedded_ptr = latent_ptr
        latent_ptr = scratch.latent_ptr + request.to(tl.int64) * head.rank
        own_states_ptr = scratch.states_ptr
        if scratch.states_ptr is not None:
            own_states_ptr += request.to(tl.int64) * (2 * head.rank)
        OPTIONS.ADVANCE(
            turn, embedded_ptr, known, latent, hidden, scratch.products_ptr + row * latent.outputs, latent_ptr, own_states_ptr,
            head.rank, OPTIONS.BLOCK_O, OPTIONS.BLOCK_J,
        )  # fmt: skip
        known = known * 0 + head.rank
    return weighted_rows(rows, scales, latent_ptr, known, head, OPTIONS.BLOCK_R, OPTIONS.MORE_RANKS)


@triton.jit
def _filtered(x, targets, used, slot, temperature, scale, filters, OPTIONS: tl.constexpr):
    """Logits x fp32 [WIDTH] of a sampled position, -inf where filters remove an entry."""
    top = tl.max(x, axis=0)
    if (temperature > 0.0) & (tl.abs(top) < POS_INF):
        top_k, top_p, min_p = _filters_of(filters, slot)
        words = tl.where(used, pack(x, targets), 0)
        last = last_kept(words, top, scale, top_k, top_p, min_p, OPTIONS.JOINT, OPTIONS.WIDTH, OPTIONS.LOG_WIDTH)
        x = tl.where(words >= last, x, NEG_INF)
    return x


@triton.jit
def _prepare_all(
    several, slot, seed, anchor, noise_anchor, first, merged, selection, out, scratch, widths, sizes, SAMPLED: tl.constexpr,
    OPTIONS: tl.constexpr,
):  # fmt: skip
    """`_prepare` of every position. several: ids of the first OPTIONS.ROWS of them."""
    _prepare(0, several, slot, seed, anchor, noise_anchor, first, merged, out, scratch, widths, sizes, SAMPLED, OPTIONS)
    if OPTIONS.DRAFTS > OPTIONS.ROWS:
        for k in range(OPTIONS.ROWS, sizes.num_drafts, OPTIONS.ROWS):
            more = _several_ids(k, first, selection, widths, sizes, OPTIONS)
            _prepare(k, more, slot, seed, anchor, noise_anchor, first, merged, out, scratch, widths, sizes, SAMPLED, OPTIONS)


@triton.jit
def _first_flags(status_ptr, request, anchor, head, merged, num_drafts, OPTIONS: tl.constexpr):
    """What the request's rows and its anchor show; the anchor's row of W1 is asked for."""
    if merged is None:
        flags = tl.load(status_ptr + request, volatile=True)
    else:
        flags = _gathered_flags(status_ptr, request, merged, num_drafts, OPTIONS.DRAFTS)
    if head is not None:
        flags = flags | tl.where((anchor < 0) | (anchor >= head.vocab), BAD_TOKEN_ID, 0)
        one = tl.zeros([1], tl.int64)
        prefetch_rows(head.w1_ptr, head.stride_w1, tl.where(anchor < head.vocab, anchor, -1) + one, head.rank)
    return flags


@triton.jit
def _store_row(x, targets, used, slot, k, width, STORE_IDS: tl.constexpr, base, out, WIDTH: tl.constexpr):
    """Logits of the candidates of column k and, with STORE_IDS, their target ids."""
    c = tl.arange(0, WIDTH)
    if STORE_IDS:
        if out.ids_ptr is not None:
            place = slot * out.stride_ids + k.to(tl.int64) * out.stride_ids_position + c
            tl.store(out.ids_ptr + place, tl.where(used, targets, 0), mask=c < width)
    if out.logits_ptr is not None:
        place = slot * out.stride_logits + k.to(tl.int64) * out.stride_logits_position + c
        tl.store(out.logits_ptr + place, x.to(base.ptr.dtype.element_ty), mask=c < width)


@triton.jit
def _largest(x, key, targets, used, WIDTH: tl.constexpr):
    """(the target id with the largest key, 0 without any; the flag of a row without finite logits)."""
    word = largest_word(tl.where(used, pack(key, targets), 0), WIDTH)
    nonfinite = tl.zeros((), tl.int32)
    if ~(tl.abs(unpack_key(word)) < POS_INF):  # only then can the row lack finite logits
        finite = tl.max(tl.where(used & (tl.abs(x) < POS_INF), 1, 0), axis=0)
        nonfinite = tl.where(finite == 0, NONFINITE_ROW, 0)
    return tl.where(word > 0, unpack_id(word), 0), nonfinite


@triton.jit
def _finish(
    request,
    slot,
    followed,
    width,
    scale,
    head,
    hidden,
    confidence,
    out,
    scratch,
    sizes,
    SAMPLED: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """Log-sum-exp and confidence of all positions, whose drafts are there. followed: the token that each of them follows."""
    WITH_LSE: tl.constexpr = SAMPLED and out.lse_ptr is not None
    if WITH_LSE:
        stored = stored_logits(0, slot, out, width, sizes, OPTIONS)  # on their way while the scores are summed
    if confidence is not None:
        score(request, slot, followed, head, hidden, confidence, scratch.score_ptr, sizes, OPTIONS)
    if WITH_LSE:
        store_lse(0, stored, slot, scale, out, sizes, OPTIONS)
        if OPTIONS.DRAFTS > OPTIONS.ROWS:
            for k in range(OPTIONS.ROWS, sizes.num_drafts, OPTIONS.ROWS):
                store_lse(k, stored_logits(k, slot, out, width, sizes, OPTIONS), slot, scale, out, sizes, OPTIONS)


@triton.jit
def walk(
    request, slot, status_ptr, base, state, successors, merged, adjust, filters, head, latent, hidden, confidence, out, selection,
    scratch, widths, sizes, OPTIONS: tl.constexpr,
):  # fmt: skip
    """All positions of one request, whose candidates are there.

    A position waits for what only the draft before it decides, the row of W1: logits, noise and rows of W2 of its candidates are
    asked for while the position before is decided. merged: None, or where their logits, target ids and rows of W2 lie among the
    parts of all ranks; `base` is then the logits of the first [R, K, C], and so are W2 and its scales of `head` where rows are
    gathered.
    """
    num_drafts, column = sizes.num_drafts, sizes.column
    vocab, num_candidates = widths.vocab, widths.num_candidates
    WIDTH: tl.constexpr = OPTIONS.WIDTH
    DRAFTS: tl.constexpr = OPTIONS.DRAFTS
    SAMPLED: tl.constexpr = state.temperature_ptr is not None
    c = tl.arange(0, WIDTH)
    first = request.to(tl.int64) * num_drafts
    end = first + num_drafts  # the rows beyond are another request's, which may not be there yet
    ids = best_ids(selection.ids_ptr, first, end, c, num_candidates, vocab)
    PREPARED: tl.constexpr = successors is None and (SAMPLED or out.ids_ptr is not None)
    if PREPARED:
        several = _several_ids(0, first, selection, widths, sizes, OPTIONS)
    anchor = tl.load(state.positions_ptr + slot * state.stride_positions).to(tl.int64)
    previous = tl.load(state.anchors_ptr + slot * state.stride_anchors).to(tl.int64)
    temperature, seed = _temperature_and_seed(state, slot)
    scale = log2_scale(temperature)
    noise_anchor = anchor
    if OPTIONS.STREAM == COUPLED:
        noise_anchor = anchor * 0
    flags = _first_flags(status_ptr, request, previous, head, merged, num_drafts, OPTIONS)

    width = num_candidates
    if successors is not None:
        width += successors.count
    row_ptr = base.ptr + request.to(tl.int64) * base.stride_request
    if successors is None:
        first_places = ids
        if merged is not None:
            first_places = _places(c, first, end, merged, num_candidates)
        next_logits = _base_logits(ids, first_places, row_ptr, base, merged, num_candidates)
        if PREPARED:
            _prepare_all(
                several, slot, seed, anchor, noise_anchor, first, merged, selection, out, scratch, widths, sizes, SAMPLED, OPTIONS
            )  # fmt: skip
        if SAMPLED:
            tl.debug_barrier()
            next_noise = tl.load(scratch.noise_ptr + first * WIDTH + c, volatile=True)
    nan = tl.zeros([WIDTH], tl.int32)
    followed = tl.zeros([DRAFTS], tl.int64) - 1  # the token that each position follows
    for k in range(num_drafts):
        row = first + k
        followed = tl.where(tl.arange(0, DRAFTS) == k, previous, followed)
        k_ptr = row_ptr + tl.cast(k, tl.int64) * base.stride_position
        settings = RowSettings(widths.map_ptr, widths.num_targets, adjust, slot, slot * num_drafts + k)
        if successors is not None:
            ids = best_ids(selection.ids_ptr, row, end, c, num_candidates, vocab)
            ids = with_successors(
                ids, c, successors, previous, k_ptr, settings, selection.bounds_ptr, row, num_candidates, vocab, OPTIONS.SHIFT
            )
        else:
            next_ids = best_ids(selection.ids_ptr, row + 1, end, c, num_candidates, vocab)
            next_places = next_ids
            if merged is not None:
                next_places = _places(c, row + 1, end, merged, num_candidates)
        places = ids
        if merged is not None:
            places = _places(c, row, end, merged, num_candidates)
        if successors is not None:
            logits = _base_logits(ids, places, k_ptr, base, merged, num_candidates)
        else:
            logits = next_logits
        x = logits.to(tl.float32)
        if head is not None:
            turn = Turn(k, num_drafts, sizes.first_draft, slot)
            bias = _bias(turn, row, request, previous, ids, places, merged, head, latent, hidden, scratch, num_candidates, OPTIONS)
            x += bias
            if latent is None:
                # By way of a gather, which leaves an entry in one lane of a warp: a product has each of its columns in eight. Latents
                # take longer than what that saves, and the registers.
                x = tl.gather(x, c, axis=0)

        targets, used = _targets(ids, places, row, merged, widths)
        if state.temperature_ptr is not None:
            if successors is None:
                noise = next_noise
            else:
                drawn = words_at(seed, targets, anchor + (sizes.first_draft + k + 1), noise_anchor, OPTIONS.STREAM)
                noise = log2_exponential(drawn)
        if successors is None:
            # On their way while the draft of k is decided.
            ids = next_ids
            next_logits = _base_logits(next_ids, next_places, k_ptr + base.stride_position, base, merged, num_candidates)
            if state.temperature_ptr is not None:
                next_noise = tl.load(scratch.noise_ptr + (row + 1) * WIDTH + c, mask=c < tl.where(row + 1 < end, WIDTH, 0),
                                     other=0.0, volatile=True)  # fmt: skip

        x = with_settings(x, targets, used, settings, out.tokens_ptr + slot * out.stride_tokens, column + k, _drafted)
        nan = nan | (used & (x != x)).to(tl.int32)
        # Rounded once; everything below reads the rounded value.
        x = tl.where(used, numbers(x), NEG_INF).to(base.ptr.dtype.element_ty).to(tl.float32)
        if filters is not None:
            x = _filtered(x, targets, used, slot, temperature, scale, filters, OPTIONS)
        _store_row(x, targets, used, slot, column + k, width, successors is not None, base, out, WIDTH)
        key = x
        if state.temperature_ptr is not None:
            key = tl.where(temperature > 0.0, x * scale - noise, x)
        previous, nonfinite = _largest(x, key, targets, used, WIDTH)
        flags = flags | nonfinite
        tl.store(out.tokens_ptr + slot * out.stride_tokens + column + k, previous)
        if adjust is not None:
            tl.debug_barrier()  # the path of k + 1 reads it
    flags = flags | tl.max(tl.where(nan > 0, NAN, 0), axis=0)
    tl.store(out.flags_ptr + request, flags)
    tl.debug_barrier()
    if merged is None:
        tl.store(status_ptr + request, 0)
    _finish(request, slot, followed, width, scale, head, hidden, confidence, out, scratch, sizes, SAMPLED, OPTIONS)


_ADVANCES = {None: no_latent, "vanilla": no_latent, "gated": advance_gated, "rnn": advance_rnn}


def walk_options(kind, coupled, with_markov, joint, shift, rank, config) -> WalkOptions:
    """kind: of the head, None, "vanilla", "gated" or "rnn"."""
    return WalkOptions(
        ADVANCE=_ADVANCES[kind],
        STREAM=COUPLED if coupled else DRAFT,
        WITH_MARKOV=with_markov,
        JOINT=joint,
        LOG_WIDTH=config.width.bit_length() - 1,
        WIDTH=config.width,
        SHIFT=shift,
        ROWS=min(config.drafts, max(1, ENTRIES // config.width)),
        BLOCK_R=config.block_r,
        MORE_RANKS=rank > config.block_r,
        BLOCK_O=config.block_o,
        BLOCK_J=config.block_j,
        DRAFTS=config.drafts,
    )
