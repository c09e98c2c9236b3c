"""Sparse draft block: K positions drafted left to right, each on the C best of its base logits, in one launch without a barrier.

x_k = argmax over v in S_k of logits_k(v) (greedy) or of logits_k(v) / T - ln E_k(v) (sampled), logits_k = round(base_k +
bias(x_{k-1})), S_k = the C ids of the largest base_k (ties: lowest ids) and the B ids listed for x_{k-1}. Symbols: R requests, K
positions, V vocabulary, C candidates, r rank, H hidden size, S state slots, U units of GROUP ids. Oracle: reference/candidates.py.
Source: DSpark, arXiv 2607.05147.

Three steps, each begun by the last to arrive from the one before. A part of a row: the key of the largest logit of each unit, one
pass over the logits. A row: its C largest units hold its C largest logits (each has one at least as large as any other
unit), so C * GROUP logits are read again and the C largest kept. A request: the walk over its positions, on the rows of W2 that its
candidates need, which are fetched a position ahead. What a head multiplies with hidden states is done by programs of its own,
for all positions, before the walk.
"""

import triton
import triton.language as tl

from ..primitives.adjust import adjusted, no_path
from ..primitives.mass import NEG_INF, ONE, POS_INF, below_max, log2_scale, numbers
from ..primitives.ordered_sum import ordered_sum
from ..primitives.philox import COUPLED, DRAFT, log2_exponential, words_at
from ..primitives.race import pack, unpack_id
from ..primitives.select import ABSENT, ordered_key, select
from ..primitives.slots import state_slots
from ..primitives.support import last_kept
from ..primitives.ticket import arrive
from .candidate_heads import advance_gated, advance_rnn, hidden_products, no_latent, prefetch_rows, weighted, weighted_rows
from .rows import BAD_TOKEN_ID, NAN, NONFINITE_ROW, log_sum_exp

SCORE_RANKS = tl.constexpr(256)  # ranks of the confidence head at a time
UNIT_COLUMNS = tl.constexpr(64)
PAIRS = tl.constexpr(16)  # (request, position) pairs that share one product with hidden states


@triton.jit
def _slot(slots_ptr, request, num_requests, num_slots):
    return tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)


@triton.jit
def padded_units(num_units):
    """int32 words between the units of two rows: whole vectors, however many units there are."""
    return tl.cdiv(num_units, 16) * 16


@triton.jit
def _chunk(row_ptr, chunk, end, vocab, BLOCK: tl.constexpr):
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    return tl.load(row_ptr + ids, mask=ids < tl.where(chunk < end, vocab, 0), other=NEG_INF)


@triton.jit
def _with_settings(x, targets, inside, choice, path, path_max, PATH: tl.constexpr):
    """x fp32 of target ids after penalties, bias and mask; choice as in `_judged`."""
    _, _, adjust, slot, mask_row = choice
    if adjust is not None:
        SIZE: tl.constexpr = x.numel
        one = tl.zeros([1], tl.int64)
        wide = tl.reshape(x, [1, SIZE])
        wide = adjusted(
            wide, tl.reshape(targets, [1, SIZE]), tl.reshape(inside, [1, SIZE]), one + slot, one + mask_row, adjust, path,
            path_max, PATH,
        )  # fmt: skip
        x = tl.reshape(wide, x.shape)
    return x


@triton.jit
def _judged(x, ids, inside, choice, path, path_max, PATH: tl.constexpr, first_target=0):
    """(x fp32 after penalties, bias and mask, -inf where there is no token; target ids int32; where there is a token).

    choice = (map [V] or None, number of target ids, settings of primitives/adjust.py or None, slot, row of the bit mask);
    first_target: of id 0, where there is no map.
    """
    map_ptr, num_targets, _, _, _ = choice
    targets = ids + first_target
    if map_ptr is not None:
        mapped = tl.load(map_ptr + ids, mask=inside, other=-1)
        inside = inside & (mapped >= 0) & (mapped < num_targets)
        targets = tl.where(inside, mapped, 0).to(tl.int32)
    x = _with_settings(x, targets, inside, choice, path, path_max, PATH)
    if map_ptr is not None:
        x = tl.where(inside, x, NEG_INF)
    return x, targets, inside


