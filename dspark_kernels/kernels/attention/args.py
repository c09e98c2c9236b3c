"""Records that the kernels of attention take. Needs no Triton: ops build them, or a kernel builds them from its arguments.

Symbols: R requests, S request slots, N rows, Hq/Hkv query and KV heads, D head size, HEAD the same padded, M tree slots. None where
a call has no such thing.
"""

from typing import NamedTuple

from ..args import Pointer


class WorkTable(NamedTuple):
    """Items of work that a plan cuts; columns as in plan.py."""

    items_ptr: Pointer  # int32 [max_items, 10]
    counts_ptr: Pointer  # int32 [3]: items, first row of a request, end of the last


class PlanInputs(NamedTuple):
    """Pointers that a plan reads."""

    query_start_ptr: Pointer  # int32 [R+1]
    context_lens_ptr: Pointer  # int [S]
    slots_ptr: Pointer | None  # int32 or int64 [R]; None: a request's slot is its row


class PlanTile(NamedTuple):
    """Sizes that a plan is made for, one constexpr."""

    GROUP: int  # Hq / Hkv
    KV_HEADS: int
    BLOCK_M: int  # packed rows of a tile
    BLOCK_N: int  # keys of a block
    PROGRAMS: int
    MIN_BLOCKS: int  # blocks of a part at least
    FINER: int  # parts may be as many times shorter than an even share
    INVARIANT_PARTS: int  # parts of a context at most, by its own length alone; 0: by the whole batch
    REQUESTS: int  # padded number of requests
    LOG_REQUESTS: int
    BLOCK: int  # items of a program


class AttentionInputs(NamedTuple):
    """Pointers that attention reads; their strides are in the records below."""

    q_ptr: Pointer  # [N, Hq, D]
    k_ptr: Pointer  # [pages, page_size, Hkv, D], e4m3 as bytes
    v_ptr: Pointer  # the same
    k_scale_ptr: Pointer | None  # fp32 [1] or [Hkv]
    v_scale_ptr: Pointer | None  # fp32 [1] or [Hkv]
    block_tables_ptr: Pointer  # int32 [S, max_pages]
    slot_mapping_ptr: Pointer | None  # int64 [N]; None with k_new
    k_new_ptr: Pointer | None  # [N, Hkv, D]
    v_new_ptr: Pointer | None  # [N, Hkv, D]
    ancestors_ptr: Pointer | None  # int64 [N] or [S, M]
    sinks_ptr: Pointer | None  # [Hq]


class AttentionResults(NamedTuple):
    """Pointers that attention writes; their strides are in `RowStrides`."""

    out_ptr: Pointer  # [N, Hq, D]
    lse_ptr: Pointer | None  # fp32 [N, Hq]


class AttentionScratch(NamedTuple):
    """Partial results of tiles of several parts."""

    arrivals_ptr: Pointer  # int32 [max_items, Hkv], zero before and after
    partial_ptr: Pointer  # fp32 [partial_rows, Hkv, HEAD]
    norms_ptr: Pointer  # fp32 [partial_rows, Hkv, 2]


class CacheStrides(NamedTuple):
    """Strides of the queries and of the cache."""

    q_row: int
    q_head: int
    k_page: int
    k_slot: int
    k_head: int
    v_page: int
    v_slot: int
    v_head: int
    k_scale: int  # 0: one for all heads
    v_scale: int


class NewStrides(NamedTuple):
    """Strides of the keys and values of the rows themselves."""

    k_row: int
    k_head: int
    v_row: int
    v_head: int


class RowStrides(NamedTuple):
    """Strides of ancestor words and of results."""

    ancestors_row: int  # 0 where ancestors go by slot
    ancestors_index: int
    out_row: int
    out_head: int
    lse_row: int
    lse_head: int


class Rows(NamedTuple):
    """A tensor [N, heads, D], or [N, heads]; ptr None: there is none."""

    ptr: Pointer | None
    stride_row: int
    stride_head: int


class Cache(NamedTuple):
    """Keys or values [pages, page_size, Hkv, D] and their scale fp32 [1] or [Hkv]."""

    ptr: Pointer
    stride_page: int
    stride_slot: int
    stride_head: int
    scale_ptr: Pointer | None
    stride_scale: int


class Pages(NamedTuple):
    """Block tables int32 [S, max_pages]."""

    ptr: Pointer
    stride: int
    num_pages: int  # of the cache


class Ancestors(NamedTuple):
    """Ancestor words int64 by row [N] or by slot [S, M]; ptr None: a chain or a block."""

    ptr: Pointer | None
    stride_slot: int
    stride_row: int
    stride_index: int
    slots: int  # M


class AttentionTile(NamedTuple):
    """Sizes of attention, one constexpr."""

    FULL: bool  # own rows see each other in both directions
    KV_HEADS: int
    GROUP: int  # Hq / Hkv
    D: int
    HEAD: int  # D padded
    PAGE_SIZE: int
    BLOCK_M: int  # packed rows of a tile
    BLOCK_N: int  # keys of a block
    STAGES: int  # of the loop over the context
    PAGES_AHEAD: bool  # pages of a block are loaded with the block before
    OWN_STAGES: int  # of the loop over own rows
    OWN_BLOCK: int  # own rows at a time
