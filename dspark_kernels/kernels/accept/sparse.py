"""Drafts of a sparse proposal (C candidates with logits) or a one-hot one (the draft alone).

The target's sums per vocabulary block stay, less the octets of the candidates, computed again with and without them: the same tree,
hence the same bits. Symbols: S request slots, K drafts, C candidates. Hooks: proposals.py. Reference: reference/accept.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..primitives.constants import NEG_INF, POS_INF, RESIDUAL_ONE, SUMEXP_ONE, VOCAB_BLOCK
from ..primitives.sumexp import below_max, numbers, octet_sums
from ..primitives.sync import stores_done
from ..primitives.vocab_blocks import SUMEXP_BITS
from .args import ChainProposal
from .proposals import as_point, store_draft_stats, target_probs
from .rows import NOBODY, SOFTMAX, finite_or_zero, load_block, load_row_blocks, soft_prob
from .target import read_row, read_rows, read_tile
from .values import Distribution


class Distinct(NamedTuple):
    """Candidates [ENTRIES]: each id's probability, which entries are the first of their id and of their octet of ids, and which
    ids of the octet are candidates: counts of 16 bits, four in each of two words."""

    ids: Any  # -1: none
    prob: Any
    first_id: Any
    first_octet: Any
    low: Any
    high: Any


class EntrySums(NamedTuple):
    """Of candidates [ENTRIES]: int64 sums removed from their blocks (of an octet, where its first entry is) and added (where the
    first entry of an id is)."""

    ids: Any
    block: Any
    removed: Any
    added: Any
    first_octet: Any
    first_id: Any


@triton.jit
def entries(draft, slot, i, c, drawn_from, draft_scale, vocab):
    """Ids and probabilities of candidates c of draft i; id -1 for what lies outside the vocabulary."""
    ids = tl.where(c == 0, drawn_from.point, -1)
    prob = tl.where(c == 0, 1.0, 0.0)
    if draft is not None:
        if drawn_from.point == SOFTMAX:
            at = i.to(tl.int64)
            there = c < draft.count
            candidate = tl.load(draft.ids_ptr + slot * draft.stride_ids_slot + at * draft.stride_ids_row + c, mask=there, other=-1)
            candidate = candidate.to(tl.int64)
            ids = tl.where((candidate >= 0) & (candidate < vocab), candidate, -1).to(tl.int32)
            x = load_block(draft.logits_ptr + slot * draft.stride_slot + at * draft.stride_row, c, there)
            prob = tl.exp2((x - drawn_from.reference) * draft_scale) * drawn_from.factor
    inside = (ids >= 0) & (ids < vocab)
    return tl.where(inside, ids, -1), tl.where(inside, prob, 0.0)


@triton.jit
def distinct(start, draft, slot, i, drawn_from, draft_scale, vocab, ENTRIES: tl.constexpr):
    """Candidates start, start + 1, ... of draft i, those of one id made one."""
    c = start + tl.arange(0, ENTRIES)
    ids, prob = entries(draft, slot, i, c, drawn_from, draft_scale, vocab)
    valid = ids >= 0
    first_id, first_octet = valid, valid
    one = tl.full([ENTRIES], 1, tl.int64)
    low = tl.where((ids & 7) < 4, one << ((ids & 3) * 16), 0)
    high = tl.where((ids & 7) < 4, 0, one << ((ids & 3) * 16))
    if draft is not None:
        if drawn_from.point == SOFTMAX:
            BLOCK: tl.constexpr = 16 if ENTRIES > 16 else ENTRIES
            prob, low, high = prob * 0.0, low * 0, high * 0
            before_id, before_octet = low.to(tl.int32), low.to(tl.int32)
            for begin in range(0, draft.count, BLOCK):
                other = begin + tl.arange(0, BLOCK)
                there, amount = entries(draft, slot, i, other, drawn_from, draft_scale, vocab)
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
    return Distinct(ids, prob, first_id, first_octet, low, high)


@triton.jit
def distributions(i, rows, token, slot, draft, draft_scale, draft_temperature, vocab, CANDIDATES: tl.constexpr):
    """Distributions of rows [GROUP] (-1 where no draft is verified), and the draft's probability under each.

    The lists' own sums replace a stored lse, in integers: a row gets the same bits in any group, and on any shard.
    """
    own = as_point(token)
    reference = tl.zeros(rows.shape, tl.float32)
    factor = tl.full(rows.shape, 1.0, tl.float32)
    point = own
    soft = tl.zeros(rows.shape, tl.float32)
    if draft is not None:
        if draft_temperature > 0.0:
            c = tl.arange(0, CANDIDATES)[None, :]
            inside = (rows >= 0)[:, None] & (c < draft.count)
            at = tl.where(rows >= 0, i, 0).to(tl.int64)[:, None]
            logits_ptrs = draft.logits_ptr + slot * draft.stride_slot + at * draft.stride_row + c
            x = numbers(tl.load(logits_ptrs, mask=inside, other=NEG_INF).to(tl.float32))
            ids_ptrs = draft.ids_ptr + slot * draft.stride_ids_slot + at * draft.stride_ids_row + c
            ids = tl.load(ids_ptrs, mask=inside, other=-1).to(tl.int64)
            top = tl.max(x, axis=1)
            reference = finite_or_zero(top)
            sumexp = tl.sum((tl.exp2(below_max(x, top[:, None]) * draft_scale) * SUMEXP_ONE).to(tl.int64), axis=1)
            factor = 1.0 / tl.maximum(sumexp, 1).to(tl.float32) * SUMEXP_ONE
            # The draft's entries, relative to the best of them: an improbable draft keeps its bits.
            own_x = tl.where(ids == token[:, None], x, NEG_INF)
            own_top = tl.max(own_x, axis=1)
            own_sumexp = tl.sum((tl.exp2(below_max(own_x, own_top[:, None]) * draft_scale) * SUMEXP_ONE).to(tl.int64), axis=1)
            soft = own_sumexp.to(tl.float32) * (1.0 / SUMEXP_ONE) * tl.exp2(below_max(own_top, top) * draft_scale) * factor
            place = tl.min(tl.where(x == POS_INF, c, CANDIDATES), axis=1)
            hot = tl.sum(tl.where(c == place[:, None], ids, 0), axis=1)
            hot = tl.where((hot >= 0) & (hot < vocab), hot, NOBODY).to(tl.int32)
            point = tl.where(top == POS_INF, hot, tl.where(top == NEG_INF, NOBODY, SOFTMAX))
    point = tl.where(token == -1, NOBODY, point)
    hit = tl.where(token == point, 1.0, 0.0)
    return Distribution(point, reference, factor), tl.where(point == SOFTMAX, soft, hit)


@triton.jit
def octet_without(x, octet, ids, top, scale, GROUP: tl.constexpr):
    """What ids [GROUP] add to the sums of exponentials of their blocks, whose maxima are `top`: int64. x [GROUP, 8]: logits of the
    ids' octets.

    The same tree with and without the id, hence the same bits.
    """
    e = tl.exp2(below_max(x, top[:, None]) * scale)
    rest = octet_sums(tl.where(octet == ids[:, None], 0.0, e), GROUP)
    return (octet_sums(e, GROUP) * SUMEXP_ONE).to(tl.int64) - (rest * SUMEXP_ONE).to(tl.int64)


@triton.jit
def _in_vocab(rows, token, view):
    inside = (rows >= 0) & (token >= 0) & (token < view.vocab)
    return tl.where(inside, token, 0).to(tl.int32), inside


@triton.jit
def _octet(ids):
    """The ids [GROUP, 8] that ids [GROUP] are among."""
    return (ids // 8 * 8)[:, None] + tl.arange(0, 8)[None, :]


@triton.jit
def draft_logits(i, rows, token, view, draft, PROPOSAL: tl.constexpr):
    """The target's logits of the octets of one-hot drafts [GROUP, 8]; lists of candidates need none."""
    logits = tl.zeros(rows.shape, tl.float32)
    if draft is None:
        ids, inside = _in_vocab(rows, token, view)
        octet = _octet(ids)
        logits = read_rows(view, tl.minimum(i, view.length), octet, inside[:, None] & (octet < view.vocab))
    return logits


