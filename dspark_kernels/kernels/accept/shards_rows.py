"""What a rank makes of its columns in acceptance on vocabulary shards: one pass over the logits, parts of every row.

Of each leaf that the rank has ids of, maximum and integer mass; of each row the best word and the logits of its draft; of a row
with listed candidates their logits, and the masses of its leaves without them. What an id contributes depends on the id, never on
the rank that has it. Symbols: R requests, K drafts, C candidates, L logit rows, W ids of a shard, NL leaves of 1024 ids that a
shard can touch. Oracle: kernels/accept/rows.py on whole rows.
"""

import triton
import triton.language as tl

from ..primitives.leaves import leaf_masses
from ..primitives.mass import LEAF, NEG_INF, ONE, POS_INF, below_max, log2_scale, numbers, octet_sums
from ..primitives.race import pack
from ..primitives.slots import state_slots
from ..primitives.ticket import arrive
from .proposals import distinct, list_end, list_laws
from .rows import NAN, coupled_keys
from .target import read_each, read_raw, read_row, read_rows, read_tile

FINITE = tl.constexpr(256)  # a row showed a finite logit; beside the bits of `flags`


@triton.jit
def request_of(request, slots_ptr, cu_logits_ptr, num_requests, num_slots, num_rows, num_drafts):
    """State slot, first logit row, number of drafts (-1: no logit rows, or a padding row) of a request."""
    slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
    row0 = tl.load(cu_logits_ptr + request)
    length = tl.minimum(tl.minimum(tl.load(cu_logits_ptr + request + 1), num_rows) - row0 - 1, num_drafts)
    length = tl.where(slot < 0, -1, length)
    return slot, row0, length


@triton.jit
def temperatures_of(temperature_ptr, draft_temperature_ptr, slot, length):
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
def is_here(ids, start, held):
    """Whether ids are this rank's."""
    return (ids >= start) & (ids - start < held)


