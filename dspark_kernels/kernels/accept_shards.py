"""Lossless acceptance of a chain on vocabulary shards: each phase one launch on every rank, with a gather between them.

normalise  maximum and integer mass of each leaf of the rank's ids, and of each row its best word and the logits of its draft
residual   every rank judges from the gathered parts, and sums [kept * target - draft]+ of its ids in the rows that need it
draw       every rank judges, races the leaves, and those with ids in the winning leaf race inside it
finish     the best word of all ranks is the token

What an id contributes depends on the id, never on the rank that has it: leaves, octets and noise lanes are global, masses are
integers. So every rank judges the same, and the same as kernels/accept.py does on whole rows, as long as no leaf is cut. A cut leaf
is two pieces with maxima of their own, merged by one rounding of each mass. Symbols: R requests, K drafts, L logit rows, W ids of a
shard, N ranks, NL leaves of 1024 ids that a shard can touch. Rules: accept_rules.py. Oracle: reference/accept.py on whole rows.
"""

import triton
import triton.language as tl

from .accept_emit import emit, emit_nothing
from .accept_laws import RESIDUAL_ONE, read_record
from .accept_rows import (
    DRAFT_OF,
    DRAFT_PROB,
    FACTOR,
    FIRST,
    IDS,
    INVERSE,
    KEPT,
    LOG2E,
    NAN,
    NOBODY,
    NONFINITE_ROW,
    REFERENCE,
    SOFTMAX,
    STATUS,
    TARGET_OF,
    TARGET_PROB,
    TOP,
    VALUES,
    finite_or_zero,
    soft_prob,
)
from .accept_rules import choose_block, judge_block, judge_match, judge_token, read_drafts
from .primitives.fence import stores_done
from .primitives.leaves import leaf_masses
from .primitives.mass import LEAF, NEG_INF, ONE, POS_INF, below_max, log2_scale, masses, numbers, octet_sums
from .primitives.philox import CORRECT, COUPLED, LEAF as LEAF_STREAM, lane_words, log2_exponential
from .primitives.race import pack, unpack_id
from .primitives.slots import state_slots
from .primitives.ticket import arrive

