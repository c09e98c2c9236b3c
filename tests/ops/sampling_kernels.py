"""Kernels that do nothing but call the sampling primitives: one program per row."""

import triton
import triton.language as tl

from dspark_kernels.kernels.primitives.adjust import adjusted, no_path
from dspark_kernels.kernels.primitives.constants import FILTER_LIST, NEG_INF, SUMEXP_ONE, VOCAB_BLOCK
from dspark_kernels.kernels.primitives.filters import filter_is_on, filter_row, kept, sums_in_support
from dspark_kernels.kernels.primitives.sumexp import below_max, fixed_sums, log2_scale, numbers


@triton.jit
def stored_path(j, path):
    path_ptr, lens_ptr, width, rows = path
    return tl.load(path_ptr + rows * width + j, mask=j < tl.load(lens_ptr + rows), other=-1)


@triton.jit
def adjust_kernel(x_ptr, out_ptr, slots_ptr, settings, path, vocab, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Tiles of ROWS rows x WIDTH ids, one program each."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ids = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (rows >= 0)[:, None] & (ids < vocab)
    x = tl.load(x_ptr + rows[:, None] * vocab + ids, mask=inside, other=NEG_INF).to(tl.float32)
    slots = tl.load(slots_ptr + rows).to(tl.int64)
    if path is None:
        x = adjusted(x, ids, inside, slots, rows.to(tl.int64), settings, tl.zeros_like(rows) - 1, 0, no_path)
    else:
        path_ptr, lens_ptr, width = path
        of_row = (path_ptr, lens_ptr, width, rows)
        x = adjusted(x, ids, inside, slots, rows.to(tl.int64), settings, of_row, width, stored_path)
    tl.store(out_ptr + rows[:, None] * vocab + ids, x, mask=inside)


@triton.jit
def load_row(ids, inside, source):
    row_ptr, width, reads_ptr = source
    if reads_ptr is not None:
        tl.atomic_add(reads_ptr, 1)
    return numbers(tl.load(row_ptr + ids, mask=inside & (ids < width), other=NEG_INF).to(tl.float32))


@triton.jit
def filter_kernel(
    x_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, kept_ptr, sumexp_ptr, top_ptr, maxima_ptr, groups_ptr, list_ptr,
    reads_ptr,  # int32 [ROWS, 2]: blocks that the filter reads, groups that reach the bound
    vocab, num_blocks,
    JOINT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = x_ptr + row * vocab
    scale = log2_scale(tl.load(temperature_ptr + row))
    num_groups = tl.cdiv(vocab, GROUP)
    top_ptr += row * num_blocks
    sumexp_ptr += row * num_blocks
    maxima_ptr += row * num_groups
    groups_ptr += row * num_groups
    list_ptr += row * 2 * FILTER_LIST
    for block in range(num_blocks):
        ids = block * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
        x = load_row(ids, ids < vocab, (row_ptr, vocab, None))
        top = tl.max(x, axis=0)
        maxima = tl.max(tl.reshape(x, [VOCAB_BLOCK // GROUP, GROUP]), axis=1)
        group = block * (VOCAB_BLOCK // GROUP) + tl.arange(0, VOCAB_BLOCK // GROUP)
        tl.store(maxima_ptr + group, maxima, mask=group < num_groups)
        tl.store(top_ptr + block, top)
        sumexp = fixed_sums(tl.exp2(below_max(x, top) * scale), 1, VOCAB_BLOCK, SUMEXP_ONE)
        tl.store(sumexp_ptr + block + tl.arange(0, 1), sumexp)
    tl.debug_barrier()
    block = tl.arange(0, BLOCKS)
    tops = tl.load(top_ptr + block, mask=block < num_blocks, other=NEG_INF)
    sumexp = tl.load(sumexp_ptr + block, mask=block < num_blocks, other=0)
    top = tl.max(tops, axis=0)
    total = tl.sum((sumexp.to(tl.float32) * tl.exp2(below_max(tops, top) * scale)).to(tl.int64), axis=0)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    threshold = tl.zeros((), tl.int64)
    cut = tl.full((), -1, tl.int32)
    source = (row_ptr, vocab, reads_ptr + row * 2)
    if filter_is_on(top_k, top_p, min_p, vocab):
        threshold, cut, reached = filter_row(
            load_row, source, vocab, maxima_ptr, num_groups, groups_ptr, list_ptr, list_ptr + FILTER_LIST, top, total, scale,
            top_k, top_p, min_p, JOINT, GROUP, GROUPS,
        )  # fmt: skip
        sums_in_support(load_row, source, vocab, groups_ptr, reached, threshold, cut, top_ptr, sumexp_ptr, num_blocks, scale,
                    GROUP, BLOCKS)  # fmt: skip
        tl.store(reads_ptr + row * 2 + 1, reached)
    for block in range(num_blocks):
        ids = block * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
        x = load_row(ids, ids < vocab, (row_ptr, vocab, None))
        tl.store(kept_ptr + row * vocab + ids, kept(x, ids, threshold, cut), mask=ids < vocab)
