"""The laws that drafts were drawn from, as functions the acceptance kernel takes as constexprs, three per kind of proposal.

    record     the draft's part of a row's record: who has the mass, reference and factor of `soft_prob`, the draft's probability
    residual   masses per leaf of [kept * target - draft]+ (scale 2^60), from one item of wave 2, or of a row at once
    inner      that residual inside one leaf, fp32 [LEAF]

stored: logits [S, K, Vd], ids are columns, or columns are mapped to ids, each id at most once (the map is inverted at the start
of the launch).
listed: C ids with logits (sparse), or the draft alone (one-hot): the target's leaf masses stay, less the octets of the listed ids,
computed again with and without them: the same tree, hence the same bits. Symbols: S state slots, K drafts, C candidates,
kept = P_i of the block rule (1 under the token rule). Oracle: reference/accept.py.
"""

import triton
import triton.language as tl

from ..primitives.fence import stores_done
from ..primitives.leaves import MASS_BITS, first_leaf, first_of, leaf_masses, merge_leaves
from ..primitives.mass import LEAF, NEG_INF, ONE, POS_INF, below_max, masses, numbers, octet_sums
from ..primitives.ticket import arrive
from .rows import (
    DRAFT_OF,
    DRAFT_PROB,
    FACTOR,
    IDS,
    INVERSE,
    KEPT,
    LOG2E,
    NOBODY,
    REFERENCE,
    SOFTMAX,
    TARGET_OF,
    TOP,
    VALUES,
    finite_or_zero,
    load_leaf,
    soft_prob,
)
from .target import read_row, read_tile

MAP_COLUMNS = tl.constexpr(4096)  # of a draft vocabulary's map per item that inverts it
RESIDUAL_ONE = tl.constexpr(1152921504606846976.0)  # 2^60: residual masses of a row sum to at most 1


@triton.jit
def read_record(row_values_ptr, row_ids_ptr, row):
    """(target's law, draft's law, kept) of a row, each law as (who has mass, reference, factor)."""
    values, ids_of = row_values_ptr + row * VALUES, row_ids_ptr + row * IDS
    target_law = (
        tl.load(ids_of + TARGET_OF, volatile=True),
        finite_or_zero(tl.load(values + TOP, volatile=True)),
        tl.load(values + INVERSE, volatile=True),
    )
    draft_law = (
        tl.load(ids_of + DRAFT_OF, volatile=True),
        tl.load(values + REFERENCE, volatile=True),
        tl.load(values + FACTOR, volatile=True),
    )
    return target_law, draft_law, tl.load(values + KEPT, volatile=True)


@triton.jit
def _write_record(row_values_ptr, row_ids_ptr, rows, mass_of, reference, factor, draft_prob):
    values, ids_of = row_values_ptr + rows * VALUES, row_ids_ptr + rows * IDS
    live = rows >= 0
    tl.store(values + REFERENCE, reference, mask=live)
    tl.store(values + FACTOR, factor, mask=live)
    tl.store(values + DRAFT_PROB, draft_prob, mask=live)
    tl.store(values + KEPT, reference * 0.0 + 1.0, mask=live)
    tl.store(ids_of + DRAFT_OF, mass_of, mask=live)


@triton.jit
def _as_id(draft):
    """A draft as the id of a point mass."""
    return tl.where((draft >= 0) & (draft < 2147483647), draft, NOBODY).to(tl.int32)


@triton.jit
def target_probs(view, i, ids, law, scale):
    """Of ids [WIDTH] of row i."""
    _, _, vocab, _, _, _, _, _, _, _ = view
    mass_of, reference, inverse = law
    return soft_prob(read_row(view, i, ids, ids < vocab), ids, mass_of, reference, inverse, scale)


# --- stored and mapped: one logit per column --------------------------------------------------------------------------


@triton.jit
def column_is_id(law, ids, vocab):
    """(column of each id, whether it has one)"""
    _, _, _, _, _, width, _ = law
    return ids, (ids >= 0) & (ids < width)


@triton.jit
def column_of_id(law, ids, vocab):
    """The same through the inverted map: an entry counts where the map leads back, so what nobody wrote does not matter."""
    _, _, _, _, _, width, mapping = law
    map_ptr, inverse_ptr = mapping
    inside = (ids >= 0) & (ids < vocab)
    column = tl.load(inverse_ptr + ids, mask=inside, other=-1, volatile=True)
    found = inside & (column >= 0) & (column < width)
    return column, found & (tl.load(map_ptr + column, mask=found, other=-1) == ids)


