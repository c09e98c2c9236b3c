"""fixed_layout, tree_layout, draft_layout: the packed rows of a forward pass, in one launch.

    row i of a request: its anchor (i = 0) or its draft i, at position anchor_position + i (in a tree: + depth of node i)

Reference: reference/layout.py. Source: the ragged verification batch of DSpark, arXiv 2607.05147; tree rows: arXiv 2305.09781.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import library
from ...checks import INT_DTYPES, check_int, check_optional, check_tensor, check_type
from ...kernels.layout.args import DraftLayoutStrides, FixedStrides, LayoutInputs, LayoutOutputs
from ...launch import arch
from ...launch.layout import fixed as layout_launch
from ...library import Out
from ...types import DraftBlock, DraftTree, VerifyLayout
from ...workspace import Workspace


def fixed_layout(
    block: DraftBlock,
    draft_lens: Tensor,
    *,
    anchors: Tensor,
    anchor_positions: Tensor,
    max_rows: int | None = None,
    num_prefill_tokens: Tensor | None = None,
    emits: Tensor | None = None,
    block_tables: Tensor | None = None,
    page_size: int | None = None,
    state_indices: Tensor | None = None,
    out: VerifyLayout | None = None,
    workspace: Workspace | None = None,
) -> VerifyLayout:
    """Pack the anchor and the first draft_lens[r] drafts of every request into rows, in one launch.

    Args:
        block: drafts [S, K].
        draft_lens: int32 or int64 [R], clamped to [0, K] and cut before the first draft below 0 (flag MISSING_DRAFT).
        anchors, anchor_positions: int64 or int32 [S], last emitted token and its absolute position.
        max_rows: rows allocated (a graph bucket); default R * (K + 1). Drafts that do not fit are cut, later requests first.
        num_prefill_tokens: int32 or int64 [R]; where it is above 0, the request has that many prompt rows instead of an anchor and
            drafts. Their token ids are 0: the engine fills them in.
        emits: bool or int32 [R]; False = no logit row (a prefill chunk before the last).
        block_tables, page_size: int32 [S, max_pages] and the cache slots of a page; with both, slot_mapping is written.
        state_indices: int32 or int64 [R], request slot of each request, -1 = padding (no rows).
        out: a VerifyLayout to write; nothing else is allocated.
        workspace: accepted for uniformity; this op needs no scratch memory.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or stride.
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    check_type("block", block, DraftBlock)
    slots, drafts = block.tokens.shape
    device = block.tokens.device
    check_tensor("draft_lens", draft_lens, dtype=INT_DTYPES, shape=("R",), device=device, contiguous=True)
    requests = draft_lens.shape[0]
    if state_indices is None and slots != requests:
        raise ValueError(f"block.tokens: expected {requests} rows (one per request, no state_indices), got {slots}")
    check_tensor("anchors", anchors, dtype=INT_DTYPES, shape=(slots,), device=device)
    check_batch(
        slots, requests, device, anchor_positions, num_prefill_tokens, emits, block_tables, page_size, state_indices, workspace
    )
    rows = row_count(max_rows, requests, drafts, num_prefill_tokens, out)
    out = output(out, requests, rows, drafts, block_tables is not None, device)
    if requests:
        arguments = FixedArguments(
            lens=draft_lens,
            drafts=block.tokens,
            depths=None,
            requests=Requests(anchors, anchor_positions, num_prefill_tokens, emits, block_tables, state_indices),
            packed=packed_of(out),
            page_size=page_size or 1,
        )
        _fixed_layout(arguments)
    return out


