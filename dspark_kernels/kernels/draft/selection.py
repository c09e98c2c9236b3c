"""The C best of a row of logits, as ids in ascending order, without sorting the row.

A part of a row: the key of the largest logit of each sub-block, one pass over the logits. Then the last part to arrive: the C
largest sub-blocks hold the C largest logits (each has one at least as large as any in another sub-block), so C * GROUP logits are
read again and the C largest kept; ties go to the lowest ids. Symbols: V vocabulary, C candidates, sub-block = GROUP ids. Reference:
reference/candidates.py.
"""

import triton
import triton.language as tl

from ..primitives.adjust import adjusted, no_path
from ..primitives.constants import NAN, NEG_INF, POS_INF, VOCAB_BLOCK
from ..primitives.select import ABSENT, ordered_key, scatter, select
from ..primitives.slots import state_slots
from ..primitives.sumexp import numbers
from ..primitives.sync import arrive
from ..primitives.vocab_blocks import SAW_FINITE, block_sums
from .args import SelectionTile
from .candidate_heads import prefetch_rows

SUB_BLOCK_COLUMNS = tl.constexpr(64)
LAST_ROWS = tl.constexpr(128)  # of a batch; the rows of W1 of all their candidates are a tenth of their logits


@triton.jit
def slot_of(slots_ptr, request, num_requests, num_slots):
    return tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)


@triton.jit
def padded_sub_blocks(num_sub_blocks):
    """int32 words between the sub-blocks of two rows: whole vectors, however many sub-blocks there are."""
    return tl.cdiv(num_sub_blocks, 16) * 16


@triton.jit
def _load_chunk(row_ptr, chunk, end, vocab, BLOCK: tl.constexpr):
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    return tl.load(row_ptr + ids, mask=ids < tl.where(chunk < end, vocab, 0), other=NEG_INF)


@triton.jit
def with_settings(x, targets, inside, settings, path, path_max, PATH: tl.constexpr):
    """x fp32 of target ids after penalties, bias and mask. settings: RowSettings."""
    if settings.adjust is not None:
        SIZE: tl.constexpr = x.numel
        one = tl.zeros([1], tl.int64)
        wide = tl.reshape(x, [1, SIZE])
        wide = adjusted(
            wide, tl.reshape(targets, [1, SIZE]), tl.reshape(inside, [1, SIZE]), one + settings.slot, one + settings.mask_row,
            settings.adjust, path, path_max, PATH,
        )  # fmt: skip
        x = tl.reshape(wide, x.shape)
    return x


@triton.jit
def target_logits(x, ids, inside, settings, path, path_max, PATH: tl.constexpr, first_target=0):
    """(x fp32 after penalties, bias and mask, -inf where there is no token; target ids int32; where there is a token).

    settings: RowSettings. first_target: of id 0, where there is no map.
    """
    targets = ids + first_target
    if settings.map_ptr is not None:
        mapped = tl.load(settings.map_ptr + ids, mask=inside, other=-1)
        inside = inside & (mapped >= 0) & (mapped < settings.num_targets)
        targets = tl.where(inside, mapped, 0).to(tl.int32)
    x = with_settings(x, targets, inside, settings, path, path_max, PATH)
    if settings.map_ptr is not None:
        x = tl.where(inside, x, NEG_INF)
    return x, targets, inside


