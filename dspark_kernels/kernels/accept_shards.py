"""Lossless acceptance of a chain on vocabulary shards: each phase one launch on every rank, with a gather between them.

normalise: maximum and integer mass of each leaf of the rank's ids, and of each row its best word and the logits of its draft.
residual: every rank decides from the gathered parts, and sums [target - draft]+ of its ids where that is to be drawn from. draw:
every rank races the leaves (decides first, where no residual was needed) and those with ids in the winning leaf race inside it.
finish: the best word of all ranks is the token. What an id contributes depends on the id, never on the rank that has it: leaves,
octets and noise lanes are global, masses are integers. So every rank decides the same, and the same as kernels/accept.py does on
whole rows, as long as no leaf is cut. A cut leaf is two pieces with maxima of their own, merged by one rounding of each mass.

Symbols: R requests, K drafts, L logit rows, W ids of a shard, N ranks, NL leaves of 1024 ids that a shard can touch. Oracle: the op
on the whole vocabulary (reference/accept.py). Sources: arXiv 2211.17192, 2302.01318.
"""

import triton
import triton.language as tl

from .accept import (
    BAD_TOKEN_ID,
    EMPTY_RESIDUAL,
    MISSING_DRAFT,
    NAN,
    NOBODY,
    NONFINITE_ROW,
    RESIDUAL_ONE,
    SOFTMAX,
    _draft_prob,
    _emit_nothing,
    _emit_rows,
    _emit_token,
    _leaf_masses,
    _race_leaves,
)
from .primitives.mass import LEAF, NEG_INF, ONE, POS_INF, below_max, log2_scale, masses, numbers, octet_sums
from .primitives.philox import ACCEPT, CORRECT, COUPLED, coin_words, lane_words, log2_exponential, uniform
from .primitives.race import pack, unpack_id
from .primitives.slots import state_slots
from .primitives.ticket import arrive

FINITE = tl.constexpr(256)  # a row showed a finite logit; beside the bits of `flags`

# What follows the accepted drafts: a token that is known, a draw from the target (without one id), or from the residual.
KNOWN = tl.constexpr(0)
TARGET = tl.constexpr(1)
RESIDUAL = tl.constexpr(2)


@triton.jit
def _request(request, slots_ptr, cu_logits_ptr, num_requests, num_slots, num_rows, num_drafts):
    """State slot, first logit row, number of drafts (-1: no logit rows, or a padding row) of a request."""
    slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
    row0 = tl.load(cu_logits_ptr + request)
    length = tl.minimum(tl.minimum(tl.load(cu_logits_ptr + request + 1), num_rows) - row0 - 1, num_drafts)
    length = tl.where(slot < 0, -1, length)
    return slot, row0, length


@triton.jit
def _temperatures(temperature_ptr, draft_temperature_ptr, slot, length):
    """Of the target and of the draft; 0 where every row is greedy."""
    temperature = tl.zeros((), tl.float32)
    draft_temperature = temperature
    if temperature_ptr is not None:
        if length >= 0:
            temperature = tl.load(temperature_ptr + slot)
            draft_temperature = temperature
            if draft_temperature_ptr is not None:
                draft_temperature = tl.load(draft_temperature_ptr + slot)
    return temperature, draft_temperature


