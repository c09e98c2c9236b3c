"""Lossless acceptance of a chain of drafts straight from target logits, in one launch.

Token rule: accept draft x while u * draft_prob(x) < target_prob(x); at the first failure draw from [target - draft]+, after the
last draft draw the bonus from the target. Greedy rows: accept while x is the arg-max, emit the arg-max. Symbols: R requests, K
drafts, L admitted drafts of a request, V vocabulary, leaf = 1024 ids, NL leaves. Oracle: reference/accept.py. Sources: Leviathan
et al. arXiv 2211.17192, Chen et al. arXiv 2302.01318; the two-level race is exponential clocks (Gumbel-max) over leaves.

Wave 1, an item = rows x leaves of a request: maximum and integer mass of each leaf, one pass over the logits. The last item of
a row group merges its rows; the last group of a request decides. Where the residual of a dense proposal is needed, wave-2 items
of that request (later tickets, so that the wait cannot deadlock on any grid) sum it per leaf, and the last of them draws.
Only the winning leaf is read again. Nothing of the size of a row is written.
"""

import triton
import triton.language as tl

from .primitives.mass import LEAF, NEG_INF, ONE, POS_INF, below_max, log2_scale, masses, numbers, octet_sums
from .primitives.philox import ACCEPT, CORRECT, LEAF as LEAF_STREAM, coin_words, lane_words, log2_exponential, uniform
from .primitives.race import pack, unpack_id
from .primitives.slots import state_slots
from .primitives.ticket import arrive

# Bits of `flags`; the public names are dspark_kernels.types.Flag (a test keeps both equal).
NONFINITE_ROW = tl.constexpr(1)
NAN = tl.constexpr(2)
BAD_TOKEN_ID = tl.constexpr(4)
MISSING_DRAFT = tl.constexpr(8)
EMPTY_RESIDUAL = tl.constexpr(16)

# A leaf's mass is below 2^51; the bits above it carry what the leaf showed.
SAW_FINITE = tl.constexpr(1 << 61)
SAW_NAN = tl.constexpr(1 << 62)
MASS_BITS = tl.constexpr((1 << 61) - 1)

RESIDUAL_ONE = tl.constexpr(1152921504606846976.0)  # 2^60: residual masses of a row sum to at most 1

# Who has the draft's probability mass: nobody, everybody by softmax, or (any id >= 0) that id alone.
NOBODY = tl.constexpr(-2)
SOFTMAX = tl.constexpr(-1)

# State of a request between its waves.
PENDING = tl.constexpr(0)
NEEDS_RESIDUAL = tl.constexpr(1)
DONE = tl.constexpr(2)


@triton.jit
def _load_leaf(row_ptr, ids, inside):
    return numbers(tl.load(row_ptr + ids, mask=inside, other=NEG_INF).to(tl.float32))


@triton.jit
def _leaf_masses(x, scale, PAIRS: tl.constexpr):
    """Maximum fp32 [PAIRS] and mass int64 [PAIRS] of leaves x [PAIRS, LEAF]."""
    top = tl.max(x, axis=1)
    return top, masses(tl.exp2(below_max(x, top[:, None]) * scale), PAIRS, LEAF, ONE)


@triton.jit
def _merge_leaves(top_ptr, mass_ptr, rows, num_leaves, scale, GROUP: tl.constexpr, LEAVES: tl.constexpr):
    """Leaf partials of GROUP rows -> row maximum, row mass (integer, relative to it), what the leaves showed, their maxima."""
    leaf = tl.arange(0, LEAVES)[None, :]
    where = rows[:, None] * num_leaves + leaf
    inside = (rows >= 0)[:, None] & (leaf < num_leaves)
    tops = tl.load(top_ptr + where, mask=inside, other=NEG_INF, volatile=True)
    words = tl.load(mass_ptr + where, mask=inside, other=0, volatile=True)
    top = tl.max(tops, axis=1)
    relative = (words & MASS_BITS).to(tl.float32) * tl.exp2(below_max(tops, top[:, None]) * scale)
    return top, tl.sum(relative.to(tl.int64), axis=1), words, tops


