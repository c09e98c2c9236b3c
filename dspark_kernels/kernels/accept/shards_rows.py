"""What a rank makes of its columns in acceptance on vocabulary shards: one pass over the logits, parts of every row.

Of each block that the rank has ids of, maximum and integer sum of exponentials; of each row the best word and the logits of its
draft; of a row with candidates their logits, and the sums of its blocks without them. What an id contributes depends on the id,
never on the rank that has it. Symbols: R requests, K drafts, C candidates, L logit rows, W ids of a shard, NB blocks of 1024 ids
that a shard can touch. Reference: kernels/accept/rows.py on whole rows.
"""

import triton
import triton.language as tl

from ..primitives.constants import NAN, NEG_INF, POS_INF, SUMEXP_ONE, VOCAB_BLOCK
from ..primitives.race import pack
from ..primitives.sumexp import below_max, log2_scale, numbers, octet_sums
from ..primitives.sync import arrive
from ..primitives.vocab_blocks import block_sums
from .requests import rows_of
from .rows import coupled_keys
from .sparse import distinct, distributions, list_end
from .target import read_each, read_raw, read_row, read_rows, read_tile
from .values import Columns, Distribution, Scales, View

FINITE = tl.constexpr(256)  # a row showed a finite logit; beside the bits of `flags`


@triton.jit
def request_of(request, sampling, layout, num_requests, num_slots, num_rows, num_drafts):
    """Request slot, first logit row, number of drafts (-1: no logit rows, or a padding row) of a request."""
    rows = rows_of(request, sampling, layout, num_requests, num_slots, num_rows)
    length = tl.minimum(rows.count - 1, num_drafts)
    return rows.slot, rows.row0, tl.where(rows.slot < 0, -1, length)


@triton.jit
def temperatures_of(sampling, slot, length):
    """Of the target and of the draft; 0 where every row is greedy."""
    temperature = tl.zeros((), tl.float32)
    draft_temperature = temperature
    if sampling.temperature_ptr is not None:
        if length >= 0:
            temperature = tl.load(sampling.temperature_ptr + slot)
            draft_temperature = temperature
            if sampling.draft_temperature_ptr is not None:
                draft_temperature = tl.load(sampling.draft_temperature_ptr + slot)
    return temperature, draft_temperature


@triton.jit
def is_here(ids, columns):
    """Whether ids are this rank's."""
    return (ids >= columns.start) & (ids - columns.start < columns.held)