@triton.jit
def id_of_column(law, columns, vocab):
    _, _, _, _, _, _, mapping = law
    ids = columns
    if mapping is not None:
        map_ptr, _inverse = mapping
        ids = tl.load(map_ptr + columns)
        ids = tl.where((ids >= 0) & (ids < vocab), ids, NOBODY)
    return ids.to(tl.int32)


@triton.jit
def invert_map(part, law, vocab, ready_ptr):
    """One part of a draft vocabulary's map into the inverse that everybody after it reads."""
    _, _, _, _, _, width, mapping = law
    map_ptr, inverse_ptr = mapping
    column = part * MAP_COLUMNS + tl.arange(0, MAP_COLUMNS)
    ids = tl.load(map_ptr + column, mask=column < width, other=-1)
    tl.store(inverse_ptr + ids, column, mask=(ids >= 0) & (ids < vocab))
    stores_done()
    tl.atomic_add(ready_ptr, 1, sem="release", scope="gpu")


@triton.jit
def await_map(ready_ptr, parts):
    """All parts have earlier tickets."""
    done = tl.atomic_add(ready_ptr, 0, sem="acquire", scope="gpu")
    while done < parts:
        done = tl.atomic_add(ready_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def map_used(mapping, num_requests, parts):
    """Called once per request: the last one puts the map's counter back."""
    ready_ptr, finished_ptr = mapping
    if arrive(finished_ptr, num_requests):
        await_map(ready_ptr, parts)
        tl.store(ready_ptr, 0)


@triton.jit
def sweep_draft(i, leaf, keep, row0, slot, law, draft_memory, draft_scale, num_leaves, PAIRS: tl.constexpr):
    """Wave 1 on leaves of a stored law whose log-sum-exp is not stored: maximum and mass over its columns."""
    logits_ptr, _, stride_s, stride_k, _, width, _ = law
    draft_top_ptr, draft_mass_ptr = draft_memory
    columns = leaf[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
    draft_rows = logits_ptr + slot * stride_s + i.to(tl.int64)[:, None] * stride_k
    top, mass = leaf_masses(load_leaf(draft_rows, columns, keep[:, None] & (columns < width)), draft_scale, PAIRS)
    where = (row0 + i).to(tl.int64) * num_leaves + leaf
    tl.store(draft_top_ptr + where, top, mask=keep)
    tl.store(draft_mass_ptr + where, mass, mask=keep)


@triton.jit
def record_dense(
    i, rows, draft, view, law, draft_memory, row_values_ptr, row_ids_ptr, draft_scale, draft_temperature, num_leaves,
    COLUMN: tl.constexpr, LEAVES: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """rows, draft: [GROUP], rows -1 where no draft is judged."""
    _, _, vocab, _, _, _, _, slot, _, _ = view
    logits_ptr, lse_ptr, stride_s, stride_k, _, width, _ = law
    draft_top_ptr, draft_mass_ptr = draft_memory
    row_ptrs = logits_ptr + slot * stride_s + tl.where(rows >= 0, i, 0).to(tl.int64) * stride_k
    column, inside = COLUMN(law, draft, vocab)
    x = load_leaf(row_ptrs, column, (rows >= 0) & inside)
    if lse_ptr is None:
        top, mass, words, tops = merge_leaves(draft_top_ptr, draft_mass_ptr, rows, num_leaves, draft_scale, LEAVES)
        mass_of = tl.full(rows.shape, SOFTMAX, tl.int32)
        if tl.max(tl.where((rows >= 0) & (top == POS_INF), 1, 0), axis=0) > 0:
            columns = first_leaf(tops, top, LEAVES)
            logits = load_leaf(row_ptrs[:, None], columns, columns < width)
            hot = id_of_column(law, first_of(logits, columns, top, width), vocab)
            mass_of = tl.where(top == POS_INF, hot, mass_of)
        mass_of = tl.where(top == NEG_INF, NOBODY, mass_of)
        factor = 1.0 / tl.maximum(mass, 1).to(tl.float32) * ONE
        _record(rows, draft, x, mass_of, finite_or_zero(top), factor, row_values_ptr, row_ids_ptr, draft_scale, draft_temperature)
    else:
        record_stored(i, rows, draft, x, view, law, row_values_ptr, row_ids_ptr, draft_scale, draft_temperature)


@triton.jit
def record_stored(i, rows, draft, x, view, law, row_values_ptr, row_ids_ptr, draft_scale, draft_temperature):
    """The record from a stored log-sum-exp and the logits x of the drafts."""
    _, _, _, _, _, _, _, slot, _, _ = view
    _, lse_ptr, _, _, stride_e, _, _ = law
    lse = tl.load(lse_ptr + slot * stride_e + i, mask=rows >= 0, other=0.0)
    # A +inf in the row: its first place is not stored, so the draft stands for it if it is +inf itself.
    infinite = tl.where(x == POS_INF, _as_id(draft), NOBODY)
    mass_of = tl.where(lse == POS_INF, infinite, tl.where(lse == NEG_INF, NOBODY, SOFTMAX))
    # exp(x / T - lse) = exp2((x - lse T) log2(e) / T)
    reference = finite_or_zero(lse) * (LOG2E / draft_scale)
    factor = tl.full(rows.shape, 1.0, tl.float32)
    _record(rows, draft, x, mass_of, reference, factor, row_values_ptr, row_ids_ptr, draft_scale, draft_temperature)


@triton.jit
def _record(rows, draft, x, mass_of, reference, factor, row_values_ptr, row_ids_ptr, draft_scale, draft_temperature):
    if (draft_temperature > 0.0) == 0:
        mass_of = _as_id(draft)
    mass_of = tl.where(draft == -1, NOBODY, mass_of)
    draft_prob = soft_prob(x, draft, mass_of, reference, factor, draft_scale)
    _write_record(row_values_ptr, row_ids_ptr, rows, mass_of, reference, factor, draft_prob)


@triton.jit
def _dense_residual(view, i, law, ids, record, scale, draft_scale, COLUMN: tl.constexpr):
    """Of ids [WIDTH] of row i."""
    _, _, vocab, _, _, _, _, slot, _, _ = view
    logits_ptr, _, stride_s, stride_k, _, _, _ = law
    target_law, draft_law, kept = record
    mass_of, reference, factor = draft_law
    column, inside = COLUMN(law, ids, vocab)
    draft_row = logits_ptr + slot * stride_s + i.to(tl.int64) * stride_k
    draft_prob = soft_prob(load_leaf(draft_row, column, inside), ids, mass_of, reference, factor, draft_scale)
    return tl.maximum(kept * target_probs(view, i, ids, target_law, scale) - draft_prob, 0.0)


@triton.jit
def residual_dense(
    item, i, row, view, law, removed_ptr, memory, residual_ptr, row_values_ptr, row_ids_ptr, scale, draft_scale, num_leaves,
    COLUMN: tl.constexpr, PAIRS: tl.constexpr, LEAVES: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Item: PAIRS leaves of a row."""
    leaf = item * PAIRS + tl.arange(0, PAIRS)
    record = read_record(row_values_ptr, row_ids_ptr, row)
    ids = item * PAIRS * LEAF + tl.arange(0, PAIRS * LEAF)
    residual = _dense_residual(view, i, law, ids, record, scale, draft_scale, COLUMN)
    tl.store(residual_ptr + row * num_leaves + leaf, masses(residual, PAIRS, LEAF, RESIDUAL_ONE), mask=leaf < num_leaves)


@triton.jit
def inner_dense(
    leaf, i, row, request, view, law, patch_ptr, row_values_ptr, row_ids_ptr, scale, draft_scale,
    COLUMN: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    record = read_record(row_values_ptr, row_ids_ptr, row)
    return _dense_residual(view, i, law, leaf * LEAF + tl.arange(0, LEAF), record, scale, draft_scale, COLUMN)


# --- listed: a few ids ------------------------------------------------------------------------------------------------


@triton.jit
def entries(law, slot, i, c, draft_law, draft_scale, vocab):
    """(ids, probabilities) of list entries c; id -1 for what lies outside the vocabulary."""
    mass_of, reference, factor = draft_law
    ids = tl.where(c == 0, mass_of, -1)
    prob = tl.where(c == 0, 1.0, 0.0)
    if law is not None:
        if mass_of == SOFTMAX:
            ids_ptr, logits_ptr, stride_is, stride_ik, stride_ls, stride_lk, count = law
            at = i.to(tl.int64)
            listed = tl.load(ids_ptr + slot * stride_is + at * stride_ik + c, mask=c < count, other=-1).to(tl.int64)
            ids = tl.where((listed >= 0) & (listed < vocab), listed, -1).to(tl.int32)
            x = load_leaf(logits_ptr + slot * stride_ls + at * stride_lk, c, c < count)
            prob = tl.exp2((x - reference) * draft_scale) * factor
    inside = (ids >= 0) & (ids < vocab)
    return tl.where(inside, ids, -1), tl.where(inside, prob, 0.0)


@triton.jit
def distinct(start, law, slot, i, draft_law, draft_scale, vocab, ENTRIES: tl.constexpr):
    """Entries start, start + 1, ... of a list, those of one id made one.

    Gives ids [ENTRIES], the probability of each id, whether the entry is the first of its id, the first of its octet, and which of
    the octet's eight ids are listed: counts of 16 bits, four in each of two words.
    """
    c = start + tl.arange(0, ENTRIES)
    ids, prob = entries(law, slot, i, c, draft_law, draft_scale, vocab)
    valid = ids >= 0
    first_id, first_octet = valid, valid
    one = tl.full([ENTRIES], 1, tl.int64)
    low = tl.where((ids & 7) < 4, one << ((ids & 3) * 16), 0)
    high = tl.where((ids & 7) < 4, 0, one << ((ids & 3) * 16))
    if law is not None:
        _, _, _, _, _, _, count = law
        mass_of, _, _ = draft_law
        if mass_of == SOFTMAX:
            BLOCK: tl.constexpr = 16 if ENTRIES > 16 else ENTRIES
            prob, low, high = prob * 0.0, low * 0, high * 0
            before_id, before_octet = low.to(tl.int32), low.to(tl.int32)
            for begin in range(0, count, BLOCK):
                other = begin + tl.arange(0, BLOCK)
                there, amount = entries(law, slot, i, other, draft_law, draft_scale, vocab)
                same_id = ids[:, None] == there[None, :]
                same_octet = (ids >> 3)[:, None] == (there >> 3)[None, :]
                earlier = other[None, :] < c[:, None]
                before_id += tl.sum(tl.where(same_id & earlier, 1, 0), axis=1)
                before_octet += tl.sum(tl.where(same_octet & earlier, 1, 0), axis=1)
                prob += tl.sum(tl.where(same_id, amount[None, :], 0.0), axis=1)
                bit = tl.full([BLOCK], 1, tl.int64) << ((there & 3) * 16)
                low += tl.sum(tl.where(same_octet & ((there & 7) < 4)[None, :], bit[None, :], 0), axis=1)
                high += tl.sum(tl.where(same_octet & ((there & 7) >= 4)[None, :], bit[None, :], 0), axis=1)
            first_id = valid & (before_id == 0)
            first_octet = valid & (before_octet == 0)
    return ids, prob, first_id, first_octet, low, high


@triton.jit
def list_laws(i, rows, draft, slot, law, draft_scale, draft_temperature, vocab, CANDIDATES: tl.constexpr):
    """(who has the mass, reference, factor, the draft's probability) of rows [GROUP], -1 where no draft is judged.

    The lists' own sums replace a stored lse, in integers: a row gets the same bits in any group, and on any shard.
    """
    own = _as_id(draft)
    reference = tl.zeros(rows.shape, tl.float32)
    factor = tl.full(rows.shape, 1.0, tl.float32)
    mass_of = own
    soft = tl.zeros(rows.shape, tl.float32)
    if law is not None:
        if draft_temperature > 0.0:
            ids_ptr, logits_ptr, stride_is, stride_ik, stride_ls, stride_lk, count = law
            c = tl.arange(0, CANDIDATES)[None, :]
            inside = (rows >= 0)[:, None] & (c < count)
            at = tl.where(rows >= 0, i, 0).to(tl.int64)[:, None]
            x = numbers(tl.load(logits_ptr + slot * stride_ls + at * stride_lk + c, mask=inside, other=NEG_INF).to(tl.float32))
            ids = tl.load(ids_ptr + slot * stride_is + at * stride_ik + c, mask=inside, other=-1).to(tl.int64)
            top = tl.max(x, axis=1)
            reference = finite_or_zero(top)
            mass = tl.sum((tl.exp2(below_max(x, top[:, None]) * draft_scale) * ONE).to(tl.int64), axis=1)
            factor = 1.0 / tl.maximum(mass, 1).to(tl.float32) * ONE
            # The draft's entries, relative to the best of them: an improbable draft keeps its bits.
            own_x = tl.where(ids == draft[:, None], x, NEG_INF)
            own_top = tl.max(own_x, axis=1)
            own_mass = tl.sum((tl.exp2(below_max(own_x, own_top[:, None]) * draft_scale) * ONE).to(tl.int64), axis=1)
            soft = own_mass.to(tl.float32) * (1.0 / ONE) * tl.exp2(below_max(own_top, top) * draft_scale) * factor
            place = tl.min(tl.where(x == POS_INF, c, CANDIDATES), axis=1)
            hot = tl.sum(tl.where(c == place[:, None], ids, 0), axis=1)
            hot = tl.where((hot >= 0) & (hot < vocab), hot, NOBODY).to(tl.int32)
            mass_of = tl.where(top == POS_INF, hot, tl.where(top == NEG_INF, NOBODY, SOFTMAX))
    mass_of = tl.where(draft == -1, NOBODY, mass_of)
    point = tl.where(draft == mass_of, 1.0, 0.0)
    return mass_of, reference, factor, tl.where(mass_of == SOFTMAX, soft, point)


@triton.jit
def record_listed(
    i, rows, draft, view, law, draft_memory, row_values_ptr, row_ids_ptr, draft_scale, draft_temperature, num_leaves,
    COLUMN: tl.constexpr, LEAVES: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """rows, draft: [GROUP], rows -1 where no draft is judged."""
    _, _, vocab, _, _, _, _, slot, _, _ = view
    mass_of, reference, factor, draft_prob = list_laws(i, rows, draft, slot, law, draft_scale, draft_temperature, vocab, CANDIDATES)
    _write_record(row_values_ptr, row_ids_ptr, rows, mass_of, reference, factor, draft_prob)


@triton.jit
def list_end(law, draft_law):
    """Entries that there are: all of the list, or one where the law is a point."""
    end = 1
    if law is not None:
        _, _, _, _, _, _, count = law
        mass_of, _, _ = draft_law
        end = tl.where(mass_of == SOFTMAX, count, 1)
    return end


@triton.jit
def _entry_masses(
    start, i, row, view, law, top_ptr, target_law, draft_law, kept, scale, draft_scale, num_leaves, ENTRIES: tl.constexpr
):  # fmt: skip
    """What entries of a list take from the masses of their leaves, and what they add as a residual of their own.

    Gives ids, leaves, int64 removed (of an octet, where its first entry is) and added (where the first entry of an id is), and
    which entries these are.
    """
    _, _, vocab, _, _, _, _, slot, _, _ = view
    target_of, reference, inverse = target_law
    ids, prob, first_id, first_octet, low, high = distinct(start, law, slot, i, draft_law, draft_scale, vocab, ENTRIES)
    own_leaf = ids // LEAF
    slots = tl.arange(0, 8)[None, :]
    octet = (ids >> 3)[:, None] * 8 + slots
    inside = (ids >= 0)[:, None] & (octet < vocab)
    own_top = tl.load(top_ptr + row * num_leaves + own_leaf, mask=ids >= 0, other=0.0, volatile=True)
    e = tl.exp2(below_max(read_tile(view, i, octet, inside), own_top[:, None]) * scale)
    counts = tl.where(slots < 4, low[:, None], high[:, None]) >> ((slots & 3) * 16)
    rest = octet_sums(tl.where((counts & 65535) > 0, 0.0, e), ENTRIES)
    removed = (octet_sums(e, ENTRIES) * ONE).to(tl.int64) - (rest * ONE).to(tl.int64)
    x = read_row(view, i, ids, ids >= 0)
    target_prob = soft_prob(x, ids, target_of, reference, inverse, scale)
    added = (tl.maximum(kept * target_prob - prob, 0.0) * RESIDUAL_ONE).to(tl.int64)
    return ids, own_leaf, removed, added, first_octet, first_id


@triton.jit
def residual_listed(
    item, i, row, view, law, removed_ptr, memory, residual_ptr, row_values_ptr, row_ids_ptr, scale, draft_scale, num_leaves,
    COLUMN: tl.constexpr, PAIRS: tl.constexpr, LEAVES: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Item: all leaves of a row."""
    ENTRIES: tl.constexpr = 64 if CANDIDATES > 64 else CANDIDATES
    top_ptr, mass_ptr, _ = memory
    leaf = tl.arange(0, LEAVES)
    there = leaf < num_leaves
    of_leaf = row * num_leaves + leaf
    target_law, draft_law, kept = read_record(row_values_ptr, row_ids_ptr, row)
    target_of, reference, inverse = target_law
    if CANDIDATES == 1:
        # A list of one needs no memory to find its leaf.
        ids, own_leaf, removed, added, first_octet, first_id = _entry_masses(
            0, i, row, view, law, top_ptr, target_law, draft_law, kept, scale, draft_scale, num_leaves, ENTRIES
        )
        mine = (leaf == tl.max(own_leaf, axis=0)) & (leaf < tl.where(tl.max(ids, axis=0) >= 0, LEAVES, 0))
        taken = tl.where(mine, tl.sum(removed, axis=0), 0)
        extra = tl.where(mine, tl.sum(added, axis=0), 0)
        listed = tl.max(tl.where(ids == target_of, 1, 0), axis=0)
    else:
        tl.store(removed_ptr + of_leaf, tl.zeros([LEAVES], tl.int64), mask=there)
        tl.store(residual_ptr + of_leaf, tl.zeros([LEAVES], tl.int64), mask=there)
        stores_done()
        listed = tl.zeros((), tl.int32)
        for start in range(0, list_end(law, draft_law), ENTRIES):
            ids, own_leaf, removed, added, first_octet, first_id = _entry_masses(
                start, i, row, view, law, top_ptr, target_law, draft_law, kept, scale, draft_scale, num_leaves, ENTRIES
            )
            tl.atomic_add(removed_ptr + row * num_leaves + own_leaf, removed, mask=first_octet, sem="relaxed")
            tl.atomic_add(residual_ptr + row * num_leaves + own_leaf, added, mask=first_id, sem="relaxed")
            listed = tl.maximum(listed, tl.max(tl.where(ids == target_of, 1, 0), axis=0))
        stores_done()
        taken = tl.load(removed_ptr + of_leaf, mask=there, other=0, volatile=True)
        extra = tl.load(residual_ptr + of_leaf, mask=there, other=0, volatile=True)
        tl.debug_barrier()
    tops = tl.load(top_ptr + of_leaf, mask=there, other=NEG_INF, volatile=True)
    mass = (tl.load(mass_ptr + of_leaf, mask=there, other=0, volatile=True) & MASS_BITS) - taken
    unlisted = mass.to(tl.float32) * tl.exp2(below_max(tops, reference) * scale) * (inverse * (1.0 / ONE))
    if target_of != SOFTMAX:
        unlisted = tl.where(leaf == tl.where(listed == 0, target_of // LEAF, -1), 1.0, 0.0)
    residual = (kept * unlisted * RESIDUAL_ONE).to(tl.int64) + extra
    tl.store(residual_ptr + of_leaf, residual, mask=there)
    stores_done()


@triton.jit
def inner_listed(
    leaf, i, row, request, view, law, patch_ptr, row_values_ptr, row_ids_ptr, scale, draft_scale,
    COLUMN: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    ENTRIES: tl.constexpr = 64 if CANDIDATES > 64 else CANDIDATES
    _, _, vocab, _, _, _, _, slot, _, _ = view
    target_law, draft_law, kept = read_record(row_values_ptr, row_ids_ptr, row)
    at = tl.arange(0, LEAF)
    if CANDIDATES == 1:
        ids, _ = entries(law, slot, i, tl.arange(0, 1), draft_law, draft_scale, vocab)
        unlisted = kept * target_probs(view, i, leaf * LEAF + at, target_law, scale)
        # kept * target <= 1 = the draft's: nothing of it is left.
        residual = tl.where(leaf * LEAF + at == tl.max(ids, axis=0), 0.0, unlisted)
    else:
        # Listed ids find their places in the leaf through memory; -1 = not listed.
        patch = patch_ptr + request.to(tl.int64) * LEAF
        tl.store(patch + at, at * 0.0 - 1.0)
        stores_done()
        for start in range(0, list_end(law, draft_law), ENTRIES):
            ids, prob, first_id, _o, _l, _h = distinct(start, law, slot, i, draft_law, draft_scale, vocab, ENTRIES)
            listed = target_probs(view, i, tl.maximum(ids, 0), target_law, scale)
            tl.store(patch + ids % LEAF, tl.maximum(kept * listed - prob, 0.0), mask=first_id & (ids // LEAF == leaf))
        stores_done()
        changed = tl.load(patch + at, volatile=True)
        unlisted = kept * target_probs(view, i, leaf * LEAF + at, target_law, scale)
        residual = tl.where(changed >= 0.0, changed, unlisted)
    return residual
