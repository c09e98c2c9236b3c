"""Kernels that do nothing but call the sampling primitives: one program per row."""

import triton
import triton.language as tl

from dspark_kernels.kernels.primitives.adjust import adjusted, no_path
from dspark_kernels.kernels.primitives.filters import BLOCK, filter_is_on, filter_row, keep_masses, kept
from dspark_kernels.kernels.primitives.mass import LEAF, NEG_INF, ONE, below_max, log2_scale, masses, numbers


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
    x_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, kept_ptr, mass_ptr, top_ptr, maxima_ptr, groups_ptr, list_ptr,
    reads_ptr,  # int32 [ROWS, 2]: blocks that the filter reads, groups that reach the bound
    vocab, num_leaves,
    JOINT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    row_ptr = x_ptr + row * vocab
    scale = log2_scale(tl.load(temperature_ptr + row))
    num_groups = tl.cdiv(vocab, GROUP)
    top_ptr += row * num_leaves
    mass_ptr += row * num_leaves
    maxima_ptr += row * num_groups
    groups_ptr += row * num_groups
    list_ptr += row * 2 * BLOCK
    for leaf in range(num_leaves):
        ids = leaf * LEAF + tl.arange(0, LEAF)
        x = load_row(ids, ids < vocab, (row_ptr, vocab, None))
        top = tl.max(x, axis=0)
        maxima = tl.max(tl.reshape(x, [LEAF // GROUP, GROUP]), axis=1)
        group = leaf * (LEAF // GROUP) + tl.arange(0, LEAF // GROUP)
        tl.store(maxima_ptr + group, maxima, mask=group < num_groups)
        tl.store(top_ptr + leaf, top)
        mass = masses(tl.exp2(below_max(x, top) * scale), 1, LEAF, ONE)
        tl.store(mass_ptr + leaf + tl.arange(0, 1), mass)
    tl.debug_barrier()
    leaf = tl.arange(0, LEAVES)
    tops = tl.load(top_ptr + leaf, mask=leaf < num_leaves, other=NEG_INF)
    mass = tl.load(mass_ptr + leaf, mask=leaf < num_leaves, other=0)
    top = tl.max(tops, axis=0)
    total = tl.sum((mass.to(tl.float32) * tl.exp2(below_max(tops, top) * scale)).to(tl.int64), axis=0)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    threshold = tl.zeros((), tl.int64)
    cut = tl.full((), -1, tl.int32)
    source = (row_ptr, vocab, reads_ptr + row * 2)
    if filter_is_on(top_k, top_p, min_p, vocab):
        threshold, cut, reached = filter_row(
            load_row, source, vocab, maxima_ptr, num_groups, groups_ptr, list_ptr, list_ptr + BLOCK, top, total, scale,
            top_k, top_p, min_p, JOINT, GROUP, GROUPS,
        )  # fmt: skip
        keep_masses(load_row, source, vocab, groups_ptr, reached, threshold, cut, top_ptr, mass_ptr, num_leaves, scale,
                    GROUP, LEAVES)  # fmt: skip
        tl.store(reads_ptr + row * 2 + 1, reached)
    for leaf in range(num_leaves):
        ids = leaf * LEAF + tl.arange(0, LEAF)
        x = load_row(ids, ids < vocab, (row_ptr, vocab, None))
        tl.store(kept_ptr + row * vocab + ids, kept(x, ids, threshold, cut), mask=ids < vocab)
