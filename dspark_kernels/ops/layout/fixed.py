"""fixed_layout, tree_layout, draft_layout: the packed rows of a forward pass, in one launch.

    row i of a request: its anchor (i = 0) or its draft i, at position anchor_position + i (in a tree: + depth of node i)

Oracle: reference/layout.py. Source: the ragged verification batch of DSpark, arXiv 2607.05147; tree rows: arXiv 2305.09781.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import library
from ...checks import INT_DTYPES, check_int, check_optional, check_tensor, check_type
from ...kernels.layout.args import DraftLayoutStrides, FixedStrides, LayoutInputs, LayoutOutputs
from ...launch import arch
from ...launch.layout import fixed as layout_launch
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
        num_prefill_tokens: int32 or int64 [R]; a request with any brings that many prompt rows (token ids 0, the engine fills
            them) instead of an anchor and drafts.
        emits: bool or int32 [R]; False = no logit row (a prefill chunk before the last).
        block_tables, page_size: int32 [S, max_pages] and the rows of a page: then slot_mapping is written.
        state_indices: int32 [R], state slot of each request, -1 = padding (no rows).
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
        _fixed_layout(
            draft_lens, block.tokens, None, anchors, anchor_positions, num_prefill_tokens, emits, block_tables, state_indices,
            *fields(out), page_size or 1,
        )  # fmt: skip
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
    anchor_position + m, because siblings share a position but no slot. Every row gives logits. draft_lens counts the nodes
    but the anchor.

    Args:
        tree: nodes [S, M]; node 0 is the anchor. num_nodes is clamped to [1, M] and cut before the first token below 0 (flag
            MISSING_DRAFT): parents come before their children, so what is left is a tree.
        max_rows: rows allocated; default R * M. Nodes that do not fit are cut, later requests first.
        anchor_positions and the others: as in `fixed_layout`, and so are the errors.
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
        _fixed_layout(
            tree.num_nodes, tree.tokens[:, 1:], tree.depths, tree.tokens[:, 0], anchor_positions, num_prefill_tokens, emits,
            block_tables, state_indices, *fields(out), page_size or 1,
        )  # fmt: skip
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

    anchor_first=True (DSpark): the anchor and K - 1 masks, every row predicts. anchor_first=False (DFlash): the anchor and K
    masks, only the masks predict. Row i sits at anchor_position + i. draft_lens and max_drafts count the masks, so that a
    request has draft_lens + 1 rows as in any layout; the logit rows are the K that predict.

    Args:
        anchors, anchor_positions: int64 or int32 [S]; an anchor below 0 is written as 0 (flag BAD_TOKEN_ID).
        block_size: K >= 1. mask_token_id: >= 0.
        The others, and the errors, as in `fixed_layout`.
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
        _draft_layout(
            anchors, anchor_positions, block_tables, state_indices, *fields(out), page_size or 1, masks, mask_token_id,
            int(not anchor_first),
        )  # fmt: skip
    return out


# --- what every layout checks and makes -------------------------------------------------------------------------------


def batch_rows(state_indices: Tensor | None, slots: int) -> int:
    """R: the rows of the batch, which are the state slots where nothing else is said."""
    if state_indices is None:
        return slots
    return check_tensor("state_indices", state_indices, dtype=torch.int32, shape=("R",)).shape[0]


def check_batch(
    slots, requests, device, anchor_positions, num_prefill_tokens, emits, block_tables, page_size, state_indices, workspace
):
    """Arguments that all layouts have. Raises TypeError or ValueError."""
    check_tensor("anchor_positions", anchor_positions, dtype=INT_DTYPES, shape=(slots,), device=device)
    per_request = dict(shape=(requests,), device=device, contiguous=True)
    check_optional("num_prefill_tokens", num_prefill_tokens, dtype=INT_DTYPES, **per_request)
    check_optional("emits", emits, dtype=(torch.bool, torch.int32), **per_request)
    check_optional("state_indices", state_indices, dtype=torch.int32, **per_request)
    check_optional("block_tables", block_tables, dtype=torch.int32, shape=(slots, "max_pages"), device=device, last_contiguous=True)
    if (block_tables is None) != (page_size is None):
        raise ValueError("page_size: expected together with block_tables, got only one of them")
    if page_size is not None:
        check_int("page_size", page_size, low=1, high=(1 << 31) - 1)
    if workspace is not None:
        check_type("workspace", workspace, Workspace)


def row_count(max_rows, requests, drafts, num_prefill_tokens, out) -> int:
    """Rows to allocate. Raises ValueError where the host cannot know."""
    if max_rows is None:
        if out is not None:
            return check_type("out", out, VerifyLayout).token_ids.shape[0]
        if num_prefill_tokens is not None:
            raise ValueError("max_rows: expected an int with num_prefill_tokens (prompt rows are counted on the device), got None")
        return requests * (drafts + 1)
    check_int("max_rows", max_rows, low=requests, high=(1 << 31) - 1)
    return max_rows


def output(out, requests, rows, drafts, mapped, device) -> VerifyLayout:
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
        if mapped:
            out.slot_mapping.fill_(-1)
    return out


def _allocate(requests, rows, drafts, mapped, device) -> VerifyLayout:
    def tensor(size, dtype=torch.int32):
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


def fields(out: VerifyLayout) -> tuple:
    """The tensors of a layout in the order of the ops' schemas (OUTPUTS)."""
    return (
        out.draft_lens, out.query_start_loc, out.cu_num_logits, out.token_ids, out.positions, out.batch_indices,
        out.slot_mapping, out.logits_indices, out.num_rows, out.flags,
    )  # fmt: skip