@triton.jit
def _first_of(row_ptrs, tops, top, width, GROUP: tl.constexpr, LEAVES: tl.constexpr):
    """Lowest id whose logit is the row's maximum: the first leaf that has it is read again. int32 [GROUP]."""
    leaf = tl.arange(0, LEAVES)[None, :]
    winner = tl.min(tl.where(tops == top[:, None], leaf, LEAVES - 1), axis=1)
    ids = winner[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
    x = numbers(tl.load(row_ptrs[:, None] + ids, mask=ids < width, other=NEG_INF).to(tl.float32))
    return tl.min(tl.where((x == top[:, None]) & (ids < width), ids, 2147483647), axis=1)


@triton.jit
def _race_leaves(log_weight, seed, position, anchor, LEAVES: tl.constexpr):
    """Packed winner among leaves by log2 weight (-inf = empty)."""
    words = lane_words(seed, 0, position, anchor, LEAF_STREAM, 1, LEAVES)
    key = log_weight - tl.reshape(log2_exponential(words), [LEAVES])
    return tl.max(pack(tl.where(log_weight > NEG_INF, key, NEG_INF), tl.arange(0, LEAVES)), axis=0)


@triton.jit
def _race_ids(log_weight, leaf, seed, position, anchor):
    """Id that wins inside a leaf by log2 weight [LEAF] (-inf = excluded)."""
    words = lane_words(seed, leaf * LEAF, position, anchor, CORRECT, 1, LEAF)
    key = log_weight - tl.reshape(log2_exponential(words), [LEAF])
    ids = leaf * LEAF + tl.arange(0, LEAF)
    return unpack_id(tl.max(pack(tl.where(log_weight > NEG_INF, key, NEG_INF), ids), axis=0))


@triton.jit
def _draw_target(row_ptr, top_ptr, mass_ptr, row, row_top, scale, excluded, vocab, num_leaves, seed, position, anchor,
                 LEAVES: tl.constexpr):  # fmt: skip
    """Draw from the target's row without the id `excluded` (-1 = none): (id, whether any mass was left).

    The excluded id leaves its octet, whose sum is computed again with and without it: the same tree, hence the same bits.
    Where nothing is left, the draw is from the whole row.
    """
    leaf = tl.arange(0, LEAVES)
    tops = tl.load(top_ptr + row * num_leaves + leaf, mask=leaf < num_leaves, other=NEG_INF, volatile=True)
    mass = tl.load(mass_ptr + row * num_leaves + leaf, mask=leaf < num_leaves, other=0, volatile=True) & MASS_BITS
    some = excluded == excluded
    if excluded >= 0:
        ids = (excluded // 8 * 8 + tl.arange(0, 8))[None, :]
        own_leaf = excluded // LEAF
        own_top = tl.load(top_ptr + row * num_leaves + own_leaf, volatile=True)
        e = tl.exp2(below_max(_load_leaf(row_ptr, ids, ids < vocab), own_top) * scale)
        pair = tl.arange(0, 2)[:, None]
        fixed = (octet_sums(tl.where((pair == 1) & (ids == excluded), 0.0, e), 2) * ONE).to(tl.int64)
        removed = tl.sum(tl.where(tl.arange(0, 2) == 0, fixed, -fixed), axis=0)
        kept = mass - tl.where(leaf == own_leaf, removed, 0)
        some = tl.max(kept, axis=0) > 0
        mass = tl.where(some, kept, mass)
        excluded = tl.where(some, excluded, -1)
    weight = tl.where(mass > 0, tl.log2(tl.maximum(mass, 1).to(tl.float32)) + below_max(tops, row_top) * scale, NEG_INF)
    winner = unpack_id(_race_leaves(weight, seed, position, anchor, LEAVES))
    ids = winner * LEAF + tl.arange(0, LEAF)
    x = _load_leaf(row_ptr, ids, ids < vocab)
    inner = tl.where((ids == excluded) | (x == NEG_INF), NEG_INF, (x - row_top) * scale)
    return _race_ids(inner, winner, seed, position, anchor), some


@triton.jit
def _draft_prob(x, ids, mass_of, reference, factor, scale):
    """Probability under the draft's law: softmax as exp2((x - reference) * scale) * factor, or a point mass.

    The target's probability is computed in the same form, so that equal rows leave a residual of exactly nothing.
    """
    soft = tl.exp2((x - reference) * scale) * factor
    return tl.where(mass_of == SOFTMAX, soft, tl.where(ids == mass_of, 1.0, 0.0))


@triton.jit
def _emit_rows(commit_ptr, query_start_ptr, request, num_requests, committed, num_forward, BLOCK: tl.constexpr):
    """commit_mask of a request's forward rows: True up to row `committed`; the last request also clears the padding rows."""
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
def _emit_token(tokens_ptr, next_ptr, anchors_ptr, stride_a, request, slot, num_drafts, accepted, token):
    """The correction or bonus token."""
    tl.store(tokens_ptr + request.to(tl.int64) * (num_drafts + 1) + accepted, token.to(tl.int64))
    tl.store(next_ptr + request, token.to(tl.int64))
    if anchors_ptr is not None:
        tl.store(anchors_ptr + slot * stride_a, token)


@triton.jit
def _merge_rows(
    group, slot, row0, length, target_ptr, token_ids_ptr, logits_indices_ptr, draft_ptr, draft_lse_ptr,
    temperature_ptr, top_ptr, mass_ptr, draft_top_ptr, draft_mass_ptr, row_values_ptr, row_ids_ptr,
    scale, draft_scale, draft_temperature, vocab, draft_vocab, num_leaves,
    stride_t, stride_ds, stride_dk, stride_es,
    DENSE: tl.constexpr, GROUP: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """All leaves of a row group are there: what the request's decision needs to know of each row."""
    i = group * GROUP + tl.arange(0, GROUP)
    rows = tl.where(i <= length, row0 + i, -1).to(tl.int64)
    row_ptrs = target_ptr + tl.maximum(rows, 0) * stride_t
    top, mass, words, tops = _merge_leaves(top_ptr, mass_ptr, rows, num_leaves, scale, GROUP, LEAVES)
    status = tl.where(tl.max(words & SAW_FINITE, axis=1) > 0, 0, NONFINITE_ROW)
    status |= tl.where(tl.max(words & SAW_NAN, axis=1) > 0, NAN, 0)
    # The arg-max is needed for greedy rows and for rows without a proper law.
    first = tl.zeros([GROUP], tl.int32)
    need = tl.where((rows >= 0) & ((tl.abs(top) == POS_INF) | (status & NONFINITE_ROW > 0)), 1, 0)
    if temperature_ptr is None:
        need = tl.where(rows >= 0, 1, 0)
    else:
        need = need | tl.where((tl.load(temperature_ptr + slot) > 0.0) == 0, 1, 0)
    if tl.max(need, axis=0) > 0:
        first = _first_of(row_ptrs, tops, top, vocab, GROUP, LEAVES)
    values = row_values_ptr + rows * 4
    ids_of = row_ids_ptr + rows * 4
    tl.store(values, top, mask=rows >= 0)
    tl.store(values + 1, 1.0 / tl.maximum(mass, 1).to(tl.float32) * ONE, mask=rows >= 0)
    tl.store(ids_of, first, mask=rows >= 0)
    tl.store(ids_of + 1, status, mask=rows >= 0)
    if DENSE:
        # The draft's law of each row as (who has mass, reference, factor), see _draft_prob.
        rows = tl.where(i < length, rows, -1)
        mass_of = tl.full([GROUP], SOFTMAX, tl.int32)
        if draft_lse_ptr is None:
            top, mass, words, tops = _merge_leaves(
                draft_top_ptr, draft_mass_ptr, rows, num_leaves, draft_scale, GROUP, LEAVES
            )
            reference = tl.where(tl.abs(top) == POS_INF, 0.0, top)
            factor = 1.0 / tl.maximum(mass, 1).to(tl.float32) * ONE
            if tl.max(tl.where((rows >= 0) & (top == POS_INF), 1, 0), axis=0) > 0:
                row_ptrs = draft_ptr + slot * stride_ds + i.to(tl.int64) * stride_dk
                row_ptrs = tl.where(rows >= 0, row_ptrs, draft_ptr + slot * stride_ds)
                hot = _first_of(row_ptrs, tops, top, draft_vocab, GROUP, LEAVES)
                mass_of = tl.where(top == POS_INF, hot, mass_of)
        else:
            lse = tl.load(draft_lse_ptr + slot * stride_es + i, mask=rows >= 0, other=0.0)
            top = lse
            # exp(x / T - lse) = exp2((x - lse T) log2(e) / T)
            reference = tl.where(tl.abs(lse) == POS_INF, 0.0, lse * (1.4426950408889634 / draft_scale))
            factor = tl.full([GROUP], 1.0, tl.float32)
        mass_of = tl.where(top == NEG_INF, NOBODY, mass_of)
        forward = tl.load(logits_indices_ptr + rows + 1, mask=rows >= 0, other=0)
        draft = tl.load(token_ids_ptr + forward, mask=rows >= 0, other=-1)
        own = tl.where((draft >= 0) & (draft < 2147483647), draft, NOBODY).to(tl.int32)
        if draft_lse_ptr is not None:
            # A +inf in the row: its first place is not stored, so the draft stands for it if it is +inf itself.
            x = tl.load(draft_ptr + slot * stride_ds + i.to(tl.int64) * stride_dk + tl.maximum(own, 0),
                        mask=(rows >= 0) & (own >= 0) & (own < draft_vocab), other=NEG_INF)  # fmt: skip
            infinite = tl.where(x.to(tl.float32) == POS_INF, own, NOBODY)
            mass_of = tl.where(top == POS_INF, infinite, mass_of)
        if (draft_temperature > 0.0) == 0:
            mass_of = own
        tl.store(values + 2, reference, mask=rows >= 0)
        tl.store(values + 3, factor, mask=rows >= 0)
        tl.store(ids_of + 2, mass_of, mask=rows >= 0)


@triton.jit
def _decide(
    request, slot, row0, length, forward0,
    target_ptr, token_ids_ptr, logits_indices_ptr, positions_ptr, draft_ptr, temperature_ptr, seed_ptr, query_start_ptr,
    tokens_ptr, accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr, commit_ptr, flags_ptr,
    anchors_ptr, anchor_positions_ptr,
    top_ptr, mass_ptr, row_values_ptr, row_ids_ptr, record_ptr, state_ptr,
    scale, draft_scale, num_requests, num_drafts, num_forward, vocab, draft_vocab, num_leaves,
    stride_t, stride_ds, stride_dk, stride_a, stride_p,
    DENSE: tl.constexpr, LEAVES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """All rows of a request are merged: how many drafts are accepted, and, where no residual is needed, what follows."""
    i = tl.arange(0, WIDTH)
    rows = (row0 + i).to(tl.int64)
    has_row, has_draft = i <= length, i < length
    values = row_values_ptr + rows * 4
    ids_of = row_ids_ptr + rows * 4
    top = tl.load(values, mask=has_row, other=0.0, volatile=True)
    inverse = tl.load(values + 1, mask=has_row, other=0.0, volatile=True)
    first = tl.load(ids_of, mask=has_row, other=0, volatile=True)
    status = tl.load(ids_of + 1, mask=has_row, other=0, volatile=True)
    forward = tl.load(logits_indices_ptr + rows + 1, mask=has_draft, other=0)
    draft = tl.load(token_ids_ptr + forward, mask=has_draft, other=0)
    missing = has_draft & (draft == -1)
    inside = has_draft & (draft >= 0) & (draft < vocab)
    bad = has_draft & ~inside & ~missing
    anchor = tl.load(positions_ptr + forward0)
    point = (top == POS_INF) | ((status & NONFINITE_ROW) != 0)  # a row whose law is its first maximum alone
    greedy = point
    seed = tl.zeros((), tl.int64)
    accept = inside & (draft == first)
    if temperature_ptr is not None:
        sampled = tl.load(temperature_ptr + slot) > 0.0
        greedy = tl.where(sampled, point, i >= 0)
        seed = tl.load(seed_ptr + slot)
        logit = numbers(tl.load(target_ptr + rows * stride_t + draft, mask=inside, other=NEG_INF).to(tl.float32))
        target_prob = tl.where(point, tl.where(draft == first, 1.0, 0.0), tl.exp2(below_max(logit, top) * scale) * inverse)
        target_prob = tl.where(inside, target_prob, 0.0)
        draft_prob = tl.where(has_draft, 1.0, 0.0)
        if DENSE:
            in_draft = has_draft & (draft >= 0) & (draft < draft_vocab)
            x = tl.load(draft_ptr + slot * stride_ds + i.to(tl.int64) * stride_dk + draft, mask=in_draft, other=NEG_INF)
            mass_of = tl.load(ids_of + 2, mask=has_draft, other=NOBODY, volatile=True)
            reference = tl.load(values + 2, mask=has_draft, other=0.0, volatile=True)
            factor = tl.load(values + 3, mask=has_draft, other=0.0, volatile=True)
            draft_prob = _draft_prob(numbers(x.to(tl.float32)), draft, mass_of, reference, factor, draft_scale)
            bad = bad | tl.where(sampled, has_draft & ~missing & (draft_prob <= 0.0), i < 0)
        coin = uniform(coin_words(seed, anchor + 1 + i, anchor, ACCEPT))
        chance = inside & (draft_prob > 0.0) & (coin * draft_prob < target_prob)
        accept = tl.where(sampled, chance, accept)
    accept = accept & ((status & NONFINITE_ROW) == 0)

    accepted = tl.min(tl.where(has_draft & ~accept, i, length), axis=0)
    here = i == accepted
    looked_at = i <= accepted
    flags = tl.where(tl.max(tl.where(looked_at, status & NAN, 0), axis=0) > 0, NAN, 0)
    flags |= tl.max(tl.where(here, status & NONFINITE_ROW, 0), axis=0)
    flags |= tl.where(tl.max(tl.where(here & bad, 1, 0), axis=0) > 0, BAD_TOKEN_ID, 0)
    flags |= tl.where(tl.max(tl.where(here & missing, 1, 0), axis=0) > 0, MISSING_DRAFT, 0)

    row = row0.to(tl.int64) + accepted
    row_top = tl.sum(tl.where(here, top, 0.0), axis=0)
    token = tl.sum(tl.where(here, first, 0), axis=0).to(tl.int64)
    state = tl.full((), DONE, tl.int32)
    if temperature_ptr is not None:
        is_point = tl.max(tl.where(here & greedy, 1, 0), axis=0) > 0
        if not is_point:
            is_missing = tl.max(tl.where(here & missing, 1, 0), axis=0) > 0
            excluded = tl.sum(tl.where(here & inside, draft, 0), axis=0) + tl.where(
                tl.max(tl.where(here & inside, 1, 0), axis=0) > 0, 0, -1
            )
            residual = (accepted < length) & (is_missing == 0)
            if DENSE and residual:
                state = tl.full((), NEEDS_RESIDUAL, tl.int32)
                tl.store(record_ptr + request, accepted)
            else:
                if DENSE:
                    excluded = excluded * 0 - 1
                row_ptr = target_ptr + row * stride_t
                token, some = _draw_target(row_ptr, top_ptr, mass_ptr, row, row_top, scale, excluded, vocab, num_leaves,
                                           seed, anchor + accepted + 1, anchor, LEAVES)  # fmt: skip
                flags |= tl.where(some, 0, EMPTY_RESIDUAL)

    kept = tl.where(i < accepted, draft, -1)
    tl.store(tokens_ptr + request.to(tl.int64) * (num_drafts + 1) + i, kept, mask=(i <= num_drafts) & (i != accepted))
    tl.store(accepted_ptr + request, accepted)
    tl.store(emitted_ptr + request, accepted + 1)
    tl.store(rejected_ptr + request, length - accepted)
    tl.store(flags_ptr + request, flags)
    last_row = tl.load(logits_indices_ptr + row)
    tl.store(last_row_ptr + request, last_row)
    if anchor_positions_ptr is not None:
        tl.store(anchor_positions_ptr + slot * stride_p, anchor + accepted + 1)
    _emit_rows(commit_ptr, query_start_ptr, request, num_requests, last_row, num_forward, 128)
    if state == DONE:
        _emit_token(tokens_ptr, next_ptr, anchors_ptr, stride_a, request, slot, num_drafts, accepted, token)
    if DENSE:
        tl.debug_barrier()
        tl.atomic_xchg(state_ptr + request, state, sem="release", scope="gpu")


@triton.jit
def _emit_nothing(request, slot, tokens_ptr, accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr, commit_ptr,
                  flags_ptr, query_start_ptr, num_requests, num_drafts, num_forward, WIDTH: tl.constexpr):  # fmt: skip
    """A request without logit rows (a prefill chunk keeps all its rows) or a padding row."""
    i = tl.arange(0, WIDTH)
    tl.store(tokens_ptr + request.to(tl.int64) * (num_drafts + 1) + i, (i * 0 - 1).to(tl.int64), mask=i <= num_drafts)
    tl.store(accepted_ptr + request, 0)
    tl.store(emitted_ptr + request, 0)
    tl.store(rejected_ptr + request, 0)
    tl.store(next_ptr + request, tl.full((), -1, tl.int64))
    tl.store(last_row_ptr + request, 0)
    tl.store(flags_ptr + request, 0)
    committed = tl.where(slot >= 0, num_forward, -1)
    _emit_rows(commit_ptr, query_start_ptr, request, num_requests, committed, num_forward, 128)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "num_forward"])
def accept_chain_kernel(
    target_ptr,  # [L, V]
    query_start_ptr, cu_logits_ptr,  # [R+1]
    logits_indices_ptr,  # [L]
    token_ids_ptr, positions_ptr,  # [N_max]
    draft_ptr, draft_lse_ptr, draft_temperature_ptr,  # [S, K, Vd], [S, K] or None, [S] or None
    temperature_ptr, seed_ptr,  # [S]; temperature None = every row greedy
    slots_ptr,  # [R] or None
    tokens_ptr,  # [R, K+1]
    accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr,  # [R]
    commit_ptr,  # [N_max]
    flags_ptr,  # [R]
    anchors_ptr, anchor_positions_ptr,  # [S] or None, advanced in place
    ticket_ptr, group_count_ptr, request_count_ptr, residual_count_ptr, state_ptr,  # int32, zero before and after
    top_ptr, mass_ptr, draft_top_ptr, draft_mass_ptr,  # [L, NL]
    residual_ptr,  # [R, NL]
    row_values_ptr, row_ids_ptr,  # [L, 4]
    record_ptr,  # [R]
    num_requests, num_slots, num_rows, num_forward, num_drafts, vocab, draft_vocab, num_leaves,
    stride_t, stride_ds, stride_dk, stride_es, stride_a, stride_p,
    DENSE: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, LEAVES: tl.constexpr, WIDTH: tl.constexpr, LAG: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = GROUP * CHUNK
    chunks = tl.cdiv(num_leaves, CHUNK)
    groups = tl.cdiv(num_drafts + 1, GROUP)
    first_wave = groups * chunks
    second_wave = 0
    if DENSE:
        second_wave = tl.cdiv(num_leaves, PAIRS)

    # Tickets, not program ids, order the work: an item that waits has a later ticket than the items it waits for. The second
    # wave of a request comes LAG requests after its first, while its rows are still in the L2 cache.
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")
    if ticket == num_requests * (first_wave + second_wave) - 1:
        tl.store(ticket_ptr, 0)
    wave = 0
    request = ticket // first_wave
    item = ticket % first_wave
    if DENSE:
        lag = tl.minimum(LAG, num_requests)
        head = lag * first_wave
        middle = (num_requests - lag) * (first_wave + second_wave)
        if ticket >= head + middle:
            rest = ticket - head - middle
            wave = 1
            request = num_requests - lag + rest // second_wave
            item = rest % second_wave
        elif ticket >= head:
            rest = ticket - head
            request = rest // (first_wave + second_wave)
            item = rest % (first_wave + second_wave)
            if item < first_wave:
                request += lag
            else:
                item -= first_wave
                wave = 1

    slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
    row0 = tl.load(cu_logits_ptr + request)
    length = tl.minimum(tl.minimum(tl.load(cu_logits_ptr + request + 1), num_rows) - row0 - 1, num_drafts)
    if slot < 0:
        length = length * 0 - 1
    scale = tl.full((), 1.4426950408889634, tl.float32)
    draft_scale = scale
    draft_temperature = tl.zeros((), tl.float32)
    if length >= 0:
        if temperature_ptr is not None:
            draft_temperature = tl.load(temperature_ptr + slot)
            scale = log2_scale(draft_temperature)
            if draft_temperature_ptr is not None:
                draft_temperature = tl.load(draft_temperature_ptr + slot)
            draft_scale = log2_scale(draft_temperature)

    if wave == 0:
        if length < 0:
            if item == 0:
                _emit_nothing(request, slot, tokens_ptr, accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr,
                              commit_ptr, flags_ptr, query_start_ptr, num_requests, num_drafts, num_forward, WIDTH)  # fmt: skip
        else:
            group = item // chunks
            if group * GROUP <= length:
                # Leaves of this item: PAIRS (row, leaf) pairs.
                pair = tl.arange(0, PAIRS)
                i = group * GROUP + pair // CHUNK
                leaf = (item % chunks) * CHUNK + pair % CHUNK
                keep = (i <= length) & (leaf < num_leaves)
                row = (row0 + i).to(tl.int64)
                ids = leaf[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
                inside = keep[:, None] & (ids < vocab)
                raw = tl.load(target_ptr + row[:, None] * stride_t + ids, mask=inside, other=NEG_INF).to(tl.float32)
                x = numbers(raw)
                top, mass = _leaf_masses(x, scale, PAIRS)
                mass |= tl.where(tl.max(tl.where(raw != raw, 1, 0), axis=1) > 0, SAW_NAN, 0)
                mass |= tl.where(tl.max(tl.where(tl.abs(x) < POS_INF, 1, 0), axis=1) > 0, SAW_FINITE, 0)
                tl.store(top_ptr + row * num_leaves + leaf, top, mask=keep)
                tl.store(mass_ptr + row * num_leaves + leaf, mass, mask=keep)
                if DENSE and draft_lse_ptr is None:
                    keep = keep & (i < length)
                    inside = keep[:, None] & (ids < draft_vocab)
                    draft_rows = draft_ptr + slot * stride_ds + i.to(tl.int64)[:, None] * stride_dk
                    top, mass = _leaf_masses(_load_leaf(draft_rows, ids, inside), draft_scale, PAIRS)
                    tl.store(draft_top_ptr + row * num_leaves + leaf, top, mask=keep)
                    tl.store(draft_mass_ptr + row * num_leaves + leaf, mass, mask=keep)

                if arrive(group_count_ptr + request * groups + group, chunks):
                    _merge_rows(
                        group, slot, row0, length, target_ptr, token_ids_ptr, logits_indices_ptr, draft_ptr, draft_lse_ptr,
                        temperature_ptr, top_ptr, mass_ptr, draft_top_ptr, draft_mass_ptr, row_values_ptr, row_ids_ptr,
                        scale, draft_scale, draft_temperature, vocab, draft_vocab, num_leaves,
                        stride_t, stride_ds, stride_dk, stride_es, DENSE, GROUP, LEAVES,
                    )  # fmt: skip
                    if arrive(request_count_ptr + request, length // GROUP + 1):
                        forward0 = tl.load(logits_indices_ptr + row0)
                        _decide(
                            request, slot, row0, length, forward0,
                            target_ptr, token_ids_ptr, logits_indices_ptr, positions_ptr, draft_ptr, temperature_ptr, seed_ptr,
                            query_start_ptr,
                            tokens_ptr, accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr, commit_ptr, flags_ptr,
                            anchors_ptr, anchor_positions_ptr,
                            top_ptr, mass_ptr, row_values_ptr, row_ids_ptr, record_ptr, state_ptr,
                            scale, draft_scale, num_requests, num_drafts, num_forward, vocab, draft_vocab, num_leaves,
                            stride_t, stride_ds, stride_dk, stride_a, stride_p,
                            DENSE, LEAVES, WIDTH,
                        )  # fmt: skip
    else:
        if DENSE:
            state = tl.full((), DONE, tl.int32)
            if length >= 0:
                state = tl.atomic_add(state_ptr + request, 0, sem="acquire", scope="gpu")
                while state == PENDING:
                    state = tl.atomic_add(state_ptr + request, 0, sem="acquire", scope="gpu")
                tl.debug_barrier()
            if state == NEEDS_RESIDUAL:
                accepted = tl.load(record_ptr + request, volatile=True)
                row = (row0 + accepted).to(tl.int64)
                target_row = target_ptr + row * stride_t
                draft_row = draft_ptr + slot * stride_ds + accepted.to(tl.int64) * stride_dk
                row_top = tl.load(row_values_ptr + row * 4, volatile=True)
                inverse = tl.load(row_values_ptr + row * 4 + 1, volatile=True)
                reference = tl.load(row_values_ptr + row * 4 + 2, volatile=True)
                factor = tl.load(row_values_ptr + row * 4 + 3, volatile=True)
                mass_of = tl.load(row_ids_ptr + row * 4 + 2, volatile=True)
                leaf = item * PAIRS + tl.arange(0, PAIRS)
                ids = leaf[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
                residual = _residual(target_row, draft_row, ids, row_top, inverse, mass_of, reference, factor, scale, draft_scale,
                                     vocab, draft_vocab)  # fmt: skip
                mass = masses(residual, PAIRS, LEAF, RESIDUAL_ONE)
                tl.store(residual_ptr + request.to(tl.int64) * num_leaves + leaf, mass, mask=leaf < num_leaves)
            if length >= 0:
                if arrive(residual_count_ptr + request, second_wave):
                    tl.store(state_ptr + request, PENDING)
                    if state == NEEDS_RESIDUAL:
                        _draw_residual(
                            request, slot, row0, target_ptr, draft_ptr, logits_indices_ptr, positions_ptr, seed_ptr,
                            tokens_ptr, next_ptr, flags_ptr, anchors_ptr, top_ptr, mass_ptr, residual_ptr, row_values_ptr,
                            row_ids_ptr, record_ptr, scale, draft_scale, num_drafts, vocab, draft_vocab, num_leaves,
                            stride_t, stride_ds, stride_dk, stride_a, LEAVES,
                        )  # fmt: skip


@triton.jit
def _residual(target_row, draft_row, ids, row_top, inverse, mass_of, reference, factor, scale, draft_scale, vocab, draft_vocab):
    """[target_prob - draft_prob]+ of ids."""
    x = _load_leaf(target_row, ids, ids < vocab)
    target_prob = tl.exp2(below_max(x, row_top) * scale) * inverse
    draft_prob = _draft_prob(_load_leaf(draft_row, ids, ids < draft_vocab), ids, mass_of, reference, factor, draft_scale)
    return tl.maximum(target_prob - draft_prob, 0.0)


@triton.jit
def _draw_residual(
    request, slot, row0, target_ptr, draft_ptr, logits_indices_ptr, positions_ptr, seed_ptr,
    tokens_ptr, next_ptr, flags_ptr, anchors_ptr, top_ptr, mass_ptr, residual_ptr, row_values_ptr, row_ids_ptr, record_ptr,
    scale, draft_scale, num_drafts, vocab, draft_vocab, num_leaves, stride_t, stride_ds, stride_dk, stride_a,
    LEAVES: tl.constexpr,
):  # fmt: skip
    """All residual masses of a request are there: draw the correction."""
    accepted = tl.load(record_ptr + request, volatile=True)
    row = (row0 + accepted).to(tl.int64)
    target_row = target_ptr + row * stride_t
    draft_row = draft_ptr + slot * stride_ds + accepted.to(tl.int64) * stride_dk
    row_top = tl.load(row_values_ptr + row * 4, volatile=True)
    inverse = tl.load(row_values_ptr + row * 4 + 1, volatile=True)
    reference = tl.load(row_values_ptr + row * 4 + 2, volatile=True)
    factor = tl.load(row_values_ptr + row * 4 + 3, volatile=True)
    mass_of = tl.load(row_ids_ptr + row * 4 + 2, volatile=True)
    seed = tl.load(seed_ptr + slot)
    anchor = tl.load(positions_ptr + tl.load(logits_indices_ptr + row0))
    position = anchor + accepted + 1
    leaf = tl.arange(0, LEAVES)
    mass = tl.load(residual_ptr + request.to(tl.int64) * num_leaves + leaf, mask=leaf < num_leaves, other=0, volatile=True)
    if tl.max(mass, axis=0) > 0:
        weight = tl.where(mass > 0, tl.log2(tl.maximum(mass, 1).to(tl.float32)), NEG_INF)
        winner = unpack_id(_race_leaves(weight, seed, position, anchor, LEAVES))
        ids = winner * LEAF + tl.arange(0, LEAF)
        residual = _residual(target_row, draft_row, ids, row_top, inverse, mass_of, reference, factor, scale, draft_scale, vocab,
                             draft_vocab)  # fmt: skip
        weight = tl.where(residual > 0.0, tl.log2(tl.where(residual > 0.0, residual, 1.0)), NEG_INF)
        token = _race_ids(weight, winner, seed, position, anchor)
    else:
        tl.store(flags_ptr + request, tl.load(flags_ptr + request, volatile=True) | EMPTY_RESIDUAL)
        token, some = _draw_target(target_row, top_ptr, mass_ptr, row, row_top, scale, tl.full((), -1, tl.int64), vocab,
                                   num_leaves, seed, position, anchor, LEAVES)  # fmt: skip
    _emit_token(tokens_ptr, next_ptr, anchors_ptr, stride_a, request, slot, num_drafts, accepted, token)


def launch_accept_chain(items, args, *, dense, leaves, width, config):
    """Launch one program per item (a wave-1 or wave-2 part of a request)."""
    accept_chain_kernel[(items,)](
        *args,
        DENSE=dense,
        GROUP=config.group,
        CHUNK=config.chunk,
        LEAVES=leaves,
        WIDTH=width,
        LAG=config.lag,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
    )