@triton.jit
def _store_unit_keys(
    row_ptr, keys_ptr, choice, first, end, vocab, BLOCK: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr,
    first_target=0,
):  # fmt: skip
    """Key of the largest logit of each unit of chunks first .. end - 1 of a row; returns whether a logit is NaN."""
    unit = tl.arange(0, BLOCK // GROUP)
    nan = tl.zeros([BLOCK], tl.int1)
    loaded = _chunk(row_ptr, first, end, vocab, BLOCK)
    for chunk in range(first, end):
        x = loaded.to(tl.float32)
        loaded = _chunk(row_ptr, chunk + 1, end, vocab, BLOCK)  # on its way while this one is reduced
        ids = chunk * BLOCK + tl.arange(0, BLOCK)
        x, _, _ = _judged(x, ids, ids < vocab, choice, tl.zeros([1], tl.int64), 0, no_path, first_target)
        nan = nan | (x != x)
        keys = ordered_key(tl.max(tl.reshape(numbers(x), [BLOCK // GROUP, GROUP]), axis=1), SHIFT)
        here = chunk * (BLOCK // GROUP) + unit
        tl.store(keys_ptr + here, keys, mask=here < tl.cdiv(vocab, GROUP))
    return tl.max(nan.to(tl.int32), axis=0)


@triton.jit
def _hidden_score(hidden_ptr, weight_ptr, hidden_size):
    BLOCK: tl.constexpr = 1024
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, hidden_size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        h = tl.load(hidden_ptr + i, mask=i < hidden_size, other=0.0).to(tl.float32)
        total += h * tl.load(weight_ptr + i, mask=i < hidden_size, other=0.0).to(tl.float32)
    return ordered_sum(total)


@triton.jit
def _keep_best(
    row, row_ptr, choice, head, keys_ptr, units_ptr, ids_ptr, bounds_ptr, num_rows, vocab, num_candidates,
    GROUP: tl.constexpr, UNITS: tl.constexpr, CHOSEN: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, first_target=0,
):  # fmt: skip
    """The C best of a row, ascending ids, and what they have in common: key > bound or (key = bound and id <= cut)."""
    num_units = tl.cdiv(vocab, GROUP)
    unit = tl.arange(0, UNITS // UNIT_COLUMNS)[:, None] * UNIT_COLUMNS + tl.arange(0, UNIT_COLUMNS)[None, :]
    keys = tl.load(keys_ptr + row * padded_units(num_units) + unit, mask=unit < num_units, other=ABSENT, volatile=True)
    wanted = tl.minimum(num_candidates, num_units)
    _, selected, place = select(keys, wanted)
    tl.store(units_ptr + row * num_candidates + place, unit, mask=selected)
    tl.debug_barrier()
    c = tl.arange(0, CHOSEN)
    units = tl.load(units_ptr + row * num_candidates + c, mask=c < wanted, other=0, volatile=True)
    ids = tl.multiple_of(units * GROUP, GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    inside = (c < wanted)[:, None] & (ids < vocab)
    x = tl.load(row_ptr + ids, mask=inside, other=NEG_INF).to(tl.float32)
    x, _, _ = _judged(x, ids, inside, choice, tl.zeros([1], tl.int64), 0, no_path, first_target)
    keys = tl.where(inside, ordered_key(numbers(x), SHIFT), ABSENT)
    bound, selected, place = select(keys, tl.minimum(num_candidates, vocab))
    tl.store(ids_ptr + row * num_candidates + place, ids, mask=selected)
    tl.store(bounds_ptr + row * 2, bound)
    tl.store(bounds_ptr + row * 2 + 1, tl.max(tl.where(selected & (keys == bound), ids, -1)))
    if head is not None:
        # The walk needs these rows of W2, and one of the same rows of W1: where memory has nothing else to do, it gets them all.
        tl.debug_barrier()
        best = _best_ids(ids_ptr, row, num_rows, tl.arange(0, WIDTH), num_candidates, vocab)
        line: tl.constexpr = 1024 // head[2].dtype.element_ty.primitive_bitwidth
        prefetch_rows(head[2], head[3], best, head[6], 4, line)


@triton.jit
def _best_ids(ids_ptr, row, end, c, num_candidates, vocab):
    """Entry c of the C best of a row below `end`: an id, or -1 where there is none."""
    there = c < tl.where(row < end, tl.minimum(num_candidates, vocab), 0)
    return tl.load(ids_ptr + row * num_candidates + c, mask=there, other=-1, volatile=True)


@triton.jit
def _listed_ids(ids, c, bigrams, previous, row_ptr, choice, bounds_ptr, row, num_candidates, vocab, SHIFT: tl.constexpr):
    """ids [WIDTH] with the successors listed for `previous` behind the C best, those that are there already left out (-1)."""
    bigrams_ptr, stride_gv, vocab_g, listed = bigrams
    count = tl.where((previous >= 0) & (previous < vocab_g), listed, 0)
    list_ptr = bigrams_ptr + previous * stride_gv
    i = c - num_candidates
    more = tl.load(list_ptr + i, mask=(i >= 0) & (i < count), other=-1)
    more = tl.where((more >= 0) & (more < vocab), more, -1).to(tl.int32)
    x = tl.load(row_ptr + more, mask=more >= 0, other=NEG_INF).to(tl.float32)
    x, _, _ = _judged(x, more, more >= 0, choice, tl.zeros([1], tl.int64), 0, no_path)
    key = ordered_key(numbers(x), SHIFT)
    bound = tl.load(bounds_ptr + row * 2, volatile=True)
    cut = tl.load(bounds_ptr + row * 2 + 1, volatile=True)
    more = tl.where((key > bound) | ((key == bound) & (more <= cut)), -1, more)
    for j in range(count):
        earlier = tl.load(list_ptr + j)
        more = tl.where((more == earlier) & (i > j), -1, more)
    return tl.where(i >= 0, more, ids)


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
    if filters[0] is not None:
        top_k = tl.load(filters[0] + slot)
    if filters[1] is not None:
        top_p = tl.load(filters[1] + slot)
    if filters[2] is not None:
        min_p = tl.load(filters[2] + slot)
    return top_k, top_p, min_p


# --- on vocabulary shards: shared = (places int32 [R, K, C]: rank * C + entry in that rank's list of a position, int64 words of a
# rank's part, target ids int32 [N, R, K, C] or None where an id is one, W2 of `head` where it is gathered [N, R, K, C, r], N) --


@triton.jit
def _gathered_at(c, there, row, shared, num_candidates):
    """Whose list candidate c of a row is from, int64, and which entry of it."""
    places = tl.load(shared[0] + row * num_candidates + c, mask=there, other=0, volatile=True)
    return (places // num_candidates).to(tl.int64), places % num_candidates


@triton.jit
def _of_rank(ranks, region_ptr, shared):
    """Where a region of these ranks' parts starts, in elements of its own type."""
    return ranks * (shared[1] * (64 // region_ptr.dtype.element_ty.primitive_bitwidth))


@triton.jit
def _gathered_flags(status_ptr, request, shared, num_drafts, DRAFTS: tl.constexpr):
    k = tl.arange(0, DRAFTS)
    flags = tl.zeros([DRAFTS], tl.int32)
    for rank in range(shared[4]):
        at = tl.cast(rank, tl.int64) * (shared[1] * 2) + request.to(tl.int64) * num_drafts + k
        flags = flags | tl.load(status_ptr + at, mask=k < num_drafts, other=0)
    return tl.max(flags & NAN, axis=0)


@triton.jit
def _weighted(ids, ranks, entries, row, shared, head, latent_ptr, known, num_candidates, BLOCK_R: tl.constexpr):
    """W2 . latent of the candidates, whose rows are those of their ids or of their entries."""
    if shared is None:
        bias = weighted(ids, latent_ptr, known, head, BLOCK_R)
    elif shared[3] is None:
        bias = weighted(ids, latent_ptr, known, head, BLOCK_R)
    else:
        at = row * num_candidates + entries
        scales = at
        if head[4] is not None:
            scales += _of_rank(ranks, head[4], shared)
        rows = _of_rank(ranks, shared[3], shared) + at * head[6]
        bias = weighted_rows(rows, scales, ids >= 0, latent_ptr, known, head, BLOCK_R)
    return bias


@triton.jit
def _walk(
    request, slot, status_ptr, base, state, bigrams, map_ptr, shared, adjust, filters, head, latent, hidden, confidence, out,
    scratch, num_drafts, vocab, num_targets, num_candidates, first_draft, column,
    ADVANCE: tl.constexpr, STREAM: tl.constexpr, WITH_MARKOV: tl.constexpr, JOINT: tl.constexpr, LOG_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr, SHIFT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr,
    DRAFTS: tl.constexpr,
):  # fmt: skip
    """All positions of one request, whose candidates are there.

    shared: None, or where their logits, target ids and rows of W2 lie among the parts of all ranks; `base` is then the logits of
    the first [R, K, C], and so are W2 and its scales of `head` where rows are gathered.
    """
    base_ptr, stride_br, stride_bk = base
    anchors_ptr, stride_a, positions_ptr, stride_p, slots_ptr, temperature_ptr, seed_ptr = state
    tokens_ptr, stride_ts, out_ids_ptr, stride_is, stride_ik, logits_ptr, stride_ls, stride_lk, lse_ptr, stride_es, flags_ptr = out
    ids_ptr, bounds_ptr, score_ptr, products_ptr, latent_ptr, states_ptr = scratch
    anchor = tl.load(positions_ptr + slot * stride_p).to(tl.int64)
    previous = tl.load(anchors_ptr + slot * stride_a).to(tl.int64)
    temperature = tl.zeros((), tl.float32)
    seed = tl.zeros((), tl.int64)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + slot)
        seed = tl.load(seed_ptr + slot)
    scale = log2_scale(temperature)
    noise_anchor = anchor
    if STREAM == COUPLED:
        noise_anchor = anchor * 0
    if shared is None:
        flags = tl.atomic_xchg(status_ptr + request, 0, sem="relaxed")
    else:
        flags = _gathered_flags(status_ptr, request, shared, num_drafts, DRAFTS)
    if head is not None:
        flags = flags | tl.where((previous < 0) | (previous >= head[5]), BAD_TOKEN_ID, 0)

    c = tl.arange(0, WIDTH)
    width = num_candidates
    if bigrams is not None:
        width += bigrams[3]
    first = request.to(tl.int64) * num_drafts
    row_ptr = base_ptr + request.to(tl.int64) * stride_br
    end = first + num_drafts  # the rows beyond are another request's, which may not be there yet
    ids = _best_ids(ids_ptr, first, end, c, num_candidates, vocab)
    for k in range(num_drafts):
        # Candidates do not depend on drafts: those of k + 1 are on the way while k is decided.
        row = first + k
        k_ptr = row_ptr + tl.cast(k, tl.int64) * stride_bk
        next_ids = _best_ids(ids_ptr, row + 1, end, c, num_candidates, vocab)
        choice = (map_ptr, num_targets, adjust, slot, slot * num_drafts + k)
        if bigrams is not None:
            ids = _listed_ids(ids, c, bigrams, previous, k_ptr, choice, bounds_ptr, row, num_candidates, vocab, SHIFT)

        there = ids >= 0
        columns = ids
        ranks = ids
        entries = ids
        if shared is not None:
            ranks, entries = _gathered_at(c, there, row, shared, num_candidates)
            columns = _of_rank(ranks, base_ptr, shared) + entries
        x = tl.load(k_ptr + columns, mask=there, other=NEG_INF).to(tl.float32)
        if head is not None:
            known = tl.where((previous >= 0) & (previous < head[5]), head[6], 0)
            embedded_ptr = head[0] + previous * head[1]
            if latent is None:
                x += _weighted(ids, ranks, entries, row, shared, head, embedded_ptr, known, num_candidates, BLOCK_R)
            else:
                own_ptr = latent_ptr + request.to(tl.int64) * head[6]
                own_states_ptr = states_ptr
                if states_ptr is not None:
                    own_states_ptr += request.to(tl.int64) * (2 * head[6])
                ADVANCE(
                    (k, num_drafts, first_draft, slot), embedded_ptr, known, latent, hidden, products_ptr + row * latent[3],
                    own_ptr, own_states_ptr, head[6], BLOCK_O, BLOCK_J,
                )  # fmt: skip
                x += _weighted(ids, ranks, entries, row, shared, head, own_ptr, head[6], num_candidates, BLOCK_R)

        if shared is None:
            x, targets, used = _judged(x, ids, there, choice, tokens_ptr + slot * stride_ts, column + k, _drafted)
        else:
            targets = ids
            used = there
            if shared[2] is not None:
                at = _of_rank(ranks, shared[2], shared) + row * num_candidates + entries
                targets = tl.load(shared[2] + at, mask=there, other=-1)
                used = (targets >= 0) & (targets < num_targets)
                targets = tl.where(used, targets, 0)
            x = _with_settings(x, targets, used, choice, tokens_ptr + slot * stride_ts, column + k, _drafted)
            x = tl.where(used, x, NEG_INF)

        flags = flags | tl.max(tl.where(used & (x != x), NAN, 0), axis=0)
        finite = tl.max(tl.where(used & (tl.abs(x) < POS_INF), 1, 0), axis=0)
        flags = flags | tl.where(finite == 0, NONFINITE_ROW, 0)
        # Rounded once; everything below reads the rounded value.
        stored = tl.where(used, numbers(x), NEG_INF).to(base_ptr.dtype.element_ty)
        x = stored.to(tl.float32)
        if filters is not None:
            top = tl.max(x, axis=0)
            if (temperature > 0.0) & (tl.abs(top) < POS_INF):
                top_k, top_p, min_p = _filters_of(filters, slot)
                words = tl.where(used, pack(x, targets), 0)
                last = last_kept(words, top, scale, top_k, top_p, min_p, JOINT, WIDTH, LOG_WIDTH)
                x = tl.where(words >= last, x, NEG_INF)
                stored = x.to(base_ptr.dtype.element_ty)
        if logits_ptr is not None:
            place = slot * stride_is + (column + k).to(tl.int64) * stride_ik + c
            tl.store(out_ids_ptr + place, tl.where(used, targets, 0), mask=c < width)
            place = slot * stride_ls + (column + k).to(tl.int64) * stride_lk + c
            tl.store(logits_ptr + place, stored, mask=c < width)
        key = x
        if temperature_ptr is not None:
            if lse_ptr is not None:
                top = tl.max(x, axis=0)
                mass = tl.sum((tl.exp2(below_max(x, top) * scale) * ONE).to(tl.int64), axis=0)
                tl.store(lse_ptr + slot * stride_es + column + k, log_sum_exp(top, mass, scale))
            words = words_at(seed, targets, anchor + (first_draft + k + 1), noise_anchor, STREAM)
            key = tl.where(temperature > 0.0, x * scale - log2_exponential(words), x)
        word = tl.max(tl.where(used, pack(key, targets), 0), axis=0)
        previous = tl.where(word > 0, unpack_id(word), 0)
        tl.store(tokens_ptr + slot * stride_ts + column + k, previous)
        if adjust is not None:
            tl.debug_barrier()  # the path of k + 1 reads it
        ids = next_ids
    tl.store(flags_ptr + request, flags)
    if confidence is not None:
        tl.debug_barrier()
        _score(request, slot, state, head, hidden, confidence, tokens_ptr, stride_ts, score_ptr, num_drafts, first_draft, column,
               WITH_MARKOV, DRAFTS)  # fmt: skip


@triton.jit
def _score(
    request, slot, state, head, hidden, confidence, tokens_ptr, stride_ts, score_ptr, num_drafts, first_draft, column,
    WITH_MARKOV: tl.constexpr, DRAFTS: tl.constexpr,
):  # fmt: skip
    """Confidence of all positions of one request, whose drafts are there."""
    weight_ptr, bias_ptr, sts_ptr, scores_ptr, stride_cs, raw_ptr, stride_rs = confidence
    k = tl.arange(0, DRAFTS)
    inside = k < num_drafts
    raw = tl.load(score_ptr + request.to(tl.int64) * num_drafts + k, mask=inside, other=0.0, volatile=True)
    if WITH_MARKOV:
        w1_ptr, stride_1v, vocab_w1, rank = head[0], head[1], head[5], head[6]
        anchor = tl.load(state[0] + slot * state[1]).to(tl.int64)
        tokens_ptr += slot * stride_ts + column
        previous = tl.load(tokens_ptr + k - 1, mask=inside & (k > 0), other=-1, volatile=True)
        previous = tl.where(k == 0, anchor, previous)
        known = inside & (previous >= 0) & (previous < vocab_w1)
        for first in range(0, rank, SCORE_RANKS):
            i = first + tl.arange(0, SCORE_RANKS)
            there = known[:, None] & (i < rank)[None, :]
            e = tl.load(w1_ptr + previous[:, None] * stride_1v + i[None, :], mask=there, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + hidden[3] + i, mask=i < rank, other=0.0).to(tl.float32)
            raw += tl.sum(e * w[None, :], axis=1)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr).to(tl.float32)
    tl.store(raw_ptr + slot * stride_rs + column + k, raw, mask=inside)
    if sts_ptr is not None:
        raw = raw / tl.load(sts_ptr + first_draft + k, mask=inside, other=1.0)
    tl.store(scores_ptr + slot * stride_cs + column + k, 1.0 / (1.0 + tl.exp(-raw)), mask=inside)


@triton.jit
def _latent_item(program, slots_ptr, latent, hidden, products_ptr, num_requests, num_slots, num_drafts, BLOCK_J: tl.constexpr):
    """The products with hidden states that are this program's; returns the first request they are for, and how many requests."""
    outputs = tl.cdiv(latent[3], 16)
    pairs = program // outputs * PAIRS + tl.arange(0, PAIRS)
    requests = pairs // num_drafts
    slots = state_slots(slots_ptr, requests, num_requests, num_slots)
    hidden_products(pairs, requests, slots, program % outputs, latent, hidden, products_ptr, num_drafts, BLOCK_J)
    first = program // outputs * PAIRS // num_drafts
    count = tl.minimum((program // outputs * PAIRS + PAIRS - 1) // num_drafts, num_requests - 1) - first + 1
    return first, count


@triton.jit
def _awaited(request, latent, num_drafts):
    """How many programs a request's walk waits for: its rows, and those that multiply its hidden states."""
    total = num_drafts
    if latent is not None:
        tiles = (request * num_drafts + num_drafts - 1) // PAIRS - request * num_drafts // PAIRS + 1
        total += tiles * tl.cdiv(latent[3], 16)
    return total


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_drafts", "first_draft", "column", "latent_items", "parts"])
def draft_candidates_kernel(
    base,  # (logits [R, K, V], strides of R and K)
    state,  # (anchors [S], stride, positions [S], stride, slots [R] or None, temperature [S] or None, seed [S])
    bigrams,  # ([Vg, B], stride, Vg, B) or None
    map_ptr,  # int64 [V] or None
    adjust,  # settings of primitives/adjust.py, or None
    filters,  # (top_k, top_p, min_p [S], each or None) or None
    head,  # (W1 [V1, r], stride, W2 [V, r], stride, scale [V] or None, V1, r) or None
    latent,  # of gated and rnn: (weight [O, ...], stride, bias [O], O, first column of hidden states, state [S, r] or None, stride)
    hidden,  # ([R, K, H], strides of R and K, H) or None
    confidence,  # (weight [H] or [H+r], bias [1] or None, sts [K] or None, calibrated [S, K], stride, raw [S, K], stride) or None
    out,  # (tokens, stride, ids, 2 strides, logits, 2 strides, lse, stride, flags)
    keys_ptr,  # int32 [R, K, U]
    units_ptr,  # int32 [R, K, C]
    scratch,  # (ids int32 [R, K, C], bounds int32 [R, K, 2], score fp32 [R, K], and with a latent products fp32 [R, K, O], latent
    # [R, r], states fp32 [R, 2, r])
    row_count_ptr, request_count_ptr, status_ptr,  # int32 [R, K], [R], [R], zero before and after
    num_requests, num_slots, num_drafts, vocab, num_targets, num_candidates, first_draft, column, latent_items, parts,
    ADVANCE: tl.constexpr, STREAM: tl.constexpr, WITH_MARKOV: tl.constexpr, JOINT: tl.constexpr, LOG_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr, CHOSEN: tl.constexpr, WIDTH: tl.constexpr,
    SHIFT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_J: tl.constexpr,
    DRAFTS: tl.constexpr,
):  # fmt: skip
    base_ptr, stride_br, stride_bk = base
    slots_ptr = state[4]
    num_rows = num_requests * num_drafts
    program = tl.program_id(0)
    # Requests that this program arrives at when its part is done, and how many parts a request has.
    first = tl.zeros((), tl.int32)
    count = tl.zeros((), tl.int32)
    if program < latent_items:
        if latent is not None:
            first, count = _latent_item(
                program, slots_ptr, latent, hidden, scratch[3], num_requests, num_slots, num_drafts, BLOCK_J
            )
    else:
        item = program - latent_items
        row = item // parts
        part = item % parts
        request = row // num_drafts
        k = row % num_drafts
        slot = _slot(slots_ptr, request, num_requests, num_slots)
        if slot >= 0:
            row_ptr = base_ptr + request.to(tl.int64) * stride_br + k.to(tl.int64) * stride_bk
            wide_row = row.to(tl.int64)
            chunks = tl.cdiv(vocab, BLOCK)
            choice = (map_ptr, num_targets, adjust, slot, slot * num_drafts + k)
            nan = _store_unit_keys(
                row_ptr, keys_ptr + wide_row * padded_units(tl.cdiv(vocab, GROUP)), choice, part * chunks // parts,
                (part + 1) * chunks // parts, vocab, BLOCK, GROUP, SHIFT,
            )  # fmt: skip
            if nan > 0:
                tl.atomic_or(status_ptr + request, NAN, sem="relaxed")
            if confidence is not None:
                if part == 0:
                    hidden_ptr, stride_hr, stride_hk, hidden_size = hidden
                    own_ptr = hidden_ptr + request.to(tl.int64) * stride_hr + k.to(tl.int64) * stride_hk
                    tl.store(scratch[2] + row, _hidden_score(own_ptr, confidence[0], hidden_size))
            if arrive(row_count_ptr + row, parts):
                _keep_best(
                    wide_row, row_ptr, choice, head, keys_ptr, units_ptr, scratch[0], scratch[1], num_rows, vocab, num_candidates,
                    GROUP, UNITS, CHOSEN, WIDTH, SHIFT,
                )  # fmt: skip
                first = request
                count = tl.full((), 1, tl.int32)
        else:
            if (k == 0) & (part == 0):
                tl.store(out[10] + request, 0)

    for request in range(first, first + count):
        slot = _slot(slots_ptr, request, num_requests, num_slots)
        if slot >= 0:
            if arrive(request_count_ptr + request, _awaited(request, latent, num_drafts)):
                _walk(
                    request, slot, status_ptr, base, state, bigrams, map_ptr, None, adjust, filters, head, latent, hidden,
                    confidence, out, scratch, num_drafts, vocab, num_targets, num_candidates, first_draft, column,
                    ADVANCE, STREAM, WITH_MARKOV, JOINT, LOG_WIDTH, WIDTH, SHIFT, BLOCK_R, BLOCK_O, BLOCK_J, DRAFTS,
                )  # fmt: skip


ADVANCES = {None: no_latent, "vanilla": no_latent, "gated": advance_gated, "rnn": advance_rnn}


def latent_programs(rows, outputs):
    """How many programs multiply `outputs` weights with the hidden states of `rows` positions."""
    return -(-rows // PAIRS.value) * -(-outputs // 16)


def launch_draft_candidates(programs, args, *, kind, coupled, with_markov, joint, shift, config):
    """Launch one program per part: the products of gated and rnn heads first, then a chunk of a row each."""
    draft_candidates_kernel[(programs,)](
        *args,
        ADVANCE=ADVANCES[kind],
        STREAM=COUPLED if coupled else DRAFT,
        WITH_MARKOV=with_markov,
        JOINT=joint,
        LOG_WIDTH=config.width.bit_length() - 1,
        BLOCK=config.block,
        GROUP=config.group,
        UNITS=config.units,
        CHOSEN=config.chosen,
        WIDTH=config.width,
        SHIFT=shift,
        BLOCK_R=config.block_r,
        BLOCK_O=config.block_o,
        BLOCK_J=config.block_j,
        DRAFTS=config.drafts,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
        **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
    )
