"""A tile of values in descending order, column after column: the bitonic network whose comparisons all point the same way.

    merge to runs of 2^m columns: a value with its mirror image in the run, then over 2^(m-2), ..., 1 columns, then inside columns

A value of rank n ends in row n % ROWS of column n / ROWS. A column belongs to a thread and 32 of them to a warp, so that only wider
exchanges go through shared memory; the others are shuffles and registers. Distances are loops: written out, a network has thousands
of instructions, which a launch fetches once and which compile for a minute.
"""

import triton
import triton.language as tl

WARP = tl.constexpr(32)  # columns; where a warp has 64 lanes they are half of one, and no less in it


@triton.jit
def _exchange_rows(tile, BIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The larger of two rows, whose numbers differ in one bit, to the first of them."""
    pairs = tl.reshape(tile, [ROWS >> (BIT + 1), 2, 1 << BIT, COLUMNS])
    first = (tl.arange(0, 2) == 0)[None, :, None, None]
    pairs = tl.where(first, tl.max(pairs, axis=1, keep_dims=True), tl.min(pairs, axis=1, keep_dims=True))
    return tl.reshape(pairs, [ROWS, COLUMNS])


@triton.jit
def _exchange_columns(tile, others, mask, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr):
    """The larger of a value and that of `others` in column `column ^ mask` where first [COLUMNS], else the smaller. mask < REACH."""
    if REACH <= WARP:
        PIECES: tl.constexpr = ROWS * COLUMNS // REACH
        index = (tl.arange(0, REACH) ^ mask)[None, :] + tl.zeros([PIECES, 1], tl.int32)
        others = tl.reshape(tl.gather(tl.reshape(others, [PIECES, REACH]), index, axis=1), [ROWS, COLUMNS])
    else:
        # In one dimension, which goes through shared memory: of two, the compiler has a warp hold a row, and shuffles it eightfold.
        index = tl.arange(0, ROWS * COLUMNS) ^ mask
        others = tl.reshape(tl.gather(tl.reshape(others, [ROWS * COLUMNS]), index, axis=0), [ROWS, COLUMNS])
    return tl.where((tile > others) == first[None, :], tile, others)


@triton.jit
def sort_columns(tile, LOG_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each column of a tile [ROWS, COLUMNS] in descending order."""
    row = tl.arange(0, ROWS)[:, None]
    for run in tl.static_range(1, LOG_ROWS + 1):
        # Complements of what is to ascend, which descend.
        ascending = -((row >> run) & 1)
        tile ^= ascending
        for step in tl.static_range(run):
            tile = _exchange_rows(tile, run - 1 - step, ROWS, COLUMNS)
        tile ^= ascending
    return tile


@triton.jit
def _reversed_rows(tile, LOG_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    for bit in tl.static_range(LOG_ROWS):
        pairs = tl.reshape(tile, [ROWS >> (bit + 1), 2, 1 << bit, COLUMNS])
        tile = tl.reshape(tl.xor_sum(pairs, axis=1, keep_dims=True) ^ pairs, [ROWS, COLUMNS])
    return tile


@triton.jit
def _merge(
    tile, run, LOG_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LOG_REACH: tl.constexpr, REACH: tl.constexpr,  # columns of a warp
    MIRROR_REACH: tl.constexpr,  # all columns, where a run is longer
):  # fmt: skip
    """Runs of 2^run columns from pairs of runs half as long."""
    column = tl.arange(0, COLUMNS)
    half = 1 << (run - 1)
    mirrored = _reversed_rows(tile, LOG_ROWS, ROWS, COLUMNS)
    tile = _exchange_columns(tile, mirrored, 2 * half - 1, (column & half) == 0, ROWS, COLUMNS, MIRROR_REACH)
    if MIRROR_REACH > REACH:
        for step in range(run - 1 - LOG_REACH):
            distance = half >> (step + 1)
            tile = _exchange_columns(tile, tile, distance, (column & distance) == 0, ROWS, COLUMNS, COLUMNS)
    for step in range(tl.minimum(run - 1, LOG_REACH)):
        distance = tl.minimum(half, REACH) >> (step + 1)
        tile = _exchange_columns(tile, tile, distance, (column & distance) == 0, ROWS, COLUMNS, REACH)
    for step in tl.static_range(LOG_ROWS):
        tile = _exchange_rows(tile, LOG_ROWS - 1 - step, ROWS, COLUMNS)
    return tile


@triton.jit
def merge_columns(tile, LOG_ROWS: tl.constexpr, ROWS: tl.constexpr, LOG_COLUMNS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile [ROWS, COLUMNS], each of whose columns descends, in descending order."""
    LOG_REACH: tl.constexpr = LOG_COLUMNS if LOG_COLUMNS < 5 else 5
    REACH: tl.constexpr = 1 << LOG_REACH
    for run in range(1, LOG_REACH + 1):
        tile = _merge(tile, run, LOG_ROWS, ROWS, COLUMNS, LOG_REACH, REACH, REACH)
    if LOG_REACH < LOG_COLUMNS:
        for run in range(LOG_REACH + 1, LOG_COLUMNS + 1):
            tile = _merge(tile, run, LOG_ROWS, ROWS, COLUMNS, LOG_REACH, REACH, COLUMNS)
    return tile
