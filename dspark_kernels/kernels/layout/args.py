"""Records that the kernels of layouts take. Needs no Triton: ops build them, or a kernel builds them from its arguments.

Symbols: R requests, K drafts, N rows allocated, S request slots. None where a call has no such thing.
"""

from typing import NamedTuple

from ..args import Pointer


class LayoutInputs(NamedTuple):
    """Pointers that every layout reads."""

    anchors_ptr: Pointer  # int [S]
    positions_ptr: Pointer  # int [S], of the anchors
    prefill_ptr: Pointer | None  # int [R], rows of a prompt
    emits_ptr: Pointer | None  # bool or int32 [R]
    block_tables_ptr: Pointer | None  # int32 [S, max_pages]
    slots_ptr: Pointer | None  # int32 or int64 [R]; None: a request's slot is its row


class LayoutOutputs(NamedTuple):
    """What every layout writes, contiguous."""

    draft_lens_ptr: Pointer  # int32 [R]
    query_start_ptr: Pointer  # int32 [R+1]
    cu_logits_ptr: Pointer  # int32 [R+1]
    token_ids_ptr: Pointer  # int64 [N]
    positions_ptr: Pointer  # int64 [N]
    batch_indices_ptr: Pointer  # int32 [N]
    slot_mapping_ptr: Pointer | None  # int64 [N]; None without block tables
    logits_indices_ptr: Pointer  # int32 [N]
    num_rows_ptr: Pointer  # int32 [1]
    flags_ptr: Pointer  # int32 [R]


class AnchorRows(NamedTuple):
    """Last token of each request, int [S]."""

    ptr: Pointer
    stride: int


class Drafts(NamedTuple):
    """Drafts int64 [S, K]; ptr None: every draft is the same token."""

    ptr: Pointer | None
    stride: int


class Depths(NamedTuple):
    """Depths of tree nodes int32 [S, K+1]; ptr None: row j sits j after the anchor."""

    ptr: Pointer | None
    stride: int


class BlockTables(NamedTuple):
    """Block tables int32 [S, max_pages]."""

    ptr: Pointer | None
    stride: int
    max_pages: int
    page_size: int


class FixedStrides(NamedTuple):
    """Strides of what a layout of given lengths reads."""

    drafts: int
    depths: int
    anchors: int
    positions: int
    block_tables: int


class DraftLayoutStrides(NamedTuple):
    """Strides of what the layout of a drafter's block reads."""

    anchors: int
    positions: int
    block_tables: int


class ScheduleInputs(NamedTuple):
    """Pointers that lengths are decided from."""

    drafts_ptr: Pointer  # int64 [S, K]
    confidence_ptr: Pointer  # fp32 [S, K]
    stale_ptr: Pointer | None  # fp32 [S, K], confidences of older rounds
    seconds_ptr: Pointer | None  # fp32 [B_max+1], a step's by its rows
    draft_seconds_ptr: Pointer | None  # fp32 [R_max+1], drafting's by its requests
    budget_ptr: Pointer | None  # int32 [1]
    max_lens_ptr: Pointer | None  # int [R]


class ScheduleScratch(NamedTuple):
    """Values of drafts, int32 [REQUESTS DRAFTS] each, or None where SORT covers them."""

    older_ptr: Pointer | None
    stored_ptr: Pointer | None
    gathered_ptr: Pointer | None


class ScheduleStrides(NamedTuple):
    """Strides of what a schedule reads."""

    drafts: int
    confidence: int
    stale: int
    anchors: int
    positions: int
    block_tables: int


class StepCosts(NamedTuple):
    """What a step costs by the drafts it verifies."""

    seconds_ptr: Pointer  # fp32, at the entry of the step without drafts, or at the last
    left: int  # entries behind that one
    beyond: int  # entries by which the step without drafts lies beyond the table
    slope: int  # int64, what such an entry adds
    draft_seconds: float | None  # fp32, what drafting costs, whatever is verified, and what that adds beyond its table
    draft_beyond: int  # int64


class ScheduleTile(NamedTuple):
    """Padded sizes of a schedule, one constexpr."""

    REQUESTS: int
    LOG_REQUESTS: int
    DRAFTS: int
    LOG_DRAFTS: int
    SORT: int  # values that are sorted at once
    RUN: int  # of these, successive ranks that a thread tests
    LOG_RUN: int
    LOG_COLUMNS: int  # of SORT / RUN
    BLOCK: int  # rows of a program
