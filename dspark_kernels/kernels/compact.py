"""The accepted path of a tree to consecutive slots of every layer's cache, in place, in one launch.

    slot(b + j) <- slot(path[j]),  j = 1..n,  b = the anchor's forward row, slot(row) = slot_mapping[row]

Symbols: R requests, M tree nodes, N forward rows, P caches (keys and values of all layers), n accepted drafts. Reference:
reference/compact.py. Source: the tree caches of SpecInfer, arXiv 2305.09781.

In place is safe because paths ascend: parents come before children, so path[i] >= i and path[i] < path[k] for i < k. A row that is
still to be read is never one that was written: path[k] = i with i < k would mean path[k] = i <= path[i] < path[k]. So blocks of
rows go in ascending order, and within a block everything is read before anything is written. Programs share no byte: each has a
request, a cache and a part of its slots' bytes.
"""

import triton
import triton.language as tl

# Columns of the table of caches, int64; the first is the address.
STRIDE_PAGE = tl.constexpr(1)
STRIDE_SLOT = tl.constexpr(2)
STRIDE_PART = tl.constexpr(3)
PARTS = tl.constexpr(4)  # parts of a slot
UNITS = tl.constexpr(5)  # units of a part
COLUMNS = tl.constexpr(6)


@triton.jit
def _typed(address, UNIT: tl.constexpr):
    if UNIT == 8:
        return address.to(tl.pointer_type(tl.int64))
    elif UNIT == 4:
        return address.to(tl.pointer_type(tl.int32))
    elif UNIT == 2:
        return address.to(tl.pointer_type(tl.int16))
    else:
        return address.to(tl.pointer_type(tl.int8))


@triton.jit
def _slots_of(slot_mapping_ptr, rows, num_rows, live):
    """Cache slot of forward rows, -1 where there is none."""
    return tl.load(slot_mapping_ptr + rows, mask=live & (rows >= 0) & (rows < num_rows), other=-1)


@triton.jit(do_not_specialize=["num_rows", "num_nodes", "num_caches", "num_chunks"])
def compact_kv_kernel(
    table_ptr,  # int64 [P, COLUMNS]
    slot_mapping_ptr,  # [N]
    kv_source_ptr,  # [R, M]
    accepted_ptr,  # [R]
    num_rows, num_nodes, num_caches, num_chunks, page_size,
    UNIT: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    request = (program // (num_caches * num_chunks)).to(tl.int64)
    cache = program // num_chunks % num_caches
    chunk = program % num_chunks
    accepted = tl.minimum(tl.load(accepted_ptr + request), num_nodes - 1)
    sources_ptr = kv_source_ptr + request * num_nodes
    row = table_ptr + cache * COLUMNS
    base = _typed(tl.load(row), UNIT)
    stride_page = tl.load(row + STRIDE_PAGE)
    stride_slot = tl.load(row + STRIDE_SLOT)
    stride_part = tl.load(row + STRIDE_PART)
    part = tl.load(row + UNITS).to(tl.int32)
    unit = chunk * CHUNK + tl.arange(0, CHUNK)
    used = unit < tl.load(row + PARTS) * part
    offsets = unit // part * stride_part + unit % part
    first = tl.load(sources_ptr)
    for start in range(1, accepted + 1, ROWS):
        j = start + tl.arange(0, ROWS)
        live = j <= accepted
        rows = tl.load(sources_ptr + j, mask=live, other=-1)
        source = _slots_of(slot_mapping_ptr, rows, num_rows, live)
        target = _slots_of(slot_mapping_ptr, first + j, num_rows, live & (rows != first + j))
        moves = ((source >= 0) & (target >= 0))[:, None] & used[None, :]
        from_ptr = base + (source // page_size * stride_page + source % page_size * stride_slot)[:, None] + offsets[None, :]
        to_ptr = base + (target // page_size * stride_page + target % page_size * stride_slot)[:, None] + offsets[None, :]
        values = tl.load(from_ptr, mask=moves, other=0)
        tl.debug_barrier()  # other warps may write what this one reads
        tl.store(to_ptr, values, mask=moves)


def launch_compact_kv(programs, args, *, unit, config):
    """Launch one program per request, cache and chunk of a slot."""
    compact_kv_kernel[(programs,)](
        *args, UNIT=unit, ROWS=config.rows, CHUNK=config.chunk, num_warps=config.num_warps, enable_fp_fusion=False
    )