@triton.jit
def _best_words(key, ids, inside, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Best word per row of pairs [GROUP * CHUNK, LEAF]: int64 [GROUP]."""
    return tl.max(tl.reshape(tl.max(tl.where(inside, pack(key, ids), 0), axis=1), [GROUP, CHUNK]), axis=1)


@triton.jit
def _write_rows(
    slot, i, rows, own, length, target_ptr, logits_indices_ptr, token_ids_ptr, draft_ptr,
    row_words_ptr, row_logits_ptr, top_ptr, best_ptr, draft_best_ptr, seen_ptr,
    scale, start, held, first_leaf, num_leaves, stride_t, stride_ds, stride_dk, GROUP: tl.constexpr,
):  # fmt: skip
    """All items of a row group are there: words, logits of the drafts this rank has, counters back to zero."""
    words = row_words_ptr + rows * 4
    tl.store(words, tl.load(best_ptr + rows, mask=own, other=0, volatile=True), mask=own)
    tl.store(words + 1, tl.load(draft_best_ptr + rows, mask=own, other=0, volatile=True), mask=own)
    tl.store(words + 3, tl.load(seen_ptr + rows, mask=own, other=0, volatile=True).to(tl.int64), mask=own)
    tl.store(best_ptr + rows, tl.zeros([GROUP], tl.int64), mask=own)
    tl.store(draft_best_ptr + rows, tl.zeros([GROUP], tl.int64), mask=own)
    tl.store(seen_ptr + rows, tl.zeros([GROUP], tl.int32), mask=own)
    forward = tl.load(logits_indices_ptr + rows + 1, mask=i < length, other=0)
    id = tl.load(token_ids_ptr + forward, mask=i < length, other=-1)
    here = (i < length) & (id >= start) & (id - start < held)
    logit = tl.load(target_ptr + rows * stride_t + id - start, mask=here, other=NEG_INF)
    tl.store(row_logits_ptr + rows * 2, numbers(logit.to(tl.float32)), mask=own)
    drafted = tl.full([GROUP], float("-inf"), tl.float32)
    removed = tl.zeros([GROUP], tl.int64)
    if draft_ptr is not None:
        where = draft_ptr + slot * stride_ds + i.to(tl.int64) * stride_dk + id - start
        drafted = numbers(tl.load(where, mask=here, other=NEG_INF).to(tl.float32))
    elif top_ptr is not None:
        # What the draft's octet loses without it: the same tree with and without, hence the same bits.
        octet = (id // 8 * 8)[:, None] + tl.arange(0, 8)[None, :]
        inside = here[:, None] & (octet >= start) & (octet - start < held)
        x = tl.load(target_ptr + rows[:, None] * stride_t + octet - start, mask=inside, other=NEG_INF).to(tl.float32)
        top = tl.load(top_ptr + rows * num_leaves + id // LEAF - first_leaf, mask=here, other=0.0, volatile=True)
        e = tl.exp2(below_max(numbers(x), top[:, None]) * scale)
        whole = (octet_sums(e, GROUP) * ONE).to(tl.int64)
        rest = (octet_sums(tl.where(octet == id[:, None], 0.0, e), GROUP) * ONE).to(tl.int64)
        removed = tl.where(here, whole - rest, 0)
    tl.store(row_logits_ptr + rows * 2 + 1, drafted, mask=own)
    tl.store(words + 2, removed, mask=own)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "start", "held", "first_leaf"])
def accept_normalise_kernel(
    target_ptr,  # [L, W]
    cu_logits_ptr,  # [R+1]
    logits_indices_ptr,  # [L]
    token_ids_ptr, positions_ptr,  # [N_max]
    draft_ptr, draft_temperature_ptr,  # [S, K, W], [S]; None
    temperature_ptr, seed_ptr,  # [S]; temperature None = every row greedy
    slots_ptr,  # [R] or None
    row_words_ptr,  # int64 [L, 4] of the part: best word, the draft row's best word, mass of the draft, what the row showed
    row_logits_ptr,  # fp32 [L, 2]: logit of the draft in the target's and in the draft's row, -inf on other ranks
    top_ptr, mass_ptr,  # [L, NL], None where words decide
    draft_top_ptr, draft_mass_ptr,  # [L, NL], None where the proposal's lse is stored
    best_ptr, draft_best_ptr,  # int64 [L], zero before and after
    seen_ptr, arrivals_ptr,  # int32 [L], [R, groups], zero before and after
    num_requests, num_slots, num_rows, num_drafts, start, held, first_leaf, num_leaves,
    stride_t, stride_ds, stride_dk,
    NOISY: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Item = rows x leaves of a request; the last item of a group of rows writes what is known of each row."""
    PAIRS: tl.constexpr = GROUP * CHUNK
    chunks = tl.cdiv(num_leaves, CHUNK)
    groups = tl.cdiv(num_drafts + 1, GROUP)
    request = tl.program_id(0) // (groups * chunks)
    item = tl.program_id(0) % (groups * chunks)
    group = item // chunks
    slot, row0, length = _request(request, slots_ptr, cu_logits_ptr, num_requests, num_slots, num_rows, num_drafts)
    if group * GROUP <= length:
        temperature, draft_temperature = _temperatures(temperature_ptr, draft_temperature_ptr, slot, length)
        scale, draft_scale = log2_scale(temperature), log2_scale(draft_temperature)
        pair = tl.arange(0, PAIRS)
        i = group * GROUP + pair // CHUNK
        leaf = (item % chunks) * CHUNK + pair % CHUNK
        keep = (i <= length) & (leaf < num_leaves)
        row = (row0 + i).to(tl.int64)
        ids = (first_leaf + leaf)[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
        local = ids - start
        inside = keep[:, None] & (local >= 0) & (local < held)
        raw = tl.load(target_ptr + row[:, None] * stride_t + local, mask=inside, other=NEG_INF).to(tl.float32)
        x = numbers(raw)
        own_i = group * GROUP + tl.arange(0, GROUP)
        own_rows = (row0 + own_i).to(tl.int64)
        own = own_i <= length
        seen = tl.where(tl.max(tl.where(raw != raw, 1, 0), axis=1) > 0, NAN, 0)
        seen |= tl.where(tl.max(tl.where(tl.abs(x) < POS_INF, 1, 0), axis=1) > 0, FINITE, 0)
        seen = tl.reshape(seen, [GROUP, CHUNK])
        tl.atomic_or(seen_ptr + own_rows, tl.max(seen & NAN, axis=1) | tl.max(seen & FINITE, axis=1), mask=own, sem="relaxed")
        if top_ptr is None:
            key = x
            if NOISY:
                anchor = tl.load(positions_ptr + tl.load(logits_indices_ptr + row0))
                seed = tl.load(seed_ptr + slot) + tl.zeros([PAIRS, 1], tl.int64)
                position = (anchor + 1 + i).to(tl.int64)[:, None]
                words = lane_words(seed, (first_leaf + leaf)[:, None] * LEAF, position, position * 0, COUPLED, PAIRS, LEAF)
                key = tl.where(temperature > 0.0, x * scale - log2_exponential(words), x)
            tl.atomic_max(best_ptr + own_rows, _best_words(key, ids, inside, GROUP, CHUNK), mask=own, sem="relaxed")
        else:
            top, mass = _leaf_masses(x, scale, PAIRS)
            tl.store(top_ptr + row * num_leaves + leaf, top, mask=keep)
            tl.store(mass_ptr + row * num_leaves + leaf, mass, mask=keep)
            # The arg-max is needed for greedy rows and for rows without a proper law.
            first_id = (first_leaf + leaf) * LEAF
            some = keep & (first_id < start + held) & (first_id + LEAF > start)
            need = tl.max(tl.where(some & (tl.abs(top) == POS_INF), 1, 0), axis=0)
            need |= tl.where((temperature > 0.0) == 0, 1, 0)
            if need > 0:
                tl.atomic_max(best_ptr + own_rows, _best_words(x, ids, inside, GROUP, CHUNK), mask=own, sem="relaxed")
        if draft_top_ptr is not None:
            keep = keep & (i < length)
            inside = inside & keep[:, None]
            draft_rows = draft_ptr + slot * stride_ds + i.to(tl.int64)[:, None] * stride_dk
            x = numbers(tl.load(draft_rows + local, mask=inside, other=NEG_INF).to(tl.float32))
            top, mass = _leaf_masses(x, draft_scale, PAIRS)
            tl.store(draft_top_ptr + row * num_leaves + leaf, top, mask=keep)
            tl.store(draft_mass_ptr + row * num_leaves + leaf, mass, mask=keep)
            if tl.max(tl.where(keep & (top == POS_INF), 1, 0), axis=0) > 0:
                tl.atomic_max(draft_best_ptr + own_rows, _best_words(x, ids, inside, GROUP, CHUNK), mask=own, sem="relaxed")

        if arrive(arrivals_ptr + request * groups + group, chunks):
            _write_rows(
                slot, own_i, own_rows, own, length, target_ptr, logits_indices_ptr, token_ids_ptr, draft_ptr,
                row_words_ptr, row_logits_ptr, top_ptr, best_ptr, draft_best_ptr, seen_ptr,
                scale, start, held, first_leaf, num_leaves, stride_t, stride_ds, stride_dk, GROUP,
            )  # fmt: skip


@triton.jit
def _row_masses(top_ptr, mass_ptr, stride_top, stride_mass, rows, has_row, shards, num_leaves, scale,
                WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Maximum and integer mass (relative to it) of rows from the pieces of all ranks."""
    pieces = shards * num_leaves
    top = tl.full([WIDTH], float("-inf"), tl.float32)
    for first in range(0, pieces, BLOCK):
        piece = first + tl.arange(0, BLOCK)
        where = rows[:, None] * num_leaves + (piece % num_leaves)[None, :]
        inside = has_row[:, None] & (piece < pieces)[None, :]
        shard = (piece // num_leaves).to(tl.int64)[None, :]
        top = tl.maximum(top, tl.max(tl.load(top_ptr + shard * stride_top + where, mask=inside, other=NEG_INF), axis=1))
    mass = tl.zeros([WIDTH], tl.int64)
    for first in range(0, pieces, BLOCK):
        piece = first + tl.arange(0, BLOCK)
        where = rows[:, None] * num_leaves + (piece % num_leaves)[None, :]
        inside = has_row[:, None] & (piece < pieces)[None, :]
        shard = (piece // num_leaves).to(tl.int64)[None, :]
        tops = tl.load(top_ptr + shard * stride_top + where, mask=inside, other=NEG_INF)
        own = tl.load(mass_ptr + shard * stride_mass + where, mask=inside, other=0)
        mass += tl.sum((own.to(tl.float32) * tl.exp2(below_max(tops, top[:, None]) * scale)).to(tl.int64), axis=1)
    return top, mass


@triton.jit
def _shown(row_words_ptr, stride_part, rows, has_row, shards, WIDTH: tl.constexpr, SHARDS: tl.constexpr):
    """Of every row its first maximum and its status, from the words of all ranks."""
    shard = tl.arange(0, SHARDS)[None, :]
    where = row_words_ptr + shard.to(tl.int64) * stride_part + rows[:, None] * 4
    inside = has_row[:, None] & (shard < shards)
    best = tl.max(tl.load(where, mask=inside, other=0), axis=1)
    seen = tl.load(where + 3, mask=inside, other=0).to(tl.int32)
    status = tl.max(seen & NAN, axis=1) | tl.where(tl.max(seen & FINITE, axis=1) > 0, 0, NONFINITE_ROW)
    return tl.where(best > 0, unpack_id(best), 0), tl.where(has_row, status, 0)


@triton.jit
def _drafts(logits_indices_ptr, token_ids_ptr, rows, has_draft, vocab):
    """Drafts of a request, and whether each is in the vocabulary, missing, bad."""
    forward = tl.load(logits_indices_ptr + rows + 1, mask=has_draft, other=0)
    draft = tl.load(token_ids_ptr + forward, mask=has_draft, other=0)
    missing = has_draft & (draft == -1)
    inside = has_draft & (draft >= 0) & (draft < vocab)
    return draft, inside, missing, has_draft & ~inside & ~missing


@triton.jit
def _stop(i, length, accept, status, bad, missing):
    """Number of accepted drafts, and the flags of a request."""
    has_draft = i < length
    accepted = tl.min(tl.where(has_draft & ~(accept & ((status & NONFINITE_ROW) == 0)), i, length), axis=0)
    here = i == accepted
    flags = tl.max(tl.where(i <= accepted, status & NAN, 0), axis=0)
    flags |= tl.max(tl.where(here, status & NONFINITE_ROW, 0), axis=0)
    flags |= tl.where(tl.max(tl.where(here & bad, 1, 0), axis=0) > 0, BAD_TOKEN_ID, 0)
    flags |= tl.where(tl.max(tl.where(here & missing, 1, 0), axis=0) > 0, MISSING_DRAFT, 0)
    return accepted, flags


@triton.jit
def _decide(
    slot, row0, length, temperature, draft_temperature,
    gathered, proposal, layout, seed_ptr,
    shards, num_leaves, vocab, WIDTH: tl.constexpr, SHARDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Token rule from the gathered parts: (accepted, flags, what follows, its id, mass of that id, maximum and inverse mass of the
    row, reference and factor of the draft's law there)."""
    (row_words_ptr, row_logits_ptr, top_ptr, mass_ptr, draft_top_ptr, draft_mass_ptr, stride_part) = gathered
    (draft_ptr, draft_lse_ptr, stride_es) = proposal
    (logits_indices_ptr, token_ids_ptr, positions_ptr) = layout
    scale, draft_scale = log2_scale(temperature), log2_scale(draft_temperature)
    i = tl.arange(0, WIDTH)
    rows = (row0 + i).to(tl.int64)
    has_row, has_draft = i <= length, i < length
    draft, inside, missing, bad = _drafts(logits_indices_ptr, token_ids_ptr, rows, has_draft, vocab)
    first, status = _shown(row_words_ptr, stride_part, rows, has_row, shards, WIDTH, SHARDS)
    top, mass = _row_masses(top_ptr, mass_ptr, 2 * stride_part, stride_part, rows, has_row, shards, num_leaves, scale, WIDTH, BLOCK)
    inverse = 1.0 / tl.maximum(mass, 1).to(tl.float32) * ONE
    shard = tl.arange(0, SHARDS)[None, :]
    on_ranks = has_row[:, None] & (shard < shards)
    logits = row_logits_ptr + shard.to(tl.int64) * (2 * stride_part) + rows[:, None] * 2
    words = row_words_ptr + shard.to(tl.int64) * stride_part + rows[:, None] * 4
    logit = tl.max(tl.load(logits, mask=on_ranks, other=NEG_INF), axis=1)
    point = (top == POS_INF) | ((status & NONFINITE_ROW) != 0)  # a row whose law is its first maximum alone
    sampled = temperature > 0.0
    target_prob = tl.where(point, tl.where(draft == first, 1.0, 0.0), tl.exp2(below_max(logit, top) * scale) * inverse)
    target_prob = tl.where(inside, target_prob, 0.0)
    draft_prob = tl.where(has_draft, 1.0, 0.0)
    mass_of = tl.full([WIDTH], SOFTMAX, tl.int32)
    reference = tl.zeros([WIDTH], tl.float32)
    factor = tl.full([WIDTH], 1.0, tl.float32)
    if draft_ptr is not None:
        x = tl.max(tl.load(logits + 1, mask=on_ranks, other=NEG_INF), axis=1)
        own = tl.where((draft >= 0) & (draft < 2147483647), draft, NOBODY).to(tl.int32)
        if draft_lse_ptr is None:
            draft_top, draft_mass = _row_masses(draft_top_ptr, draft_mass_ptr, 2 * stride_part, stride_part, rows, has_draft,
                                                shards, num_leaves, draft_scale, WIDTH, BLOCK)  # fmt: skip
            reference = tl.where(tl.abs(draft_top) == POS_INF, 0.0, draft_top)
            factor = 1.0 / tl.maximum(draft_mass, 1).to(tl.float32) * ONE
            hot = tl.max(tl.load(words + 1, mask=on_ranks, other=0), axis=1)
            mass_of = tl.where(draft_top == POS_INF, unpack_id(hot).to(tl.int32), mass_of)
        else:
            draft_top = tl.load(draft_lse_ptr + slot * stride_es + i, mask=has_draft, other=0.0)
            # exp(x / T - lse) = exp2((x - lse T) log2(e) / T)
            reference = tl.where(tl.abs(draft_top) == POS_INF, 0.0, draft_top * (1.4426950408889634 / draft_scale))
            # A +inf in the row: its first place is not stored, so the draft stands for it if it is +inf itself.
            mass_of = tl.where(draft_top == POS_INF, tl.where(x == POS_INF, own, NOBODY), mass_of)
        mass_of = tl.where(draft_top == NEG_INF, NOBODY, mass_of)
        mass_of = tl.where(draft_temperature > 0.0, mass_of, own)
        draft_prob = _draft_prob(x, draft, mass_of, reference, factor, draft_scale)
        bad = bad | tl.where(sampled, has_draft & ~missing & (draft_prob <= 0.0), i < 0)
    anchor = tl.load(positions_ptr + tl.load(logits_indices_ptr + row0))
    coin = uniform(coin_words(tl.load(seed_ptr + slot), anchor + 1 + i, anchor, ACCEPT))
    chance = inside & (draft_prob > 0.0) & (coin * draft_prob < target_prob)
    accepted, flags = _stop(i, length, tl.where(sampled, chance, inside & (draft == first)), status, bad, missing)

    here = i == accepted
    greedy = tl.max(tl.where(here & (point | (sampled == 0)), 1, 0), axis=0) > 0
    judged = tl.max(tl.where(here & has_draft & ~missing, 1, 0), axis=0) > 0  # the draft there was made, and rejected
    named = tl.max(tl.where(here & inside, 1, 0), axis=0) > 0
    follows = tl.full((), TARGET, tl.int32)
    id = tl.where(named, tl.sum(tl.where(here & inside, draft, 0), axis=0), -1)
    removed = tl.max(tl.load(words + 2, mask=on_ranks, other=0), axis=1)
    removed = tl.sum(tl.where(here & inside, removed, 0), axis=0)
    if draft_ptr is not None:
        follows = tl.where(judged, RESIDUAL, TARGET).to(tl.int32)
        id = tl.where(judged, tl.sum(tl.where(here, mass_of, 0), axis=0), -1).to(tl.int64)
    follows = tl.where(greedy, KNOWN, follows).to(tl.int32)
    id = tl.where(greedy, tl.sum(tl.where(here, first, 0), axis=0), id)
    row_top = tl.sum(tl.where(here, top, 0.0), axis=0)
    inverse = tl.sum(tl.where(here, inverse, 0.0), axis=0)
    reference = tl.sum(tl.where(here, reference, 0.0), axis=0)
    factor = tl.sum(tl.where(here, factor, 0.0), axis=0)
    return accepted, flags, follows, id, removed, row_top, inverse, reference, factor


@triton.jit
def _residual(target_row, draft_row, ids, start, held, row_top, inverse, mass_of, reference, factor, scale, draft_scale):
    """[target_prob - draft_prob]+ of ids, 0 for those of other ranks."""
    local = ids - start
    inside = (local >= 0) & (local < held)
    x = numbers(tl.load(target_row + local, mask=inside, other=NEG_INF).to(tl.float32))
    target_prob = tl.exp2(below_max(x, row_top) * scale) * inverse
    y = numbers(tl.load(draft_row + local, mask=inside, other=NEG_INF).to(tl.float32))
    draft_prob = _draft_prob(y, ids, mass_of, reference, factor, draft_scale)
    return tl.where(inside, tl.maximum(target_prob - draft_prob, 0.0), 0.0)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "start", "held", "first_leaf"])
def accept_residual_kernel(
    target_ptr,  # [L, W]
    cu_logits_ptr,  # [R+1]
    layout,  # logits_indices [L], token_ids, positions [N_max]
    gathered,  # row_words, row_logits, top, mass, draft_top, draft_mass of all ranks [N, L, ...], and their stride
    draft_ptr, draft_lse_ptr, draft_temperature_ptr,  # [S, K, W], [S, K] or None, [S] or None
    temperature_ptr, seed_ptr, slots_ptr,  # [S], [S], [R] or None
    record_ptr, values_ptr,  # int64 [R, 4], fp32 [R, 4] of the part: the decision
    residual_ptr,  # int64 [R, NL] of the part
    num_requests, num_slots, num_rows, num_drafts, shards, start, held, first_leaf, num_leaves, vocab,
    stride_t, stride_ds, stride_dk, stride_es,
    WIDTH: tl.constexpr, SHARDS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Item = leaves of a request. Each item decides for itself, from L2: dearer in loads than in waiting for one that decides."""
    chunks = tl.cdiv(num_leaves, CHUNK)
    request = tl.program_id(0) // chunks
    item = tl.program_id(0) % chunks
    slot, row0, length = _request(request, slots_ptr, cu_logits_ptr, num_requests, num_slots, num_rows, num_drafts)
    if length >= 0:
        temperature, draft_temperature = _temperatures(temperature_ptr, draft_temperature_ptr, slot, length)
        scale, draft_scale = log2_scale(temperature), log2_scale(draft_temperature)
        accepted, flags, follows, id, removed, row_top, inverse, reference, factor = _decide(
            slot, row0, length, temperature, draft_temperature, gathered, (draft_ptr, draft_lse_ptr, stride_es), layout, seed_ptr,
            shards, num_leaves, vocab, WIDTH, SHARDS, BLOCK,
        )  # fmt: skip
        leaf = item * CHUNK + tl.arange(0, CHUNK)
        mass = tl.zeros([CHUNK], tl.int64)
        if follows == RESIDUAL:
            ids = (first_leaf + leaf)[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
            target_row = target_ptr + (row0 + accepted).to(tl.int64) * stride_t
            draft_row = draft_ptr + slot * stride_ds + accepted.to(tl.int64) * stride_dk
            residual = _residual(target_row, draft_row, ids, start, held, row_top, inverse, id, reference, factor, scale,
                                 draft_scale)  # fmt: skip
            mass = masses(residual, CHUNK, LEAF, RESIDUAL_ONE)
        tl.store(residual_ptr + request.to(tl.int64) * num_leaves + leaf, mass, mask=leaf < num_leaves)
        if item == 0:
            record, values = record_ptr + request * 4, values_ptr + request * 4
            tl.store(record, accepted.to(tl.int64))
            tl.store(record + 1, flags.to(tl.int64))
            tl.store(record + 2, follows.to(tl.int64))
            tl.store(record + 3, id.to(tl.int64))
            tl.store(values, row_top)
            tl.store(values + 1, inverse)
            tl.store(values + 2, reference)
            tl.store(values + 3, factor)


@triton.jit
def _merged_leaves(top_ptr, mass_ptr, stride_part, row, shard_width, num_leaves, pieces, vocab, scale, excluded, removed,
                   LEAVES: tl.constexpr):  # fmt: skip
    """Maximum and mass of every leaf of a row from its pieces, without what `excluded` (-1 = nobody) adds to its own."""
    leaf = tl.arange(0, LEAVES)
    first = leaf * LEAF // shard_width
    top = tl.full([LEAVES], float("-inf"), tl.float32)
    for n in range(pieces):
        shard = first + n
        here = shard * shard_width < tl.minimum((leaf + 1) * LEAF, vocab)
        where = row * num_leaves + (leaf - shard * shard_width // LEAF)
        tops = tl.load(top_ptr + shard.to(tl.int64) * (2 * stride_part) + where, mask=here, other=NEG_INF)
        top = tl.maximum(top, tops)
    mass = tl.zeros([LEAVES], tl.int64)
    for n in range(pieces):
        shard = first + n
        here = shard * shard_width < tl.minimum((leaf + 1) * LEAF, vocab)
        where = row * num_leaves + (leaf - shard * shard_width // LEAF)
        tops = tl.load(top_ptr + shard.to(tl.int64) * (2 * stride_part) + where, mask=here, other=NEG_INF)
        own = tl.load(mass_ptr + shard.to(tl.int64) * stride_part + where, mask=here, other=0)
        own -= tl.where((leaf == excluded // LEAF) & (shard == excluded // shard_width), removed, 0)
        # The piece that has the maximum keeps its integer, so that a leaf of one piece is that piece.
        scaled = (own.to(tl.float32) * tl.exp2(below_max(tops, top) * scale)).to(tl.int64)
        mass += tl.where(tops == top, own, scaled)
    return top, mass


@triton.jit
def _race_owned(log_weight, leaf, inside, seed, position, anchor):
    """Best word among this rank's ids of a leaf by log2 weight [LEAF] (-inf = excluded)."""
    words = lane_words(seed, leaf * LEAF, position, anchor, CORRECT, 1, LEAF)
    key = log_weight - tl.reshape(log2_exponential(words), [LEAF])
    ids = leaf * LEAF + tl.arange(0, LEAF)
    return tl.max(tl.where(inside, pack(tl.where(log_weight > NEG_INF, key, NEG_INF), ids), 0), axis=0)


@triton.jit
def _draw_target(target_row, top_ptr, mass_ptr, stride_part, row, row_top, scale, excluded, removed, start, held, shard_width,
                 num_leaves, pieces, vocab, seed, position, anchor, LEAVES: tl.constexpr):  # fmt: skip
    """Draw from the target's row without `excluded`, or from the whole row where nothing else has mass: (word, flags)."""
    top, mass = _merged_leaves(top_ptr, mass_ptr, stride_part, row, shard_width, num_leaves, pieces, vocab, scale, excluded,
                               removed, LEAVES)  # fmt: skip
    flags = tl.zeros((), tl.int32)
    if tl.max(mass, axis=0) <= 0:
        flags += EMPTY_RESIDUAL
        excluded = excluded * 0 - 1
        removed = removed * 0
        top, mass = _merged_leaves(top_ptr, mass_ptr, stride_part, row, shard_width, num_leaves, pieces, vocab, scale, excluded,
                                   removed, LEAVES)  # fmt: skip
    weight = tl.where(mass > 0, tl.log2(tl.maximum(mass, 1).to(tl.float32)) + below_max(top, row_top) * scale, NEG_INF)
    winner = unpack_id(_race_leaves(weight, seed, position, anchor, LEAVES))
    ids = winner * LEAF + tl.arange(0, LEAF)
    inside = (ids >= start) & (ids - start < held)
    x = numbers(tl.load(target_row + ids - start, mask=inside, other=NEG_INF).to(tl.float32))
    inner = tl.where((ids == excluded) | (x == NEG_INF), NEG_INF, (x - row_top) * scale)
    return _race_owned(inner, winner, inside, seed, position, anchor), flags


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "start", "held"])
def accept_draw_kernel(
    target_ptr,  # [L, W]
    cu_logits_ptr,  # [R+1]
    layout,  # logits_indices [L], token_ids, positions [N_max]
    gathered,  # row_words, row_logits, top, mass, draft_top, draft_mass of all ranks [N, L, ...], and their stride
    decided,  # record, values, residual masses of all ranks [N, R, ...] and their stride, or Nones: decided here
    draft_ptr, draft_temperature_ptr,  # [S, K, W] or None, [S] or None
    temperature_ptr, seed_ptr, slots_ptr,  # [S], [S], [R] or None
    word_ptr,  # int64 [R] of the part
    verdict_ptr,  # int64 [R, 2] of the part: accepted drafts, flags
    num_requests, num_slots, num_rows, num_drafts, shards, start, held, shard_width, num_leaves, pieces, vocab,
    stride_t, stride_ds, stride_dk,
    WIDTH: tl.constexpr, SHARDS: tl.constexpr, LEAVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Request = program. The race over leaves is the same on every rank; inside the winning leaf each rank races its ids."""
    request = tl.program_id(0)
    (row_words_ptr, row_logits_ptr, top_ptr, mass_ptr, draft_top_ptr, draft_mass_ptr, stride_part) = gathered
    (record_ptr, values_ptr, residual_ptr, stride_decided) = decided
    (logits_indices_ptr, token_ids_ptr, positions_ptr) = layout
    slot, row0, length = _request(request, slots_ptr, cu_logits_ptr, num_requests, num_slots, num_rows, num_drafts)
    word = tl.zeros((), tl.int64)
    accepted = tl.zeros((), tl.int32)
    flags = tl.zeros((), tl.int32)
    if length >= 0:
        temperature, draft_temperature = _temperatures(temperature_ptr, draft_temperature_ptr, slot, length)
        scale, draft_scale = log2_scale(temperature), log2_scale(draft_temperature)
        if record_ptr is None:
            accepted, flags, follows, id, removed, row_top, inverse, reference, factor = _decide(
                slot, row0, length, temperature, draft_temperature, gathered, (draft_ptr, draft_ptr, 0), layout, seed_ptr,
                shards, num_leaves, vocab, WIDTH, SHARDS, BLOCK,
            )  # fmt: skip
        else:
            accepted = tl.load(record_ptr + request * 4).to(tl.int32)
            flags = tl.load(record_ptr + request * 4 + 1).to(tl.int32)
            follows = tl.load(record_ptr + request * 4 + 2).to(tl.int32)
            id = tl.load(record_ptr + request * 4 + 3)
            row_top = tl.load(values_ptr + request * 4)
            removed = tl.zeros((), tl.int64)
        seed = tl.load(seed_ptr + slot)
        anchor = tl.load(positions_ptr + tl.load(logits_indices_ptr + row0))
        position = anchor + accepted + 1
        row = (row0 + accepted).to(tl.int64)
        target_row = target_ptr + row * stride_t
        if follows == KNOWN:
            word = pack(tl.zeros((), tl.float32), id)
        if draft_ptr is not None:
            if follows == RESIDUAL:
                leaf = tl.arange(0, LEAVES)
                first = leaf * LEAF // shard_width
                mass = tl.zeros([LEAVES], tl.int64)
                for n in range(pieces):
                    shard = first + n
                    here = shard * shard_width < tl.minimum((leaf + 1) * LEAF, vocab)
                    where = request.to(tl.int64) * num_leaves + (leaf - shard * shard_width // LEAF)
                    mass += tl.load(residual_ptr + shard.to(tl.int64) * stride_decided + where, mask=here, other=0)
                if tl.max(mass, axis=0) > 0:
                    weight = tl.where(mass > 0, tl.log2(tl.maximum(mass, 1).to(tl.float32)), NEG_INF)
                    winner = unpack_id(_race_leaves(weight, seed, position, anchor, LEAVES))
                    ids = winner * LEAF + tl.arange(0, LEAF)
                    draft_row = draft_ptr + slot * stride_ds + accepted.to(tl.int64) * stride_dk
                    inverse = tl.load(values_ptr + request * 4 + 1)
                    reference = tl.load(values_ptr + request * 4 + 2)
                    factor = tl.load(values_ptr + request * 4 + 3)
                    residual = _residual(target_row, draft_row, ids, start, held, row_top, inverse, id, reference, factor, scale,
                                         draft_scale)  # fmt: skip
                    weight = tl.where(residual > 0.0, tl.log2(tl.where(residual > 0.0, residual, 1.0)), NEG_INF)
                    inside = (ids >= start) & (ids - start < held)
                    word = _race_owned(weight, winner, inside, seed, position, anchor)
                else:
                    flags |= EMPTY_RESIDUAL
                    follows = tl.full((), TARGET, tl.int32)
                    id = id * 0 - 1
        if follows == TARGET:
            word, empty = _draw_target(target_row, top_ptr, mass_ptr, stride_part, row, row_top, scale, id, removed, start, held,
                                       shard_width, num_leaves, pieces, vocab, seed, position, anchor, LEAVES)  # fmt: skip
            flags |= empty
    tl.store(word_ptr + request, word)
    tl.store(verdict_ptr + request * 2, accepted.to(tl.int64))
    tl.store(verdict_ptr + request * 2 + 1, flags.to(tl.int64))


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "num_forward"])
def accept_finish_kernel(
    query_start_ptr, cu_logits_ptr,  # [R+1]
    layout,  # logits_indices [L], token_ids, positions [N_max]
    row_words_ptr,  # int64 [N, L, 4], where words decide, or None
    word_ptr, verdict_ptr,  # int64 [N, R], [N, R, 2], where a draw was made, or None
    slots_ptr,  # [R] or None
    tokens_ptr,  # [R, K+1]
    accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr,  # [R]
    commit_ptr,  # [N_max]
    flags_ptr,  # [R]
    anchors_ptr, anchor_positions_ptr,  # [S] or None, advanced in place
    num_requests, num_slots, num_rows, num_forward, num_drafts, shards, vocab,
    stride_part, stride_a, stride_p,
    WIDTH: tl.constexpr, SHARDS: tl.constexpr,
):  # fmt: skip
    """Request = program: everything follows from the gathered parts, so every rank writes the same."""
    request = tl.program_id(0)
    (logits_indices_ptr, token_ids_ptr, positions_ptr) = layout
    slot, row0, length = _request(request, slots_ptr, cu_logits_ptr, num_requests, num_slots, num_rows, num_drafts)
    if length < 0:
        _emit_nothing(request, slot, tokens_ptr, accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr, commit_ptr,
                      flags_ptr, query_start_ptr, num_requests, num_drafts, num_forward, WIDTH)  # fmt: skip
    else:
        i = tl.arange(0, WIDTH)
        rows = (row0 + i).to(tl.int64)
        draft, inside, missing, bad = _drafts(logits_indices_ptr, token_ids_ptr, rows, i < length, vocab)
        if row_words_ptr is not None:
            first, status = _shown(row_words_ptr, stride_part, rows, i <= length, shards, WIDTH, SHARDS)
            accepted, flags = _stop(i, length, inside & (draft == first), status, bad, missing)
            token = tl.sum(tl.where(i == accepted, first, 0), axis=0)
        else:
            shard = tl.arange(0, SHARDS)
            words = word_ptr + shard.to(tl.int64) * stride_part + request
            token = unpack_id(tl.max(tl.load(words, mask=shard < shards, other=0), axis=0))
            accepted = tl.load(verdict_ptr + request * 2).to(tl.int32)
            flags = tl.load(verdict_ptr + request * 2 + 1).to(tl.int32)
        kept = tl.where(i < accepted, draft, -1)
        tl.store(tokens_ptr + request.to(tl.int64) * (num_drafts + 1) + i, kept, mask=(i <= num_drafts) & (i != accepted))
        tl.store(accepted_ptr + request, accepted)
        tl.store(emitted_ptr + request, accepted + 1)
        tl.store(rejected_ptr + request, length - accepted)
        tl.store(flags_ptr + request, flags)
        last_row = tl.load(logits_indices_ptr + row0 + accepted)
        tl.store(last_row_ptr + request, last_row)
        if anchor_positions_ptr is not None:
            anchor = tl.load(positions_ptr + tl.load(logits_indices_ptr + row0))
            tl.store(anchor_positions_ptr + slot * stride_p, anchor + accepted + 1)
        _emit_rows(commit_ptr, query_start_ptr, request, num_requests, last_row, num_forward, 128)
        _emit_token(tokens_ptr, next_ptr, anchors_ptr, stride_a, request, slot, num_drafts, accepted, token)


def _options(config, capped=True):
    limit = config.max_registers if capped else None
    return dict(num_warps=config.num_warps, enable_fp_fusion=False) | ({} if limit is None else {"maxnreg": limit})


def launch_accept_normalise(items, args, *, noisy, config):
    """Launch one program per item (rows x leaves of a request)."""
    accept_normalise_kernel[(items,)](*args, NOISY=noisy, GROUP=config.group, CHUNK=config.chunk, **_options(config))


def launch_accept_residual(items, args, *, width, shards, config):
    """Launch one program per item (leaves of a request)."""
    accept_residual_kernel[(items,)](
        *args, WIDTH=width, SHARDS=shards, CHUNK=config.chunk, BLOCK=config.block, **_options(config, capped=False)
    )


def launch_accept_draw(requests, args, *, width, shards, leaves, config):
    """Launch one program per request."""
    accept_draw_kernel[(requests,)](
        *args, WIDTH=width, SHARDS=shards, LEAVES=leaves, BLOCK=config.block, **_options(config, capped=False)
    )


def launch_accept_finish(requests, args, *, width, shards):
    """Launch one program per request."""
    accept_finish_kernel[(requests,)](*args, WIDTH=width, SHARDS=shards, num_warps=1, enable_fp_fusion=False)