def tree_layout(
    tree: DraftTree,
    *,
    anchor_positions: Tensor,
    max_rows: int | None = None,
    num_prefill_tokens: Tensor | None = None,
    emits: Tensor | None = None,
    block_tables: Tensor | None = None,
    page_size: int | None = None,
    state_indices: Tensor | None = None,
    out: VerifyLayout | None = None,
    workspace: Workspace | None = None,
) -> VerifyLayout:
    """Pack the nodes of every request's draft tree into rows, in one launch.

    Row m of a request is node m of its tree, at anchor_position + depth of m; its keys and values go to the cache slot of
    anchor_position + m, because siblings share a position but not a cache slot. Every row gives logits. draft_lens counts the
    nodes without the anchor.

    Args:
        tree: nodes [S, M]; node 0 is the anchor. num_nodes is clamped to [1, M] and cut before the first token below 0 (flag
            MISSING_DRAFT). Parents come before their children, so the remaining nodes form a tree.
        max_rows: rows allocated; default R * M. Nodes that do not fit are cut, later requests first.
        The other arguments, and the errors: as in `fixed_layout`.
    """
    check_type("tree", tree, DraftTree)
    slots, nodes = tree.tokens.shape
    device = tree.tokens.device
    if nodes < 1:
        raise ValueError("tree.tokens: expected at least 1 node (the anchor), got 0")
    requests = batch_rows(state_indices, slots)
    check_batch(
        slots, requests, device, anchor_positions, num_prefill_tokens, emits, block_tables, page_size, state_indices, workspace
    )
    rows = row_count(max_rows, requests, nodes - 1, num_prefill_tokens, out)
    out = output(out, requests, rows, nodes - 1, block_tables is not None, device)
    if requests:
        arguments = FixedArguments(
            lens=tree.num_nodes,
            drafts=tree.tokens[:, 1:],
            depths=tree.depths,
            requests=Requests(tree.tokens[:, 0], anchor_positions, num_prefill_tokens, emits, block_tables, state_indices),
            packed=packed_of(out),
            page_size=page_size or 1,
        )
        _fixed_layout(arguments)
    return out


def draft_layout(
    anchors: Tensor,
    anchor_positions: Tensor,
    *,
    block_size: int,
    mask_token_id: int,
    anchor_first: bool = True,
    block_tables: Tensor | None = None,
    page_size: int | None = None,
    state_indices: Tensor | None = None,
    out: VerifyLayout | None = None,
    workspace: Workspace | None = None,
) -> VerifyLayout:
    """Rows of the drafter's own block of K = block_size drafts, in one launch.

    anchor_first=True (DSpark): the anchor and K - 1 mask tokens; every row predicts a draft. anchor_first=False (DFlash): the
    anchor and K mask tokens; only the mask rows predict. Row i has the position anchor_position + i. draft_lens and max_drafts
    count the mask tokens, so a request has draft_lens + 1 rows as in any layout. The logit rows are the K rows that predict.

    Args:
        anchors, anchor_positions: int64 or int32 [S]; an anchor below 0 is written as 0 (flag BAD_TOKEN_ID).
        block_size: K >= 1.
        mask_token_id: token id of the mask rows, >= 0.
        The other arguments, and the errors: as in `fixed_layout`.
    """
    check_int("block_size", block_size, low=1)
    check_int("mask_token_id", mask_token_id, low=0, high=(1 << 31) - 1)
    check_tensor("anchors", anchors, dtype=INT_DTYPES, shape=("S",))
    slots, device = anchors.shape[0], anchors.device
    requests = batch_rows(state_indices, slots)
    check_batch(slots, requests, device, anchor_positions, None, None, block_tables, page_size, state_indices, workspace)
    masks = block_size - 1 if anchor_first else block_size
    out = output(out, requests, requests * (masks + 1), masks, block_tables is not None, device)
    if requests:
        arguments = DraftArguments(
            anchors=anchors,
            anchor_positions=anchor_positions,
            block_tables=block_tables,
            state_indices=state_indices,
            packed=packed_of(out),
            page_size=page_size or 1,
            masks=masks,
            mask_token_id=mask_token_id,
            silent_rows=int(not anchor_first),
        )
        _draft_layout(arguments)
    return out


# --- what every layout checks and makes -------------------------------------------------------------------------------


def batch_rows(state_indices: Tensor | None, slots: int) -> int:
    """R: the rows of the batch; without `state_indices` the request slots."""
    if state_indices is None:
        return slots
    return check_tensor("state_indices", state_indices, dtype=INT_DTYPES, shape=("R",)).shape[0]