@triton.jit
def _best_words(key, ids, inside, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Best word per row of pairs [GROUP * CHUNK, LEAF]: int64 [GROUP]."""
    return tl.max(tl.reshape(tl.max(tl.where(inside, pack(key, ids), 0), axis=1), [GROUP, CHUNK]), axis=1)


@triton.jit
def _write_lists(
    i, rows, draft, view, law, part, top_ptr, scale, draft_scale, draft_temperature, length, start, held, first_leaf, num_leaves,
    GROUP: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Of rows [GROUP] with a draft: the laws of their lists, and what this rank has of the listed ids.

    Their logits, -inf for those of other ranks, and their octets' masses with and without them: the same tree, hence the same bits.
    """
    ENTRIES: tl.constexpr = 64 if CANDIDATES > 64 else CANDIDATES
    rest_ptr, listed_ptr, laws_ptr, owners_ptr = part
    _, _, _, _, _, _, count = law
    _, _, vocab, _, _, _, row0, slot, _, _ = view
    mass_of, reference, factor, draft_prob = list_laws(
        i, tl.where(i < length, rows, -1), draft, slot, law, draft_scale, draft_temperature, vocab, CANDIDATES
    )
    tl.store(laws_ptr + rows * 3, reference, mask=i < length)
    tl.store(laws_ptr + rows * 3 + 1, factor, mask=i < length)
    tl.store(laws_ptr + rows * 3 + 2, draft_prob, mask=i < length)
    tl.store(owners_ptr + rows, mass_of, mask=i < length)
    slots = tl.arange(0, 8)[None, :]
    first = tl.min(i, axis=0)
    for member in range(first, tl.minimum(first + GROUP, length)):
        row = (row0 + member).to(tl.int64)
        own_law = (
            tl.max(tl.where(i == member, mass_of, -2147483648), axis=0),
            tl.sum(tl.where(i == member, reference, 0.0), axis=0),
            tl.sum(tl.where(i == member, factor, 0.0), axis=0),
        )
        for begin in range(0, list_end(law, own_law), ENTRIES):
            ids, prob, first_id, first_octet, low, high = distinct(begin, law, slot, member, own_law, draft_scale, vocab, ENTRIES)
            c = begin + tl.arange(0, ENTRIES)
            tl.store(listed_ptr + row * count + c, read_row(view, member, ids, is_here(ids, start, held)), mask=c < count)
            # An octet that is cut belongs to both ranks, whoever has the listed id.
            octet = (ids >> 3)[:, None] * 8 + slots
            inside = (ids >= 0)[:, None] & is_here(octet, start, held)
            touched = tl.max(inside.to(tl.int32), axis=1) > 0
            of_leaf = row * num_leaves + (ids // LEAF - first_leaf)
            top = tl.load(top_ptr + of_leaf, mask=touched, other=0.0, volatile=True)
            e = tl.exp2(below_max(read_tile(view, member, octet, inside), top[:, None]) * scale)
            counts = tl.where(slots < 4, low[:, None], high[:, None]) >> ((slots & 3) * 16)
            rest = octet_sums(tl.where((counts & 65535) > 0, 0.0, e), ENTRIES)
            removed = (octet_sums(e, ENTRIES) * ONE).to(tl.int64) - (rest * ONE).to(tl.int64)
            tl.atomic_add(rest_ptr + of_leaf, -removed, mask=first_octet & touched, sem="relaxed")


@triton.jit
def _write_rows(
    slot, i, rows, own, length, view, law, layout, words_ptr, logits_ptr, top_ptr, lists, best_ptr, draft_best_ptr, seen_ptr,
    scale, draft_scale, draft_temperature, start, held, first_leaf, num_leaves, GROUP: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """All items of a row group are there: words, logits of the drafts this rank has, counters back to zero."""
    dense, listed = law
    _, _, logits_indices_ptr, token_ids_ptr, _ = layout
    words = words_ptr + rows * 4
    tl.store(words, tl.load(best_ptr + rows, mask=own, other=0, volatile=True), mask=own)
    tl.store(words + 1, tl.load(draft_best_ptr + rows, mask=own, other=0, volatile=True), mask=own)
    tl.store(words + 3, tl.load(seen_ptr + rows, mask=own, other=0, volatile=True).to(tl.int64), mask=own)
    tl.debug_barrier()  # every warp has read what is put back to zero
    tl.store(best_ptr + rows, tl.zeros([GROUP], tl.int64), mask=own)
    tl.store(draft_best_ptr + rows, tl.zeros([GROUP], tl.int64), mask=own)
    tl.store(seen_ptr + rows, tl.zeros([GROUP], tl.int32), mask=own)
    forward = tl.load(logits_indices_ptr + rows + 1, mask=i < length, other=0)
    id = tl.load(token_ids_ptr + forward, mask=i < length, other=-1)
    here = (i < length) & is_here(id, start, held)
    there = tl.where(i <= length, i, 0)
    tl.store(logits_ptr + rows * 2, read_each(view, there, tl.where(here, id, start).to(tl.int32), here), mask=own)
    drafted = tl.full([GROUP], float("-inf"), tl.float32)
    removed = tl.zeros([GROUP], tl.int64)
    if dense is not None:
        draft_ptr, _, stride_ds, stride_dk, _ = dense
        where = draft_ptr + slot * stride_ds + i.to(tl.int64) * stride_dk + id - start
        drafted = numbers(tl.load(where, mask=here, other=NEG_INF).to(tl.float32))
    elif listed is not None:
        _write_lists(i, rows, id, view, listed, lists, top_ptr, scale, draft_scale, draft_temperature, length, start, held,
                     first_leaf, num_leaves, GROUP, CANDIDATES)  # fmt: skip
    elif top_ptr is not None:
        # What the draft's octet loses without it: the same tree with and without, hence the same bits.
        octet = (id // 8 * 8)[:, None] + tl.arange(0, 8)[None, :]
        x = read_rows(view, there, octet, here[:, None] & is_here(octet, start, held))
        top = tl.load(top_ptr + rows * num_leaves + id // LEAF - first_leaf, mask=here, other=0.0, volatile=True)
        e = tl.exp2(below_max(x, top[:, None]) * scale)
        whole = (octet_sums(e, GROUP) * ONE).to(tl.int64)
        rest = (octet_sums(tl.where(octet == id[:, None], 0.0, e), GROUP) * ONE).to(tl.int64)
        removed = tl.where(here, whole - rest, 0)
    tl.store(logits_ptr + rows * 2 + 1, drafted, mask=own)
    tl.store(words + 2, removed, mask=own)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "start", "held", "first_leaf"])
def accept_normalise_kernel(
    target,  # ([L, W], its row stride, settings of primitives/adjust.py or None)
    layout,  # None, cu_logits [R+1], logits_indices [L], token_ids, positions [N_max]
    law,  # (logits [S, K, W], lse [S, K] or None, strides) or None, and (ids, logits [S, K, C], strides, C) or None
    draft_temperature_ptr, temperature_ptr, seed_ptr,  # [S]; draft None = the target's, temperature None = every row greedy
    slots_ptr,  # [R] or None
    # The part. row_words: int64 [L, 4]: best word, the draft row's best word, mass of the draft, what the row showed;
    # row_logits: fp32 [L, 2]: logit of the draft in the target's and in the draft's row, -inf on other ranks.
    row_words_ptr, row_logits_ptr,
    memory,  # maxima, masses [L, NL], (None, None) where words decide
    draft_memory,  # the same of the draft's rows where the proposal's lse is not stored
    lists,  # masses without the listed ids [L, NL], logits of these [L, C], reference, factor and draft's probability [L, 3],
    #         who has the draft's mass int32 [L]; or None each
    best_ptr, draft_best_ptr,  # int64 [L], zero before and after
    seen_ptr, arrivals_ptr,  # int32 [L], [R, groups], zero before and after
    num_requests, num_slots, num_rows, num_drafts, start, held, first_leaf, num_leaves, vocab,
    NOISY: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Item = rows x leaves of a request; the last item of a group of rows writes what is known of each row."""
    PAIRS: tl.constexpr = GROUP * CHUNK
    chunks = tl.cdiv(num_leaves, CHUNK)
    groups = tl.cdiv(num_drafts + 1, GROUP)
    request = tl.program_id(0) // (groups * chunks)
    item = tl.program_id(0) % (groups * chunks)
    group = item // chunks
    _, cu_logits_ptr, logits_indices_ptr, _, positions_ptr = layout
    top_ptr, mass_ptr = memory
    draft_top_ptr, draft_mass_ptr = draft_memory
    slot, row0, length = request_of(request, slots_ptr, cu_logits_ptr, num_requests, num_slots, num_rows, num_drafts)
    if group * GROUP <= length:
        temperature, draft_temperature = temperatures_of(temperature_ptr, draft_temperature_ptr, slot, length)
        scale, draft_scale = log2_scale(temperature), log2_scale(draft_temperature)
        # The view of target.py on this rank's columns: ids are global, and the rank's alone may be read.
        view = (target[0] - start, target[1], vocab, target[2], (layout[3], None), layout[2], row0, slot, length, None)
        pair = tl.arange(0, PAIRS)
        i = group * GROUP + pair // CHUNK
        leaf = (item % chunks) * CHUNK + pair % CHUNK
        keep = (i <= length) & (leaf < num_leaves)
        row = (row0 + i).to(tl.int64)
        ids = (first_leaf + leaf)[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
        inside = keep[:, None] & is_here(ids, start, held)
        raw = read_raw(view, i, ids, inside)
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
                position = tl.load(positions_ptr + tl.load(logits_indices_ptr + row0)) + 1 + i
                key = coupled_keys(x, first_leaf + leaf, position, temperature, tl.load(seed_ptr + slot), scale, PAIRS)
            tl.atomic_max(best_ptr + own_rows, _best_words(key, ids, inside, GROUP, CHUNK), mask=own, sem="relaxed")
        else:
            top, mass = leaf_masses(x, scale, PAIRS)
            tl.store(top_ptr + row * num_leaves + leaf, top, mask=keep)
            tl.store(mass_ptr + row * num_leaves + leaf, mass, mask=keep)
            if lists[0] is not None:
                tl.store(lists[0] + row * num_leaves + leaf, mass, mask=keep)
            # The arg-max is needed for greedy rows and for rows without a proper law.
            first_id = (first_leaf + leaf) * LEAF
            some = keep & (first_id < start + held) & (first_id + LEAF > start)
            need = tl.max(tl.where(some & (tl.abs(top) == POS_INF), 1, 0), axis=0)
            need |= tl.where((temperature > 0.0) == 0, 1, 0)
            if need > 0:
                tl.atomic_max(best_ptr + own_rows, _best_words(x, ids, inside, GROUP, CHUNK), mask=own, sem="relaxed")
        if draft_top_ptr is not None:
            draft_ptr, _lse, stride_ds, stride_dk, _columns = law[0]
            keep = keep & (i < length)
            inside = inside & keep[:, None]
            draft_rows = draft_ptr + slot * stride_ds + i.to(tl.int64)[:, None] * stride_dk
            x = numbers(tl.load(draft_rows + ids - start, mask=inside, other=NEG_INF).to(tl.float32))
            top, mass = leaf_masses(x, draft_scale, PAIRS)
            tl.store(draft_top_ptr + row * num_leaves + leaf, top, mask=keep)
            tl.store(draft_mass_ptr + row * num_leaves + leaf, mass, mask=keep)
            if tl.max(tl.where(keep & (top == POS_INF), 1, 0), axis=0) > 0:
                tl.atomic_max(draft_best_ptr + own_rows, _best_words(x, ids, inside, GROUP, CHUNK), mask=own, sem="relaxed")

        if arrive(arrivals_ptr + request * groups + group, chunks):
            _write_rows(
                slot, own_i, own_rows, own, length, view, law, layout, row_words_ptr, row_logits_ptr, top_ptr, lists,
                best_ptr, draft_best_ptr, seen_ptr, scale, draft_scale, draft_temperature, start, held, first_leaf, num_leaves,
                GROUP, CANDIDATES,
            )  # fmt: skip