FINITE = tl.constexpr(256)  # a row showed a finite logit; beside the bits of `flags`


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
            top, mass = leaf_masses(x, scale, PAIRS)
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
            top, mass = leaf_masses(x, draft_scale, PAIRS)
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
def _record(
    slot, row0, length, temperature, draft_temperature, gathered, law, layout, row_values_ptr, row_ids_ptr, shards, num_leaves,
    vocab, WIDTH: tl.constexpr, SHARDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The records (accept_rows.py) of all rows of a request, from the parts of all ranks."""
    row_words_ptr, row_logits_ptr, top_ptr, mass_ptr, draft_top_ptr, draft_mass_ptr, stride_part = gathered
    i = tl.arange(0, WIDTH)
    rows = (row0 + i).to(tl.int64)
    live = i <= length
    values, ids_of = row_values_ptr + rows * VALUES, row_ids_ptr + rows * IDS
    shard = tl.arange(0, SHARDS).to(tl.int64)[None, :]
    there = live[:, None] & (shard < shards)
    words = row_words_ptr + shard * stride_part + rows[:, None] * 4
    best = tl.max(tl.load(words, mask=there, other=0), axis=1)
    first = tl.where(best > 0, unpack_id(best), 0).to(tl.int32)
    seen = tl.load(words + 3, mask=there, other=0).to(tl.int32)
    status = tl.max(seen & NAN, axis=1) | tl.where(tl.max(seen & FINITE, axis=1) > 0, 0, NONFINITE_ROW)
    tl.store(ids_of + FIRST, first, mask=live)
    tl.store(ids_of + STATUS, status, mask=live)
    if top_ptr is not None:
        scale = log2_scale(temperature)
        top, mass = _row_masses(top_ptr, mass_ptr, 2 * stride_part, stride_part, rows, live, shards, num_leaves, scale, WIDTH,
                                BLOCK)  # fmt: skip
        inverse = 1.0 / tl.maximum(mass, 1).to(tl.float32) * ONE
        mass_of = tl.where((top == POS_INF) | ((status & NONFINITE_ROW) > 0), first, SOFTMAX)
        draft, inside, missing = read_drafts(i, rows, length, layout, vocab)
        logits = row_logits_ptr + shard * (2 * stride_part) + rows[:, None] * 2
        logit = tl.max(tl.load(logits, mask=there, other=NEG_INF), axis=1)
        target_prob = soft_prob(logit, draft, mass_of, finite_or_zero(top), inverse, scale)
        tl.store(values + TOP, top, mask=live)
        tl.store(values + INVERSE, inverse, mask=live)
        tl.store(values + TARGET_PROB, tl.where(inside, target_prob, 0.0), mask=live)
        tl.store(ids_of + TARGET_OF, mass_of, mask=live)

        # The draft's law: one-hot, by its lse, or by the sums of its own leaves.
        has_draft = i < length
        own = tl.where((draft >= 0) & (draft < 2147483647), draft, NOBODY).to(tl.int32)
        mass_of = own
        reference = tl.zeros([WIDTH], tl.float32)
        factor = tl.full([WIDTH], 1.0, tl.float32)
        x = tl.full([WIDTH], float("-inf"), tl.float32)
        draft_ptr, draft_lse_ptr, stride_ds, stride_dk, stride_es = law
        draft_scale = log2_scale(draft_temperature)
        if draft_ptr is not None:
            x = tl.max(tl.load(logits + 1, mask=there, other=NEG_INF), axis=1)
            soft = tl.full([WIDTH], SOFTMAX, tl.int32)
            if draft_lse_ptr is None:
                draft_top, draft_mass = _row_masses(draft_top_ptr, draft_mass_ptr, 2 * stride_part, stride_part, rows, has_draft,
                                                    shards, num_leaves, draft_scale, WIDTH, BLOCK)  # fmt: skip
                reference = finite_or_zero(draft_top)
                factor = 1.0 / tl.maximum(draft_mass, 1).to(tl.float32) * ONE
                infinite = unpack_id(tl.max(tl.load(words + 1, mask=there, other=0), axis=1)).to(tl.int32)
            else:
                draft_top = tl.load(draft_lse_ptr + slot * stride_es + i, mask=has_draft, other=0.0)
                # exp(x / T - lse) = exp2((x - lse T) log2(e) / T)
                reference = finite_or_zero(draft_top) * (LOG2E / draft_scale)
                # A +inf in the row: its first place is not stored, so the draft stands for it if it is +inf itself.
                infinite = tl.where(x == POS_INF, own, NOBODY)
            soft = tl.where(draft_top == POS_INF, infinite, tl.where(draft_top == NEG_INF, NOBODY, soft))
            mass_of = tl.where(draft_temperature > 0.0, soft, own)
        mass_of = tl.where(missing, NOBODY, mass_of)
        draft_prob = soft_prob(x, draft, mass_of, reference, factor, draft_scale)
        tl.store(values + REFERENCE, reference, mask=live)
        tl.store(values + FACTOR, factor, mask=live)
        tl.store(values + DRAFT_PROB, draft_prob, mask=live)
        tl.store(values + KEPT, tl.full([WIDTH], 1.0, tl.float32), mask=live)
        tl.store(ids_of + DRAFT_OF, mass_of, mask=live)


@triton.jit
def _judge(
    slot, row0, length, temperature, draft_temperature, gathered, law, layout, seed_ptr, row_values_ptr, row_ids_ptr, shards,
    num_leaves, vocab, JUDGE: tl.constexpr, WIDTH: tl.constexpr, SHARDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the rule says, see accept_rules.py, beside the anchor's position."""
    _record(slot, row0, length, temperature, draft_temperature, gathered, law, layout, row_values_ptr, row_ids_ptr, shards,
            num_leaves, vocab, WIDTH, SHARDS, BLOCK)  # fmt: skip
    stores_done()
    _, _, logits_indices_ptr, _, positions_ptr = layout
    anchor = tl.load(positions_ptr + tl.load(logits_indices_ptr + row0))
    i = tl.arange(0, WIDTH)
    seed = tl.zeros((), tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr + slot)
    accepted, wants = JUDGE(i, (row0 + i).to(tl.int64), length, layout, row_values_ptr, row_ids_ptr, None, temperature > 0.0, seed,
                            anchor, vocab)  # fmt: skip
    stores_done()
    return accepted, wants, anchor


@triton.jit
def _own_records(row_values_ptr, row_ids_ptr, row0, WIDTH: tl.constexpr):
    """This program's records, addressed by row: programs of one request judge at the same time, each for itself."""
    shift = tl.program_id(0).to(tl.int64) * WIDTH - row0
    return row_values_ptr + shift * VALUES, row_ids_ptr + shift * IDS


@triton.jit
def _residual(target_row, draft_row, ids, start, held, record, scale, draft_scale):
    """[kept * target_prob - draft_prob]+ of ids, 0 for those of other ranks."""
    target_law, draft_law, kept = record
    local = ids - start
    inside = (local >= 0) & (local < held)
    target_of, row_top, inverse = target_law
    x = numbers(tl.load(target_row + local, mask=inside, other=NEG_INF).to(tl.float32))
    target_prob = soft_prob(x, ids, target_of, row_top, inverse, scale)
    draft_of, reference, factor = draft_law
    y = tl.full(ids.shape, float("-inf"), tl.float32)
    if draft_row is not None:
        y = numbers(tl.load(draft_row + local, mask=inside, other=NEG_INF).to(tl.float32))
    draft_prob = soft_prob(y, ids, draft_of, reference, factor, draft_scale)
    return tl.where(inside, tl.maximum(kept * target_prob - draft_prob, 0.0), 0.0)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "start", "held", "first_leaf"])