def check_batch(
    slots: int,
    requests: int,
    device: torch.device,
    anchor_positions: Tensor,
    num_prefill_tokens: Tensor | None,
    emits: Tensor | None,
    block_tables: Tensor | None,
    page_size: int | None,
    state_indices: Tensor | None,
    workspace: Workspace | None,
) -> None:
    """Arguments that all layouts have. Raises TypeError or ValueError."""
    check_tensor("anchor_positions", anchor_positions, dtype=INT_DTYPES, shape=(slots,), device=device)
    per_request: dict[str, Any] = dict(shape=(requests,), device=device, contiguous=True)
    check_optional("num_prefill_tokens", num_prefill_tokens, dtype=INT_DTYPES, **per_request)
    check_optional("emits", emits, dtype=(torch.bool, torch.int32), **per_request)
    check_optional("state_indices", state_indices, dtype=INT_DTYPES, **per_request)
    check_optional("block_tables", block_tables, dtype=torch.int32, shape=(slots, "max_pages"), device=device, last_contiguous=True)
    if (block_tables is None) != (page_size is None):
        raise ValueError("page_size: expected together with block_tables, got only one of them")
    if page_size is not None:
        check_int("page_size", page_size, low=1, high=(1 << 31) - 1)
    if workspace is not None:
        check_type("workspace", workspace, Workspace)


def row_count(max_rows: int | None, requests: int, drafts: int, num_prefill_tokens: Tensor | None, out: VerifyLayout | None) -> int:
    """Rows to allocate. Raises ValueError where the host cannot know the number."""
    if max_rows is None:
        if out is not None:
            return check_type("out", out, VerifyLayout).token_ids.shape[0]
        if num_prefill_tokens is not None:
            raise ValueError("max_rows: expected an int with num_prefill_tokens (prompt rows are counted on the device), got None")
        return requests * (drafts + 1)
    check_int("max_rows", max_rows, low=requests, high=(1 << 31) - 1)
    return max_rows


def output(out: VerifyLayout | None, requests: int, rows: int, drafts: int, mapped: bool, device: torch.device) -> VerifyLayout:
    """The caller's layout, checked, or a new one. Without requests nothing is launched: its values come from here."""
    if out is None:
        out = _allocate(requests, rows, drafts, mapped, device)
    else:
        check_type("out", out, VerifyLayout)
        check_tensor("out.draft_lens", out.draft_lens, shape=(requests,), device=device)
        check_tensor("out.token_ids", out.token_ids, shape=(rows,))
        if rows < requests:
            raise ValueError(f"out.token_ids: expected at least {requests} rows (one per request), got {rows}")
        if out.max_drafts != drafts:
            raise ValueError(f"out.max_drafts: expected {drafts}, got {out.max_drafts}")
        check_tensor("out.logits_indices", out.logits_indices, shape=(rows,))
        if mapped != (out.slot_mapping is not None):
            raise ValueError(f"out.slot_mapping: expected {'a tensor' if mapped else 'None'}, as block_tables decides")
    if requests == 0:
        for zero in (out.query_start_loc, out.cu_num_logits, out.num_rows, out.token_ids, out.positions, out.logits_indices):
            zero.zero_()
        out.batch_indices.fill_(-1)
        if out.slot_mapping is not None:
            out.slot_mapping.fill_(-1)
    return out


def _allocate(requests: int, rows: int, drafts: int, mapped: bool, device: torch.device) -> VerifyLayout:
    def tensor(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    return VerifyLayout(
        draft_lens=tensor(requests),
        query_start_loc=tensor(requests + 1),
        cu_num_logits=tensor(requests + 1),
        token_ids=tensor(rows, torch.int64),
        positions=tensor(rows, torch.int64),
        batch_indices=tensor(rows),
        logits_indices=tensor(rows),
        num_rows=tensor(1),
        flags=tensor(requests),
        slot_mapping=tensor(rows, torch.int64) if mapped else None,
        max_drafts=drafts,
    )


def pages(block_tables: Tensor | None) -> tuple[int, int]:
    """(pages of a request, stride between requests) as a kernel takes them."""
    return (0, 0) if block_tables is None else (block_tables.shape[1], block_tables.stride(0))


def padded(count: int, least: int = 1) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << max(0, count - 1).bit_length())


# --- the launches -----------------------------------------------------------------------------------------------------