@triton.jit
def _sweep(
    row_ptr, keys_ptr, settings, blocks, scale, first, end, vocab, first_target, ANY_VALUE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Keys of chunks first .. end - 1 of a row; returns fp32 [BLOCK], NaN where a logit is, and the blocks' largest maxima.

    What is stored is right for any logits with ANY_VALUE, else as long as none is NaN and no block has +inf.
    """
    BLOCK: tl.constexpr = TILE.BLOCK
    GROUP: tl.constexpr = TILE.GROUP
    seen = tl.zeros([BLOCK], tl.float32)
    largest = tl.full([BLOCK // VOCAB_BLOCK if blocks is not None else 1], NEG_INF, tl.float32)
    loaded = _load_chunk(row_ptr, first, end, vocab, BLOCK)
    for chunk in range(first, end):
        x = loaded.to(tl.float32)
        loaded = _load_chunk(row_ptr, chunk + 1, end, vocab, BLOCK)  # on its way while this one is reduced
        ids = chunk * BLOCK + tl.arange(0, BLOCK)
        x, _, _ = target_logits(x, ids, ids < vocab, settings, tl.zeros([1], tl.int64), 0, no_path, first_target)
        seen = tl.fma(x, x, seen)  # one instruction a logit: a sum of squares is NaN where one of them is, and nowhere else
        if ANY_VALUE:
            x = numbers(x)
        keys = ordered_key(tl.max(tl.reshape(x, [BLOCK // GROUP, GROUP]), axis=1), TILE.SHIFT)
        sub_block = chunk * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        tl.store(keys_ptr + sub_block, keys, mask=sub_block < tl.cdiv(vocab, GROUP))
        if blocks is not None:
            x = tl.reshape(x, [BLOCK // VOCAB_BLOCK, VOCAB_BLOCK])
            block_max, sumexp = block_sums(x, scale, BLOCK // VOCAB_BLOCK)
            if ANY_VALUE:
                finite = tl.max(tl.where(tl.abs(x) < POS_INF, 1, 0), axis=1) > 0
            else:
                finite = block_max > NEG_INF
            largest = tl.maximum(largest, block_max)
            block = chunk * (BLOCK // VOCAB_BLOCK) + tl.arange(0, BLOCK // VOCAB_BLOCK)
            tl.store(blocks.max_ptr + block, block_max, mask=block < tl.cdiv(vocab, VOCAB_BLOCK))
            tl.store(blocks.sumexp_ptr + block, sumexp | tl.where(finite, SAW_FINITE, 0), mask=block < tl.cdiv(vocab, VOCAB_BLOCK))
    return seen, largest


@triton.jit
def store_sub_block_keys(
    row_ptr, keys_ptr, settings, blocks, scale, first, end, vocab, TILE: tl.constexpr, first_target=0,
):  # fmt: skip
    """Key of the largest logit of each sub-block of chunks first .. end - 1 of a row; returns whether a logit is NaN, int32.

    blocks: BlockSums of the row, where maxima and sums of exponentials of vocabulary blocks are wanted, too; or None.
    """
    seen, largest = _sweep(row_ptr, keys_ptr, settings, blocks, scale, first, end, vocab, first_target, False, TILE)
    nan = tl.max((seen != seen).to(tl.int32), axis=0)
    if (nan > 0) | (tl.max(largest, axis=0) == POS_INF):
        # Rare, so paid only here: once more, with the instructions that NaN and +inf need.
        tl.debug_barrier()
        _sweep(row_ptr, keys_ptr, settings, blocks, scale, first, end, vocab, first_target, True, TILE)
    return nan


@triton.jit
def keep_best(row, row_ptr, settings, selection, vocab, num_candidates, TILE: tl.constexpr, first_target=0):
    """The C best of a row, ascending ids, and what they have in common: key > bound or (key = bound and id <= cut)."""
    GROUP: tl.constexpr = TILE.GROUP
    num_sub_blocks = tl.cdiv(vocab, GROUP)
    sub_block = (
        tl.arange(0, TILE.SUB_BLOCKS // SUB_BLOCK_COLUMNS)[:, None] * SUB_BLOCK_COLUMNS + tl.arange(0, SUB_BLOCK_COLUMNS)[None, :]
    )
    padded = padded_sub_blocks(num_sub_blocks)
    keys = tl.load(selection.keys_ptr + row * padded + sub_block, mask=sub_block < padded, other=ABSENT, volatile=True)
    keys = tl.where(sub_block < num_sub_blocks, keys, ABSENT)
    wanted = tl.minimum(num_candidates, num_sub_blocks)
    lowest = ordered_key(tl.full((), NEG_INF, tl.float32), TILE.SHIFT)
    # Groups of sub-blocks: as many keys reach the least of their maxima as there are groups, which is a better start than nothing.
    GROUPS: tl.constexpr = min(2 * TILE.CHOSEN, TILE.SUB_BLOCKS)
    MEMBERS: tl.constexpr = TILE.SUB_BLOCKS // GROUPS
    maxima = tl.max(tl.reshape(keys, [GROUPS, MEMBERS]), axis=1)
    largest = tl.max(maxima)
    least = tl.min(tl.where(maxima == ABSENT, 2147483647, maxima))
    least = tl.where(tl.cdiv(num_sub_blocks, MEMBERS) >= wanted, least, lowest)
    reached, selected, place = select(keys, wanted, least, largest)
    scatter(selection.sub_blocks_ptr + row * num_candidates, place, sub_block, selected)
    tl.debug_barrier()
    c = tl.arange(0, TILE.CHOSEN)
    sub_blocks = tl.load(selection.sub_blocks_ptr + row * num_candidates + c, mask=c < wanted, other=0, volatile=True)
    ids = tl.multiple_of(sub_blocks * GROUP, GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    inside = (c < wanted)[:, None] & (ids < vocab)
    x = tl.load(row_ptr + ids, mask=inside, other=NEG_INF).to(tl.float32)
    x, _, _ = target_logits(x, ids, inside, settings, tl.zeros([1], tl.int64), 0, no_path, first_target)
    keys = tl.where(inside, ordered_key(numbers(x), TILE.SHIFT), ABSENT)
    # As many logits reach the threshold of the maxima as there are sub-blocks chosen; in a small vocabulary more are wanted.
    # Few reach it beyond those: the first step looks as far as neighbours in bf16 are apart.
    least = tl.where(num_candidates <= num_sub_blocks, reached, lowest)
    NEAR: tl.constexpr = 1 << max(0, 16 - TILE.SHIFT)
    bound, selected, place = select(keys, tl.minimum(num_candidates, vocab), least, largest, NEAR=NEAR)
    scatter(selection.ids_ptr + row * num_candidates, place, ids, selected)
    if selection.bounds_ptr is not None:
        tl.store(selection.bounds_ptr + row * 2, bound)
        tl.store(selection.bounds_ptr + row * 2 + 1, tl.max(tl.where(selected & (keys == bound), ids, -1)))


@triton.jit
def sweep_part(row, part, parts, row_ptr, settings, blocks, scale, selection, seen_ptr, vocab, TILE: tl.constexpr, first_target=0):
    """One of `parts` parts of a row: keys of its sub-blocks; NAN at seen_ptr where a logit is. blocks: as in store_sub_block_keys."""
    chunks = tl.cdiv(vocab, TILE.BLOCK)
    keys_ptr = selection.keys_ptr + row * padded_sub_blocks(tl.cdiv(vocab, TILE.GROUP))
    first, end = part * chunks // parts, (part + 1) * chunks // parts
    nan = store_sub_block_keys(row_ptr, keys_ptr, settings, blocks, scale, first, end, vocab, TILE, first_target)
    if nan > 0:
        tl.atomic_or(seen_ptr, NAN, sem="relaxed")


@triton.jit
def finish_part(row, parts, row_ptr, settings, selection, vocab, num_candidates, TILE: tl.constexpr, first_target=0):
    """A part that `sweep_part` began is done; True for the last one, which keeps the C best of the row."""
    last = arrive(selection.arrivals_ptr + row, parts)
    if last:
        keep_best(row, row_ptr, settings, selection, vocab, num_candidates, TILE, first_target)
    return last


@triton.jit
def prefetch_best(row, head, map_ptr, selection, num_rows, vocab, num_candidates, TILE: tl.constexpr):
    """Rows of the head that may be read for the C best of a row: of W2, of which all are, and of W1, of which one is, where an id is
    its own target id: only for the last rows, whose requests nothing but the walk keeps waiting."""
    best = best_ids(selection.ids_ptr, row, num_rows, tl.arange(0, TILE.WIDTH), num_candidates, vocab)
    prefetch_rows(head.w2_ptr, head.stride_w2, best, head.rank)
    if map_ptr is None:
        if row >= num_rows - LAST_ROWS:
            prefetch_rows(head.w1_ptr, head.stride_w1, tl.where(best < head.vocab, best, -1), head.rank)


@triton.jit
def best_ids(ids_ptr, row, end, c, num_candidates, vocab):
    """Entry c of the C best of a row below `end`: an id, or -1 where there is none."""
    there = c < tl.where(row < end, tl.minimum(num_candidates, vocab), 0)
    return tl.load(ids_ptr + row * num_candidates + c, mask=there, other=-1, volatile=True)


@triton.jit
def with_successors(ids, c, successors, previous, row_ptr, settings, bounds_ptr, row, num_candidates, vocab, SHIFT: tl.constexpr):
    """ids [WIDTH] with the successors listed for `previous` behind the C best, those that are there already left out (-1)."""
    count = tl.where((previous >= 0) & (previous < successors.vocab), successors.count, 0)
    list_ptr = successors.ptr + previous * successors.stride
    i = c - num_candidates
    more = tl.load(list_ptr + i, mask=(i >= 0) & (i < count), other=-1)
    more = tl.where((more >= 0) & (more < vocab), more, -1).to(tl.int32)
    x = tl.load(row_ptr + more, mask=more >= 0, other=NEG_INF).to(tl.float32)
    x, _, _ = target_logits(x, more, more >= 0, settings, tl.zeros([1], tl.int64), 0, no_path)
    key = ordered_key(numbers(x), SHIFT)
    bound = tl.load(bounds_ptr + row * 2, volatile=True)
    cut = tl.load(bounds_ptr + row * 2 + 1, volatile=True)
    more = tl.where((key > bound) | ((key == bound) & (more <= cut)), -1, more)
    for j in range(count):
        earlier = tl.load(list_ptr + j)
        more = tl.where((more == earlier) & (i > j), -1, more)
    return tl.where(i >= 0, more, ids)


def selection_tile(config, shift) -> SelectionTile:
    return SelectionTile(
        BLOCK=config.block, GROUP=config.group, SUB_BLOCKS=config.sub_blocks, CHOSEN=config.chosen, WIDTH=config.width, SHIFT=shift
    )