def accept_residual_kernel(
    target_ptr,  # [L, W]
    layout,  # None, cu_logits [R+1], logits_indices [L], token_ids, positions [N_max]
    gathered,  # row_words, row_logits, top, mass, draft_top, draft_mass of all ranks [N, L, ...], and their stride
    law,  # draft logits [S, K, W], lse [S, K] or None, their strides
    draft_temperature_ptr, temperature_ptr, seed_ptr, slots_ptr,  # [S] or None, [S], [S], [R] or None
    residual_ptr,  # int64 of the part: [R, NL], where every row may be needed [L, NL]
    row_values_ptr, row_ids_ptr,  # [programs, WIDTH, ...]
    num_requests, num_slots, num_rows, num_drafts, shards, start, held, first_leaf, num_leaves, vocab, stride_t,
    JUDGE: tl.constexpr, EVERY_ROW: tl.constexpr,
    WIDTH: tl.constexpr, SHARDS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Item = leaves of a request. Each item judges for itself, from L2: dearer in loads than in waiting for one that does."""
    chunks = tl.cdiv(num_leaves, CHUNK)
    request = tl.program_id(0) // chunks
    item = tl.program_id(0) % chunks
    slot, row0, length = _request(request, slots_ptr, layout[1], num_requests, num_slots, num_rows, num_drafts)
    if length >= 0:
        draft_ptr, _, stride_ds, stride_dk, _ = law
        row_values_ptr, row_ids_ptr = _own_records(row_values_ptr, row_ids_ptr, row0, WIDTH)
        temperature, draft_temperature = _temperatures(temperature_ptr, draft_temperature_ptr, slot, length)
        scale, draft_scale = log2_scale(temperature), log2_scale(draft_temperature)
        accepted, wants, _ = _judge(
            slot, row0, length, temperature, draft_temperature, gathered, law, layout, seed_ptr, row_values_ptr, row_ids_ptr,
            shards, num_leaves, vocab, JUDGE, WIDTH, SHARDS, BLOCK,
        )  # fmt: skip
        leaf = item * CHUNK + tl.arange(0, CHUNK)
        ids = (first_leaf + leaf)[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
        begin = accepted
        end = tl.where(wants, accepted + 1, accepted)
        if EVERY_ROW:
            begin = accepted * 0
            end = tl.where(wants, accepted, 0)
        for judged in range(begin, end):
            row = (row0 + judged).to(tl.int64)
            record = read_record(row_values_ptr, row_ids_ptr, row)
            draft_row = draft_ptr + slot * stride_ds + tl.cast(judged, tl.int64) * stride_dk
            residual = _residual(target_ptr + row * stride_t, draft_row, ids, start, held, record, scale, draft_scale)
            mass = masses(residual, CHUNK, LEAF, RESIDUAL_ONE)
            at = request.to(tl.int64)
            if EVERY_ROW:
                at = row
            tl.store(residual_ptr + at * num_leaves + leaf, mass, mask=leaf < num_leaves)


@triton.jit
def _merged_leaves(top_ptr, mass_ptr, stride_part, row, cut, vocab, scale, excluded, removed, LEAVES: tl.constexpr):
    """Maximum and mass of every leaf of a row from its pieces, without what `excluded` (-1 = nobody) adds to its own."""
    shard_width, num_leaves, pieces = cut
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
        owner = (leaf == tl.where(excluded >= 0, excluded // LEAF, -1)) & (shard == excluded // shard_width)
        own -= tl.where(owner, removed, 0)
        # The piece that has the maximum keeps its integer, so that a leaf of one piece is that piece.
        scaled = (own.to(tl.float32) * tl.exp2(below_max(tops, top) * scale)).to(tl.int64)
        mass += tl.where(tops == top, own, scaled)
    return top, mass


@triton.jit
def _without_draft(gathered, row, record, cut, shards, vocab, scale, LEAVES: tl.constexpr, SHARDS: tl.constexpr):
    """Residual mass of every leaf of a row whose draft's law is one-hot: the target's, less the draft's octet without it."""
    row_words_ptr, _, top_ptr, mass_ptr, _, _, stride_part = gathered
    target_law, draft_law, kept = record
    target_of, reference, inverse = target_law
    draft_of, _, _ = draft_law
    shard = tl.arange(0, SHARDS).to(tl.int64)
    removed = tl.load(row_words_ptr + shard * stride_part + row * 4 + 2, mask=shard < shards, other=0)
    listed = tl.where(draft_of < vocab, draft_of, -1)
    tops, mass = _merged_leaves(top_ptr, mass_ptr, stride_part, row, cut, vocab, scale, listed, tl.max(removed, axis=0), LEAVES)
    unlisted = mass.to(tl.float32) * tl.exp2(below_max(tops, reference) * scale) * (inverse * (1.0 / ONE))
    if target_of != SOFTMAX:
        leaf = tl.arange(0, LEAVES)
        unlisted = tl.where(leaf == tl.where(listed != target_of, target_of // LEAF, -1), 1.0, 0.0)
    return (kept * unlisted * RESIDUAL_ONE).to(tl.int64)


@triton.jit
def _summed(residual_ptr, stride_residual, row, cut, vocab, LEAVES: tl.constexpr):
    """Residual mass of every leaf of a row from the pieces of all ranks."""
    shard_width, num_leaves, pieces = cut
    leaf = tl.arange(0, LEAVES)
    first = leaf * LEAF // shard_width
    mass = tl.zeros([LEAVES], tl.int64)
    for n in range(pieces):
        shard = first + n
        here = shard * shard_width < tl.minimum((leaf + 1) * LEAF, vocab)
        where = row * num_leaves + (leaf - shard * shard_width // LEAF)
        mass += tl.load(residual_ptr + shard.to(tl.int64) * stride_residual + where, mask=here, other=0)
    return mass


@triton.jit
def _log2(weight):
    return tl.where(weight > 0, tl.log2(tl.where(weight > 0, weight, 1).to(tl.float32)), NEG_INF)


@triton.jit
def _race(log_weight, ids, inside, first_lane, seed, position, anchor, STREAM: tl.constexpr, LANES: tl.constexpr):
    """Best word by log2 weight (-inf = excluded); ids are first_lane + 0, 1, ...; 0 where none is inside."""
    words = lane_words(seed, first_lane, position, anchor, STREAM, 1, LANES)
    key = log_weight - tl.reshape(log2_exponential(words), [LANES])
    return tl.max(tl.where(inside, pack(tl.where(log_weight > NEG_INF, key, NEG_INF), ids), 0), axis=0)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "start", "held"])
def accept_draw_kernel(
    target_ptr,  # [L, W]
    layout,  # None, cu_logits [R+1], logits_indices [L], token_ids, positions [N_max]
    gathered,  # row_words, row_logits, top, mass, draft_top, draft_mass of all ranks [N, L, ...], and their stride
    law,  # draft logits [S, K, W] or None (one-hot), lse [S, K] or None, their strides
    residual_ptr,  # int64 [N, R, NL], where every row may be needed [N, L, NL]; None: one-hot
    draft_temperature_ptr, temperature_ptr, seed_ptr, slots_ptr,  # [S] or None, [S], [S], [R] or None
    word_ptr,  # int64 [R] of the part
    verdict_ptr,  # int64 [R, 2] of the part: accepted drafts, whether the residual was empty
    row_values_ptr, row_ids_ptr, total_ptr,  # [R, WIDTH, ...]
    cut,  # ids and leaves of a shard, ranks that can share a leaf
    num_requests, num_slots, num_rows, num_drafts, shards, start, held, vocab, stride_t, stride_residual,
    JUDGE: tl.constexpr, CHOOSE: tl.constexpr,
    WIDTH: tl.constexpr, SHARDS: tl.constexpr, LEAVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Request = program. The race over leaves is the same on every rank; inside the winning leaf each rank races its ids."""
    request = tl.program_id(0)
    slot, row0, length = _request(request, slots_ptr, layout[1], num_requests, num_slots, num_rows, num_drafts)
    word = tl.zeros((), tl.int64)
    accepted = tl.zeros((), tl.int32)
    empty = word
    if length >= 0:
        draft_ptr, _, stride_ds, stride_dk, _ = law
        row_values_ptr, row_ids_ptr = _own_records(row_values_ptr, row_ids_ptr, row0, WIDTH)
        temperature, draft_temperature = _temperatures(temperature_ptr, draft_temperature_ptr, slot, length)
        scale, draft_scale = log2_scale(temperature), log2_scale(draft_temperature)
        accepted, wants, anchor = _judge(
            slot, row0, length, temperature, draft_temperature, gathered, law, layout, seed_ptr, row_values_ptr, row_ids_ptr,
            shards, cut[1], vocab, JUDGE, WIDTH, SHARDS, BLOCK,
        )  # fmt: skip
        seed = tl.load(seed_ptr + slot)
        if CHOOSE is not None:
            if wants:
                i = tl.arange(0, WIDTH)
                rows = (row0 + i).to(tl.int64)
                total_ptr += request.to(tl.int64) * WIDTH - row0
                for judged in range(0, accepted):
                    row = (row0 + judged).to(tl.int64)
                    if residual_ptr is None:
                        record = read_record(row_values_ptr, row_ids_ptr, row)
                        mass = _without_draft(gathered, row, record, cut, shards, vocab, scale, LEAVES, SHARDS)
                    else:
                        mass = _summed(residual_ptr, stride_residual, row, cut, vocab, LEAVES)
                    tl.store(total_ptr + row, tl.sum(mass, axis=0))
                stores_done()
                stop = accepted
                accepted = CHOOSE(i, rows, stop, row_values_ptr, total_ptr, 1, seed, anchor, WIDTH, 4)
                wants = accepted < stop

        row = (row0 + accepted).to(tl.int64)
        target_row = target_ptr + row * stride_t
        word = pack(tl.zeros((), tl.float32), tl.load(row_ids_ptr + row * IDS + FIRST, volatile=True).to(tl.int64))
        finite = (tl.load(row_ids_ptr + row * IDS + STATUS, volatile=True) & NONFINITE_ROW) == 0
        if (temperature > 0.0) & finite:
            record = read_record(row_values_ptr, row_ids_ptr, row)
            target_of, row_top = record[0][0], record[0][1]
            tops, mass = _merged_leaves(gathered[2], gathered[3], gathered[6], row, cut, vocab, scale,
                                         tl.full((), -1, tl.int32), tl.zeros((), tl.int64), LEAVES)  # fmt: skip
            leaf = tl.arange(0, LEAVES)
            weight = _log2(mass) + below_max(tops, row_top) * scale
            from_residual = wants
            if wants:
                if residual_ptr is None:
                    residual = _without_draft(gathered, row, record, cut, shards, vocab, scale, LEAVES, SHARDS)
                else:
                    at = request.to(tl.int64)
                    if CHOOSE is not None:
                        at = row
                    residual = _summed(residual_ptr, stride_residual, at, cut, vocab, LEAVES)
                from_residual = tl.max(residual, axis=0) > 0
                weight = tl.where(from_residual, _log2(residual), weight)
            if from_residual | (target_of == SOFTMAX):
                position = anchor + accepted + 1
                here = leaf * LEAF < vocab
                weight = tl.where(here, weight, NEG_INF)
                first_leaf = tl.zeros((), tl.int32)
                winner = unpack_id(_race(weight, leaf, here, first_leaf, seed, position, anchor, LEAF_STREAM, LEAVES))
                ids = winner * LEAF + tl.arange(0, LEAF)
                inside = (ids >= start) & (ids - start < held)
                x = numbers(tl.load(target_row + ids - start, mask=inside, other=NEG_INF).to(tl.float32))
                inner = tl.where(x == NEG_INF, NEG_INF, (x - row_top) * scale)
                if from_residual:
                    draft_row = draft_ptr
                    if draft_ptr is not None:
                        draft_row = draft_ptr + slot * stride_ds + accepted.to(tl.int64) * stride_dk
                    inner = _log2(_residual(target_row, draft_row, ids, start, held, record, scale, draft_scale))
                word = _race(inner, ids, inside, winner * LEAF, seed, position, anchor, CORRECT, LEAF)
            empty = tl.where(wants & (from_residual == 0), 1, 0).to(tl.int64)
    tl.store(word_ptr + request, word)
    tl.store(verdict_ptr + request * 2, accepted.to(tl.int64))
    tl.store(verdict_ptr + request * 2 + 1, empty)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "num_forward"])
def accept_finish_kernel(
    layout,  # query_start, cu_logits [R+1], logits_indices [L], token_ids, positions [N_max]
    gathered,  # row_words, row_logits, top, mass, draft_top, draft_mass of all ranks [N, L, ...], and their stride
    law,  # (draft logits or None: not read; lse [S, K] or None, their strides)
    word_ptr, verdict_ptr,  # int64 [N, R], [N, R, 2], or None: the rows' own words decide
    draft_temperature_ptr, temperature_ptr, slots_ptr,  # [S] or None, [S] or None, [R] or None
    outputs,  # (tokens [R, K+1], five of [R], commit [N_max], flags [R], None), (anchors and positions [S] or None, strides)
    row_values_ptr, row_ids_ptr,  # [R, WIDTH, ...]
    num_requests, num_slots, num_rows, num_forward, num_drafts, shards, num_leaves, vocab, stride_drawn,
    WIDTH: tl.constexpr, SHARDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Request = program: everything follows from the gathered parts, so every rank writes the same."""
    request = tl.program_id(0)
    slot, row0, length = _request(request, slots_ptr, layout[1], num_requests, num_slots, num_rows, num_drafts)
    if length < 0:
        emit_nothing(request, slot, layout, outputs, num_requests, num_drafts, num_forward, WIDTH)
    else:
        row_values_ptr, row_ids_ptr = _own_records(row_values_ptr, row_ids_ptr, row0, WIDTH)
        temperature, draft_temperature = _temperatures(temperature_ptr, draft_temperature_ptr, slot, length)
        accepted, _, anchor = _judge(
            slot, row0, length, temperature, draft_temperature, gathered, law, layout, None, row_values_ptr, row_ids_ptr, shards,
            num_leaves, vocab, judge_match, WIDTH, SHARDS, BLOCK,
        )  # fmt: skip
        empty = length < 0
        if word_ptr is not None:
            shard = tl.arange(0, SHARDS).to(tl.int64)
            words = tl.load(word_ptr + shard * stride_drawn + request, mask=shard < shards, other=0)
            token = unpack_id(tl.max(words, axis=0))
            accepted = tl.load(verdict_ptr + request * 2).to(tl.int32)
            empty = tl.load(verdict_ptr + request * 2 + 1) > 0
        else:
            token = tl.load(row_ids_ptr + (row0 + accepted).to(tl.int64) * IDS + FIRST, volatile=True).to(tl.int64)
        view = (None, None, vocab, None, None, None, None, None, None, None)  # no logits are read
        emit(request, slot, row0, length, accepted, token, empty, anchor, temperature > 0.0, view, layout, outputs, None,
             row_values_ptr, row_ids_ptr, log2_scale(temperature), num_requests, num_drafts, num_forward, word_ptr is not None,
             WIDTH)  # fmt: skip


_JUDGES = {"token": judge_token, "block": judge_block}


def _options(config):
    options = dict(num_warps=config.num_warps, enable_fp_fusion=False)
    return options if config.max_registers is None else options | dict(maxnreg=config.max_registers)


def launch_accept_normalise(items, args, *, noisy, config):
    """Launch one program per item (rows x leaves of a request)."""
    accept_normalise_kernel[(items,)](*args, NOISY=noisy, GROUP=config.group, CHUNK=config.chunk, **_options(config))


def launch_accept_residual(items, args, *, rule, config, **sizes):
    """Launch one program per item (leaves of a request)."""
    constants = dict(JUDGE=_JUDGES[rule], EVERY_ROW=rule == "block", CHUNK=config.chunk, BLOCK=config.block)
    accept_residual_kernel[(items,)](*args, **constants, **sizes, **_options(config))


def launch_accept_draw(requests, args, *, rule, config, **sizes):
    """Launch one program per request."""
    constants = dict(JUDGE=_JUDGES[rule], CHOOSE=choose_block if rule == "block" else None, BLOCK=config.block)
    accept_draw_kernel[(requests,)](*args, **constants, **sizes, **_options(config))


def launch_accept_finish(requests, args, *, config, **sizes):
    """Launch one program per request."""
    accept_finish_kernel[(requests,)](*args, BLOCK=config.block, **sizes, **_options(config))