class Requests(NamedTuple):
    """The per-request inputs of a layout, as torch.library knows them."""

    anchors: Tensor
    anchor_positions: Tensor
    num_prefill_tokens: Tensor | None
    emits: Tensor | None
    block_tables: Tensor | None
    state_indices: Tensor | None

    def inputs(self) -> LayoutInputs:
        return LayoutInputs(
            anchors_ptr=self.anchors, positions_ptr=self.anchor_positions, prefill_ptr=self.num_prefill_tokens,
            emits_ptr=self.emits, block_tables_ptr=self.block_tables, slots_ptr=self.state_indices,
        )  # fmt: skip


class Packed(NamedTuple):
    """The tensors of a VerifyLayout, as torch.library knows them."""

    draft_lens: Out[Tensor]
    query_start_loc: Out[Tensor]
    cu_num_logits: Out[Tensor]
    token_ids: Out[Tensor]
    positions: Out[Tensor]
    batch_indices: Out[Tensor]
    slot_mapping: Out[Tensor | None]
    logits_indices: Out[Tensor]
    num_rows: Out[Tensor]
    flags: Out[Tensor]

    def outputs(self) -> LayoutOutputs:
        return LayoutOutputs(
            draft_lens_ptr=self.draft_lens, query_start_ptr=self.query_start_loc, cu_logits_ptr=self.cu_num_logits,
            token_ids_ptr=self.token_ids, positions_ptr=self.positions, batch_indices_ptr=self.batch_indices,
            slot_mapping_ptr=self.slot_mapping, logits_indices_ptr=self.logits_indices, num_rows_ptr=self.num_rows,
            flags_ptr=self.flags,
        )  # fmt: skip


def packed_of(out: VerifyLayout) -> Packed:
    return Packed(**{name: getattr(out, name) for name in Packed._fields})


class FixedArguments(NamedTuple):
    """`fixed_layout` as torch.library knows it."""

    lens: Tensor
    drafts: Tensor
    depths: Tensor | None
    requests: Requests
    packed: Packed
    page_size: int


@library.register("fixed_layout", FixedArguments)
def _fixed_layout(a: FixedArguments) -> None:
    device, given, packed = a.drafts.device, a.requests, a.packed
    kernels = library.kernels("layout.fixed", device)
    requests, rows = packed.draft_lens.shape[0], packed.token_ids.shape[0]
    config = layout_launch.pick(arch.current(device), requests, rows)
    max_pages, stride_pages = pages(given.block_tables)
    kernels.launch_fixed_layout(
        -(-rows // config.block),
        (
            a.lens, a.drafts, a.depths, given.inputs(), packed.outputs(),
            requests, a.drafts.shape[0], rows, a.drafts.shape[1], max_pages, a.page_size,
            FixedStrides(
                drafts=a.drafts.stride(0), depths=0 if a.depths is None else a.depths.stride(0), anchors=given.anchors.stride(0),
                positions=given.anchor_positions.stride(0), block_tables=stride_pages,
            ),
        ),
        log_requests=(requests - 1).bit_length(),
        drafts=padded(a.drafts.shape[1]),
        config=config,
    )  # fmt: skip


class DraftArguments(NamedTuple):
    """`draft_layout` as torch.library knows it."""

    anchors: Tensor
    anchor_positions: Tensor
    block_tables: Tensor | None
    state_indices: Tensor | None
    packed: Packed
    page_size: int
    masks: int
    mask_token_id: int
    silent_rows: int


@library.register("draft_layout", DraftArguments)
def _draft_layout(a: DraftArguments) -> None:
    device, packed = a.anchors.device, a.packed
    kernels = library.kernels("layout.fixed", device)
    requests, rows = packed.draft_lens.shape[0], packed.token_ids.shape[0]
    config = layout_launch.pick(arch.current(device), requests, rows)
    max_pages, stride_pages = pages(a.block_tables)
    kernels.launch_draft_layout(
        -(-rows // config.block),
        (
            Requests(a.anchors, a.anchor_positions, None, None, a.block_tables, a.state_indices).inputs(), packed.outputs(),
            requests, a.anchors.shape[0], rows, a.masks, max_pages, a.page_size, a.mask_token_id, a.silent_rows,
            DraftLayoutStrides(anchors=a.anchors.stride(0), positions=a.anchor_positions.stride(0), block_tables=stride_pages),
        ),
        log_requests=(requests - 1).bit_length(),
        config=config,
    )  # fmt: skip