@triton.jit
def draft_stats(
    i, rows, token, logits, blocks, view, draft, scratch, scales, draft_temperature, num_blocks,
    PROPOSAL: tl.constexpr, BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """rows, token (the draft): [GROUP], rows -1 where no draft is verified; logits: draft_logits; blocks: the rows' RowBlocks
    [GROUP, BLOCKS]."""
    if draft is None:
        ids, inside = _in_vocab(rows, token, view)
        octet = _octet(ids)
        own = (ids // VOCAB_BLOCK)[:, None] == tl.arange(0, BLOCKS)[None, :]
        top = tl.max(tl.where(own, blocks.tops, NEG_INF), axis=1)
        removed = octet_without(logits, octet, ids, top, scales.target, rows.shape[0])
        tl.store(scratch.sparse.removed_ptr + rows, tl.where(inside, removed, 0), mask=rows >= 0)
    drawn_from, draft_prob = distributions(
        i, rows, token, view.slot, draft, scales.draft, draft_temperature, view.vocab, CANDIDATES
    )
    store_draft_stats(scratch.stats, rows, drawn_from, draft_prob)


@triton.jit
def list_end(draft, drawn_from):
    """Candidates that there are: all of them, or one where the distribution is a point."""
    end = 1
    if draft is not None:
        end = tl.where(drawn_from.point == SOFTMAX, draft.count, 1)
    return end


@triton.jit
def _entry_sums(start, i, row, view, draft, partials, pair, scales, num_blocks, ENTRIES: tl.constexpr):
    """What candidates take from the sums of their blocks, and what they add as a residual of their own."""
    found = distinct(start, draft, view.slot, i, pair.draft, scales.draft, view.vocab, ENTRIES)
    ids = found.ids
    own_block = ids // VOCAB_BLOCK
    slots = tl.arange(0, 8)[None, :]
    octet = (ids >> 3)[:, None] * 8 + slots
    inside = (ids >= 0)[:, None] & (octet < view.vocab)
    own_top = tl.load(partials.max_ptr + row * num_blocks + own_block, mask=ids >= 0, other=0.0, volatile=True)
    e = tl.exp2(below_max(read_tile(view, i, octet, inside), own_top[:, None]) * scales.target)
    counts = tl.where(slots < 4, found.low[:, None], found.high[:, None]) >> ((slots & 3) * 16)
    rest = octet_sums(tl.where((counts & 65535) > 0, 0.0, e), ENTRIES)
    removed = (octet_sums(e, ENTRIES) * SUMEXP_ONE).to(tl.int64) - (rest * SUMEXP_ONE).to(tl.int64)
    x = read_row(view, i, ids, ids >= 0)
    target_prob = soft_prob(x, ids, pair.target, scales.target)
    added = (tl.maximum(pair.prefix_prob * target_prob - found.prob, 0.0) * RESIDUAL_ONE).to(tl.int64)
    return EntrySums(ids, own_block, removed, added, found.first_octet, found.first_id)


@triton.jit
def residual_of_blocks(
    i, row, blocks, pair, view, draft, scratch, scales, num_blocks, BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr
):  # fmt: skip
    """Of row i of a request, which is row `row` of all. blocks: its RowBlocks."""
    ENTRIES: tl.constexpr = 64 if CANDIDATES > 64 else CANDIDATES
    partials, residual_ptr, removed_ptr = scratch.target, scratch.residual_ptr, scratch.sparse.removed_ptr
    block = tl.arange(0, BLOCKS)
    there = block < num_blocks
    of_block = row * num_blocks + block
    target = pair.target
    if draft is None:
        # The draft alone: its row's statistics say what its block loses.
        point = pair.draft.point
        in_vocab = (point >= 0) & (point < view.vocab)
        mine = block == tl.where(in_vocab, point // VOCAB_BLOCK, -1)
        taken = tl.where(mine, pair.removed, 0)
        extra = tl.where(mine, (tl.maximum(pair.prefix_prob * pair.target_prob - 1.0, 0.0) * RESIDUAL_ONE).to(tl.int64), 0)
        in_list = tl.where(in_vocab & (point == target.point), 1, 0)
    else:
        tl.store(removed_ptr + of_block, tl.zeros([BLOCKS], tl.int64), mask=there)
        tl.store(residual_ptr + of_block, tl.zeros([BLOCKS], tl.int64), mask=there)
        stores_done()
        in_list = tl.zeros((), tl.int32)
        for start in range(0, list_end(draft, pair.draft), ENTRIES):
            sums = _entry_sums(start, i, row, view, draft, partials, pair, scales, num_blocks, ENTRIES)
            tl.atomic_add(removed_ptr + row * num_blocks + sums.block, sums.removed, mask=sums.first_octet, sem="relaxed")
            tl.atomic_add(residual_ptr + row * num_blocks + sums.block, sums.added, mask=sums.first_id, sem="relaxed")
            in_list = tl.maximum(in_list, tl.max(tl.where(sums.ids == target.point, 1, 0), axis=0))
        stores_done()
        taken = tl.load(removed_ptr + of_block, mask=there, other=0, volatile=True)
        extra = tl.load(residual_ptr + of_block, mask=there, other=0, volatile=True)
        tl.debug_barrier()
    sumexp = (blocks.words & SUMEXP_BITS) - taken
    unlisted = (
        sumexp.to(tl.float32)
        * tl.exp2(below_max(blocks.tops, target.reference) * scales.target)
        * (target.factor * (1.0 / SUMEXP_ONE))
    )
    if target.point != SOFTMAX:
        unlisted = tl.where(block == tl.where(in_list == 0, target.point // VOCAB_BLOCK, -1), 1.0, 0.0)
    return (pair.prefix_prob * unlisted * RESIDUAL_ONE).to(tl.int64) + extra


@triton.jit
def residual_sums(
    part, span, i, row, pair, view, draft, scratch, scales, num_blocks,
    PROPOSAL: tl.constexpr, PAIRS: tl.constexpr, BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The only part: all blocks of a row."""
    block = tl.arange(0, BLOCKS)
    blocks = load_row_blocks(scratch.target, row, num_blocks, BLOCKS)
    residual = residual_of_blocks(i, row, blocks, pair, view, draft, scratch, scales, num_blocks, BLOCKS, CANDIDATES)
    tl.store(scratch.residual_ptr + row * num_blocks + block, residual, mask=block < num_blocks)


@triton.jit
def residual_in_block(
    x, block, i, request, pair, view, draft, scratch, scales, PROPOSAL: tl.constexpr, CANDIDATES: tl.constexpr
):  # fmt: skip
    """x [VOCAB_BLOCK]: the block's target logits."""
    ENTRIES: tl.constexpr = 64 if CANDIDATES > 64 else CANDIDATES
    at = tl.arange(0, VOCAB_BLOCK)
    unlisted = pair.prefix_prob * soft_prob(x, block * VOCAB_BLOCK + at, pair.target, scales.target)
    if CANDIDATES == 1:
        ids, _prob = entries(draft, view.slot, i, tl.arange(0, 1), pair.draft, scales.draft, view.vocab)
        # P_i * target <= 1 = the draft's: nothing of it is left.
        residual = tl.where(block * VOCAB_BLOCK + at == tl.max(ids, axis=0), 0.0, unlisted)
    else:
        # Entries find their places in the block through memory; -1 = no entry.
        patch = scratch.sparse.patch_ptr + request.to(tl.int64) * VOCAB_BLOCK
        tl.store(patch + at, at * 0.0 - 1.0)
        stores_done()
        for start in range(0, list_end(draft, pair.draft), ENTRIES):
            found = distinct(start, draft, view.slot, i, pair.draft, scales.draft, view.vocab, ENTRIES)
            ids = found.ids
            in_list = target_probs(view, i, tl.maximum(ids, 0), pair.target, scales.target)
            mine = found.first_id & (ids // VOCAB_BLOCK == block)
            tl.store(patch + ids % VOCAB_BLOCK, tl.maximum(pair.prefix_prob * in_list - found.prob, 0.0), mask=mine)
        stores_done()
        changed = tl.load(patch + at, volatile=True)
        residual = tl.where(changed >= 0.0, changed, unlisted)
    return residual


SPARSE = ChainProposal(draft_logits, draft_stats, residual_sums, residual_of_blocks, residual_in_block, None)