@triton.jit
def _best_words(key, ids, inside, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Best word per row of pairs [GROUP * CHUNK, VOCAB_BLOCK]: int64 [GROUP]."""
    return tl.max(tl.reshape(tl.max(tl.where(inside, pack(key, ids), 0), axis=1), [GROUP, CHUNK]), axis=1)


@triton.jit
def _write_lists(
    i, rows, token, view, draft, part, scales, draft_temperature, columns, GROUP: tl.constexpr, CANDIDATES: tl.constexpr
):  # fmt: skip
    """Of rows [GROUP] with a draft: the distributions of their candidates, and what this rank has of these.

    Their logits, -inf for those of other ranks, and their octets' sums with and without them: the same tree, hence the same bits.
    """
    ENTRIES: tl.constexpr = 64 if CANDIDATES > 64 else CANDIDATES
    length, lists = view.length, part.lists
    drawn_from, draft_prob = distributions(
        i, tl.where(i < length, rows, -1), token, view.slot, draft, scales.draft, draft_temperature, view.vocab, CANDIDATES
    )
    tl.store(lists.distributions_ptr + rows * 3, drawn_from.reference, mask=i < length)
    tl.store(lists.distributions_ptr + rows * 3 + 1, drawn_from.factor, mask=i < length)
    tl.store(lists.distributions_ptr + rows * 3 + 2, draft_prob, mask=i < length)
    tl.store(lists.points_ptr + rows, drawn_from.point, mask=i < length)
    slots = tl.arange(0, 8)[None, :]
    first = tl.min(i, axis=0)
    for member in range(first, tl.minimum(first + GROUP, length)):
        row = (view.row0 + member).to(tl.int64)
        own = Distribution(
            tl.max(tl.where(i == member, drawn_from.point, -2147483648), axis=0),
            tl.sum(tl.where(i == member, drawn_from.reference, 0.0), axis=0),
            tl.sum(tl.where(i == member, drawn_from.factor, 0.0), axis=0),
        )
        for begin in range(0, list_end(draft, own), ENTRIES):
            found = distinct(begin, draft, view.slot, member, own, scales.draft, view.vocab, ENTRIES)
            ids = found.ids
            c = begin + tl.arange(0, ENTRIES)
            tl.store(
                lists.logits_ptr + row * draft.count + c, read_row(view, member, ids, is_here(ids, columns)), mask=c < draft.count
            )
            # An octet that is cut belongs to both ranks, whoever has the entry's id.
            octet = (ids >> 3)[:, None] * 8 + slots
            inside = (ids >= 0)[:, None] & is_here(octet, columns)
            touched = tl.max(inside.to(tl.int32), axis=1) > 0
            of_block = row * columns.blocks + (ids // VOCAB_BLOCK - columns.first_block)
            top = tl.load(part.target.max_ptr + of_block, mask=touched, other=0.0, volatile=True)
            e = tl.exp2(below_max(read_tile(view, member, octet, inside), top[:, None]) * scales.target)
            counts = tl.where(slots < 4, found.low[:, None], found.high[:, None]) >> ((slots & 3) * 16)
            rest = octet_sums(tl.where((counts & 65535) > 0, 0.0, e), ENTRIES)
            removed = (octet_sums(e, ENTRIES) * SUMEXP_ONE).to(tl.int64) - (rest * SUMEXP_ONE).to(tl.int64)
            tl.atomic_add(lists.rest_ptr + of_block, -removed, mask=found.first_octet & touched, sem="relaxed")


@triton.jit
def _write_rows(
    i, rows, own, view, draft, layout, part, arriving, scales, draft_temperature, columns,
    GROUP: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """All items of a row group are there: words, logits of the drafts this rank has, counters back to zero."""
    length = view.length
    words = part.words_ptr + rows * 4
    tl.store(words, tl.load(arriving.best_ptr + rows, mask=own, other=0, volatile=True), mask=own)
    tl.store(words + 1, tl.load(arriving.draft_best_ptr + rows, mask=own, other=0, volatile=True), mask=own)
    tl.store(words + 3, tl.load(arriving.seen_ptr + rows, mask=own, other=0, volatile=True).to(tl.int64), mask=own)
    tl.debug_barrier()  # every warp has read what is put back to zero
    tl.store(arriving.best_ptr + rows, tl.zeros([GROUP], tl.int64), mask=own)
    tl.store(arriving.draft_best_ptr + rows, tl.zeros([GROUP], tl.int64), mask=own)
    tl.store(arriving.seen_ptr + rows, tl.zeros([GROUP], tl.int32), mask=own)
    forward = tl.load(layout.logits_indices_ptr + rows + 1, mask=i < length, other=0)
    id = tl.load(layout.token_ids_ptr + forward, mask=i < length, other=-1)
    here = (i < length) & is_here(id, columns)
    there = tl.where(i <= length, i, 0)
    tl.store(part.logits_ptr + rows * 2, read_each(view, there, tl.where(here, id, columns.start).to(tl.int32), here), mask=own)
    drafted = tl.full([GROUP], float("-inf"), tl.float32)
    removed = tl.zeros([GROUP], tl.int64)
    if draft.dense is not None:
        row_ptrs = draft.dense.logits_ptr + view.slot * draft.dense.stride_slot + i.to(tl.int64) * draft.dense.stride_row
        where = row_ptrs + id - columns.start
        drafted = numbers(tl.load(where, mask=here, other=NEG_INF).to(tl.float32))
    elif draft.sparse is not None:
        _write_lists(i, rows, id, view, draft.sparse, part, scales, draft_temperature, columns, GROUP, CANDIDATES)
    elif part.target.max_ptr is not None:
        # What the draft's octet loses without it: the same tree with and without, hence the same bits.
        octet = (id // 8 * 8)[:, None] + tl.arange(0, 8)[None, :]
        x = read_rows(view, there, octet, here[:, None] & is_here(octet, columns))
        top = tl.load(
            part.target.max_ptr + rows * columns.blocks + id // VOCAB_BLOCK - columns.first_block,
            mask=here,
            other=0.0,
            volatile=True,
        )
        e = tl.exp2(below_max(x, top[:, None]) * scales.target)
        whole = (octet_sums(e, GROUP) * SUMEXP_ONE).to(tl.int64)
        rest = (octet_sums(tl.where(octet == id[:, None], 0.0, e), GROUP) * SUMEXP_ONE).to(tl.int64)
        removed = tl.where(here, whole - rest, 0)
    tl.store(part.logits_ptr + rows * 2 + 1, drafted, mask=own)
    tl.store(words + 2, removed, mask=own)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "start", "held", "first_block"])
def accept_normalise_kernel(
    target,  # Target [L, W]
    layout,  # Layout
    draft,  # ShardedDraft
    sampling,  # Sampling
    part,  # Part
    arriving,  # ArrivingRows
    num_requests, num_slots, num_rows, num_drafts, start, held, first_block, num_blocks, vocab,
    NOISY: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Item = rows x blocks of a request; the last item of a group of rows writes what is known of each row."""
    PAIRS: tl.constexpr = GROUP * CHUNK
    chunks = tl.cdiv(num_blocks, CHUNK)
    groups = tl.cdiv(num_drafts + 1, GROUP)
    request = tl.program_id(0) // (groups * chunks)
    item = tl.program_id(0) % (groups * chunks)
    group = item // chunks
    columns = Columns(start, held, first_block, num_blocks)
    slot, row0, length = request_of(request, sampling, layout, num_requests, num_slots, num_rows, num_drafts)
    if group * GROUP <= length:
        temperature, draft_temperature = temperatures_of(sampling, slot, length)
        scales = Scales(log2_scale(temperature), log2_scale(draft_temperature))
        # On this rank's columns: ids are global, and the rank's alone may be read.
        view = View(target.logits_ptr - start, target.stride, vocab, target.adjustments, layout.token_ids_ptr, None,
                    layout.logits_indices_ptr, row0, slot, length, None)  # fmt: skip
        pair = tl.arange(0, PAIRS)
        i = group * GROUP + pair // CHUNK
        block = (item % chunks) * CHUNK + pair % CHUNK
        keep = (i <= length) & (block < num_blocks)
        row = (row0 + i).to(tl.int64)
        ids = (first_block + block)[:, None] * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)[None, :]
        inside = keep[:, None] & is_here(ids, columns)
        raw = read_raw(view, i, ids, inside)
        x = numbers(raw)
        own_i = group * GROUP + tl.arange(0, GROUP)
        own_rows = (row0 + own_i).to(tl.int64)
        own = own_i <= length
        seen = tl.where(tl.max(tl.where(raw != raw, 1, 0), axis=1) > 0, NAN, 0)
        seen |= tl.where(tl.max(tl.where(tl.abs(x) < POS_INF, 1, 0), axis=1) > 0, FINITE, 0)
        seen = tl.reshape(seen, [GROUP, CHUNK])
        tl.atomic_or(
            arriving.seen_ptr + own_rows, tl.max(seen & NAN, axis=1) | tl.max(seen & FINITE, axis=1), mask=own, sem="relaxed"
        )
        if part.target.max_ptr is None:
            key = x
            if NOISY:
                position = tl.load(layout.positions_ptr + tl.load(layout.logits_indices_ptr + row0)) + 1 + i
                seed = tl.load(sampling.seed_ptr + slot)
                key = coupled_keys(x, first_block + block, position, temperature, seed, scales.target, PAIRS)
            tl.atomic_max(arriving.best_ptr + own_rows, _best_words(key, ids, inside, GROUP, CHUNK), mask=own, sem="relaxed")
        else:
            top, sumexp = block_sums(x, scales.target, PAIRS)
            tl.store(part.target.max_ptr + row * num_blocks + block, top, mask=keep)
            tl.store(part.target.sumexp_ptr + row * num_blocks + block, sumexp, mask=keep)
            if part.lists.rest_ptr is not None:
                tl.store(part.lists.rest_ptr + row * num_blocks + block, sumexp, mask=keep)
            # The arg-max is needed for greedy rows and for rows without a proper distribution.
            first_id = (first_block + block) * VOCAB_BLOCK
            some = keep & (first_id < start + held) & (first_id + VOCAB_BLOCK > start)
            need = tl.max(tl.where(some & (tl.abs(top) == POS_INF), 1, 0), axis=0)
            need |= tl.where((temperature > 0.0) == 0, 1, 0)
            if need > 0:
                tl.atomic_max(arriving.best_ptr + own_rows, _best_words(x, ids, inside, GROUP, CHUNK), mask=own, sem="relaxed")
        if part.draft.max_ptr is not None:
            keep = keep & (i < length)
            inside = inside & keep[:, None]
            dense = draft.dense
            draft_rows = dense.logits_ptr + slot * dense.stride_slot + i.to(tl.int64)[:, None] * dense.stride_row
            x = numbers(tl.load(draft_rows + ids - start, mask=inside, other=NEG_INF).to(tl.float32))
            top, sumexp = block_sums(x, scales.draft, PAIRS)
            tl.store(part.draft.max_ptr + row * num_blocks + block, top, mask=keep)
            tl.store(part.draft.sumexp_ptr + row * num_blocks + block, sumexp, mask=keep)
            if tl.max(tl.where(keep & (top == POS_INF), 1, 0), axis=0) > 0:
                tl.atomic_max(
                    arriving.draft_best_ptr + own_rows, _best_words(x, ids, inside, GROUP, CHUNK), mask=own, sem="relaxed"
                )

        if arrive(arriving.counts_ptr + request * groups + group, chunks):
            _write_rows(own_i, own_rows, own, view, draft, layout, part, arriving, scales, draft_temperature, columns,
                        GROUP, CANDIDATES)  # fmt: skip