OUTPUTS = (
    "Tensor(a!) draft_lens, Tensor(b!) query_start_loc, Tensor(c!) cu_num_logits, Tensor(d!) token_ids, Tensor(e!) positions, "
    "Tensor(f!) batch_indices, Tensor(g!)? slot_mapping, Tensor(h!) logits_indices, Tensor(i!) num_rows, Tensor(j!) flags"
)


def pages(block_tables: Tensor | None) -> tuple[int, int]:
    """(pages of a request, stride between requests) as a kernel takes them."""
    return (0, 0) if block_tables is None else (block_tables.shape[1], block_tables.stride(0))


def padded(count: int, least: int = 1) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << max(0, count - 1).bit_length())


# --- the launches -----------------------------------------------------------------------------------------------------


@library.register(
    "fixed_layout(Tensor lens, Tensor drafts, Tensor? depths, Tensor anchors, Tensor anchor_positions, "
    "Tensor? num_prefill_tokens, Tensor? emits, Tensor? block_tables, Tensor? state_indices, " + OUTPUTS + ", int page_size) -> ()"
)
def _fixed_layout(
    lens, drafts, depths, anchors, anchor_positions, num_prefill_tokens, emits, block_tables, state_indices, draft_lens,
    query_start_loc, cu_num_logits, token_ids, positions, batch_indices, slot_mapping, logits_indices, num_rows, flags, page_size,
):  # fmt: skip
    kernels = library.kernels("layout.fixed", drafts.device)
    requests, rows = draft_lens.shape[0], token_ids.shape[0]
    config = layout_launch.pick(arch.current(drafts.device), requests)
    block = min(config.block, padded(rows))
    max_pages, stride_pages = pages(block_tables)
    kernels.launch_fixed_layout(
        -(-rows // block),
        (
            lens, drafts, depths,
            LayoutInputs(
                anchors_ptr=anchors, positions_ptr=anchor_positions, prefill_ptr=num_prefill_tokens, emits_ptr=emits,
                block_tables_ptr=block_tables, slots_ptr=state_indices,
            ),
            LayoutOutputs(
                draft_lens_ptr=draft_lens, query_start_ptr=query_start_loc, cu_logits_ptr=cu_num_logits, token_ids_ptr=token_ids,
                positions_ptr=positions, batch_indices_ptr=batch_indices, slot_mapping_ptr=slot_mapping,
                logits_indices_ptr=logits_indices, num_rows_ptr=num_rows, flags_ptr=flags,
            ),
            requests, drafts.shape[0], rows, drafts.shape[1], max_pages, page_size,
            FixedStrides(
                drafts=drafts.stride(0), depths=0 if depths is None else depths.stride(0), anchors=anchors.stride(0),
                positions=anchor_positions.stride(0), block_tables=stride_pages,
            ),
        ),
        log_requests=(requests - 1).bit_length(),
        drafts=padded(drafts.shape[1]),
        block=block,
        num_warps=config.num_warps,
    )  # fmt: skip


@library.register(
    "draft_layout(Tensor anchors, Tensor anchor_positions, Tensor? block_tables, Tensor? state_indices, "
    + OUTPUTS + ", int page_size, int masks, int mask_token_id, int silent_rows) -> ()"
)  # fmt: skip
def _draft_layout(
    anchors, anchor_positions, block_tables, state_indices, draft_lens, query_start_loc, cu_num_logits, token_ids, positions,
    batch_indices, slot_mapping, logits_indices, num_rows, flags, page_size, masks, mask_token_id, silent_rows,
):  # fmt: skip
    kernels = library.kernels("layout.fixed", anchors.device)
    requests, rows = draft_lens.shape[0], token_ids.shape[0]
    config = layout_launch.pick(arch.current(anchors.device), requests)
    block = min(config.block, padded(rows))
    max_pages, stride_pages = pages(block_tables)
    kernels.launch_draft_layout(
        -(-rows // block),
        (
            LayoutInputs(
                anchors_ptr=anchors, positions_ptr=anchor_positions, prefill_ptr=None, emits_ptr=None,
                block_tables_ptr=block_tables, slots_ptr=state_indices,
            ),
            LayoutOutputs(
                draft_lens_ptr=draft_lens, query_start_ptr=query_start_loc, cu_logits_ptr=cu_num_logits, token_ids_ptr=token_ids,
                positions_ptr=positions, batch_indices_ptr=batch_indices, slot_mapping_ptr=slot_mapping,
                logits_indices_ptr=logits_indices, num_rows_ptr=num_rows, flags_ptr=flags,
            ),
            requests, anchors.shape[0], rows, masks, max_pages, page_size, mask_token_id, silent_rows,
            DraftLayoutStrides(anchors=anchors.stride(0), positions=anchor_positions.stride(0), block_tables=stride_pages),
        ),
        log_requests=(requests - 1).bit_length(),
        block=block,
        num_warps=config.num_warps,
    )  # fmt: skip
