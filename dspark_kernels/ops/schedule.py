"""fixed_layout: the rows of the target's forward pass for draft lengths chosen elsewhere, in one launch.

Oracle: reference/schedule.py. Source: the ragged layout of DSpark's verification step, arXiv 2607.05147.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import library
from ..checks import INT_DTYPES, check_int, check_optional, check_tensor, check_type
from ..launch import arch, schedule as schedule_launch
from ..types import DraftBlock, VerifyLayout
from ..workspace import Workspace


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
    check_tensor("anchor_positions", anchor_positions, dtype=INT_DTYPES, shape=(slots,), device=device)
    per_request = dict(shape=(requests,), device=device, contiguous=True)
    check_optional("num_prefill_tokens", num_prefill_tokens, dtype=INT_DTYPES, **per_request)
    check_optional("emits", emits, dtype=(torch.bool, torch.int32), **per_request)
    check_optional("state_indices", state_indices, dtype=torch.int32, **per_request)
    check_optional("block_tables", block_tables, dtype=torch.int32, shape=(slots, "max_pages"), device=device, last_contiguous=True)
    if (block_tables is None) != (page_size is None):
        raise ValueError("page_size: expected together with block_tables, got only one of them")
    if page_size is not None:
        check_int("page_size", page_size, low=1)
    if workspace is not None:
        check_type("workspace", workspace, Workspace)
    rows = _row_count(max_rows, requests, drafts, num_prefill_tokens, out)
    if out is None:
        out = _allocate(requests, rows, drafts, block_tables is not None, device)
    else:
        _check_out(out, requests, rows, block_tables is not None, device)
    if requests == 0:
        for offsets in (out.query_start_loc, out.cu_num_logits, out.num_rows):
            offsets.zero_()
        return out
    _fixed_layout(
        draft_lens,
        block.tokens,
        anchors,
        anchor_positions,
        num_prefill_tokens,
        emits,
        block_tables,
        state_indices,
        out.draft_lens,
        out.query_start_loc,
        out.cu_num_logits,
        out.token_ids,
        out.positions,
        out.batch_indices,
        out.slot_mapping,
        out.logits_indices,
        out.num_rows,
        out.flags,
        page_size or 1,
    )
    return out


def _row_count(max_rows, requests, drafts, num_prefill_tokens, out) -> int:
    if max_rows is None:
        if out is not None:
            return out.token_ids.shape[0]
        if num_prefill_tokens is not None:
            raise ValueError("max_rows: expected an int with num_prefill_tokens (prompt rows are counted on the device), got None")
        return requests * (drafts + 1)
    check_int("max_rows", max_rows, low=requests)
    return max_rows


def _allocate(requests, rows, drafts, mapped, device) -> VerifyLayout:
    # Without requests nothing is launched: padding values then come from here.
    new = torch.empty if requests else torch.zeros

    def tensor(size, dtype=torch.int32):
        return new(size, dtype=dtype, device=device)

    def padding(dtype):
        return tensor(rows, dtype) if requests else torch.full((rows,), -1, dtype=dtype, device=device)

    return VerifyLayout(
        draft_lens=tensor(requests),
        query_start_loc=tensor(requests + 1),
        cu_num_logits=tensor(requests + 1),
        token_ids=tensor(rows, torch.int64),
        positions=tensor(rows, torch.int64),
        batch_indices=padding(torch.int32),
        logits_indices=tensor(rows),
        num_rows=tensor(1),
        flags=tensor(requests),
        slot_mapping=padding(torch.int64) if mapped else None,
        max_drafts=drafts,
    )


def _check_out(out, requests, rows, mapped, device):
    check_type("out", out, VerifyLayout)
    check_tensor("out.draft_lens", out.draft_lens, shape=(requests,), device=device)
    check_tensor("out.token_ids", out.token_ids, shape=(rows,))
    check_tensor("out.logits_indices", out.logits_indices, shape=(rows,))
    if mapped != (out.slot_mapping is not None):
        raise ValueError(f"out.slot_mapping: expected {'a tensor' if mapped else 'None'}, as block_tables decides")


@library.register(
    "fixed_layout(Tensor draft_lens, Tensor drafts, Tensor anchors, Tensor anchor_positions, Tensor? num_prefill_tokens, "
    "Tensor? emits, Tensor? block_tables, Tensor? state_indices, Tensor(a!) out_draft_lens, Tensor(b!) query_start_loc, "
    "Tensor(c!) cu_num_logits, Tensor(d!) token_ids, Tensor(e!) positions, Tensor(f!) batch_indices, Tensor(g!)? slot_mapping, "
    "Tensor(h!) logits_indices, Tensor(i!) num_rows, Tensor(j!) flags, int page_size) -> ()"
)
def _fixed_layout(
    draft_lens, drafts, anchors, anchor_positions, num_prefill_tokens, emits, block_tables, state_indices, out_draft_lens,
    query_start_loc, cu_num_logits, token_ids, positions, batch_indices, slot_mapping, logits_indices, num_rows, flags, page_size,
):  # fmt: skip
    device = draft_lens.device
    kernels = library.kernels("schedule", device)
    requests, rows = draft_lens.shape[0], token_ids.shape[0]
    log_requests = (requests - 1).bit_length()
    config = schedule_launch.pick(arch.current(device), requests)
    block = min(config.block, max(1, 1 << (rows - 1).bit_length()))
    kernels.launch_fixed_layout(
        -(-rows // block),
        (
            draft_lens, drafts, anchors, anchor_positions, num_prefill_tokens, emits, block_tables, state_indices,
            out_draft_lens, query_start_loc, cu_num_logits, token_ids, positions, batch_indices, slot_mapping, logits_indices,
            num_rows, flags, requests, drafts.shape[0], rows, drafts.shape[1],
            0 if block_tables is None else block_tables.shape[1], page_size,
            drafts.stride(0), anchors.stride(0), anchor_positions.stride(0),
            0 if block_tables is None else block_tables.stride(0),
        ),
        log_requests=log_requests,
        drafts=1 << (drafts.shape[1] - 1).bit_length(),
        block=block,
        num_warps=config.num_warps,
    )  # fmt: skip
