"""Every output of tree acceptance: the accepted path, the token after it, and which rows stay.

Symbols: R requests, M nodes of a tree, N forward rows. Oracle: reference/tree.py.
"""

import triton
import triton.language as tl

from .outputs import token_log_probs
from .rows import BAD_TOKEN_ID, EMPTY_RESIDUAL, NAN, NONFINITE_ROW
from .tree_proposals import pick


@triton.jit
def emit(
    request, row0, length, last, parent, token, status, bad, empty, draft, forward, i, sampled, view, layout, outputs, raw_memory,
    records, scale, num_requests, num_forward, num_nodes, WIDTH: tl.constexpr,
):  # fmt: skip
    """Everything a request gets: the path up to `last`, then `token`. Per node [WIDTH]: parent, draft (its token), forward (its
    row), status of that row, bad (could not be accepted)."""
    tokens_ptr, accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr, commit_ptr, flags_ptr, log_probs_ptr = outputs[0]
    anchors_ptr, stride_a, anchor_positions_ptr, stride_p = outputs[1]
    path_ptr, source_ptr = outputs[2]
    query_start_ptr, _, _, _, positions_ptr = layout
    _, _, _, _, _, _, _, slot, _, _ = view
    on_path = tl.where(i == last, 1, 0)
    node = last
    while node > 0:
        node = tl.minimum(pick(parent, node, i), node - 1)
        on_path = tl.where(i == node, 1, on_path)
    rank = tl.cumsum(on_path, axis=0) - 1
    accepted = tl.sum(on_path, axis=0) - 1
    kept = on_path > 0
    base = request.to(tl.int64) * num_nodes
    behind = (i > accepted) & (i < num_nodes)
    tl.store(tokens_ptr + base + rank - 1, draft.to(tl.int64), mask=kept & (rank > 0))
    tl.store(tokens_ptr + base + i, tl.where(i == accepted, token, -1).to(tl.int64), mask=(i >= accepted) & (i < num_nodes))
    nothing = tl.full([WIDTH], -1, tl.int32)
    tl.store(path_ptr + base + rank, i, mask=kept)
    tl.store(path_ptr + base + i, nothing, mask=behind)
    tl.store(source_ptr + base + rank, forward, mask=kept)
    tl.store(source_ptr + base + i, nothing, mask=behind)
    if log_probs_ptr is not None:
        # A node's token has its probability from its parent's row; what is drawn, from the last one's: lane 0 stands for it.
        row_values_ptr, row_ids_ptr, _, _ = records
        judge = tl.where(i == 0, last, tl.where(kept, parent, 0))
        emitted = tl.where(i == 0, token.to(tl.int64), tl.where(kept, draft, 0).to(tl.int64))
        log_probs = token_log_probs(judge, (row0 + judge).to(tl.int64), emitted, kept, sampled == 0, view, raw_memory,
                                    row_values_ptr, row_ids_ptr, scale)  # fmt: skip
        tl.store(log_probs_ptr + base + tl.where(i == 0, accepted, rank - 1), log_probs, mask=kept)
        tl.store(log_probs_ptr + base + i, i * 0.0, mask=behind)
    flags = tl.where(tl.max(tl.where(kept, status & NAN, 0), axis=0) > 0, NAN, 0)
    flags |= pick(status & NONFINITE_ROW, last, i)
    flags |= tl.where(tl.max(tl.where(bad & (parent == last), 1, 0), axis=0) > 0, BAD_TOKEN_ID, 0)
    flags |= tl.where(empty > 0, EMPTY_RESIDUAL, 0)
    tl.store(accepted_ptr + request, accepted)
    tl.store(emitted_ptr + request, accepted + 1)
    tl.store(rejected_ptr + request, length - accepted)
    tl.store(next_ptr + request, token.to(tl.int64))
    tl.store(last_row_ptr + request, pick(forward, last, i))
    tl.store(flags_ptr + request, flags)
    root = pick(forward, 0, i)
    if anchors_ptr is not None:
        tl.store(anchors_ptr + slot * stride_a, token)
    if anchor_positions_ptr is not None:
        tl.store(anchor_positions_ptr + slot * stride_p, tl.load(positions_ptr + root) + accepted + 1)
    # Rows before the anchor's are a prompt's and stay; rows of nodes that are not on the path go.
    tl.store(commit_ptr + forward, kept, mask=i <= length)
    start = tl.load(query_start_ptr + request)
    end = tl.minimum(tl.load(query_start_ptr + request + 1), num_forward)
    _fill(commit_ptr, start, tl.minimum(root, end), 1)
    _fill(commit_ptr, tl.maximum(root + length + 1, start), end, 0)
    if request == num_requests - 1:
        _fill(commit_ptr, end, num_forward, 0)


@triton.jit
def _fill(commit_ptr, start, end, value):
    for first in range(start, end, 128):
        row = first + tl.arange(0, 128)
        tl.store(commit_ptr + row, row * 0 + value != 0, mask=row < end)


@triton.jit
def emit_nothing(request, slot, layout, outputs, num_requests, num_forward, num_nodes, WIDTH: tl.constexpr):
    """A request without logit rows (a prefill chunk keeps all its rows) or a padding row."""
    tokens_ptr, accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr, commit_ptr, flags_ptr, log_probs_ptr = outputs[0]
    path_ptr, source_ptr = outputs[2]
    query_start_ptr, _, _, _, _ = layout
    i = tl.arange(0, WIDTH)
    base = request.to(tl.int64) * num_nodes
    tl.store(tokens_ptr + base + i, tl.full([WIDTH], -1, tl.int64), mask=i < num_nodes)
    tl.store(path_ptr + base + i, tl.full([WIDTH], -1, tl.int32), mask=i < num_nodes)
    tl.store(source_ptr + base + i, tl.full([WIDTH], -1, tl.int32), mask=i < num_nodes)
    if log_probs_ptr is not None:
        tl.store(log_probs_ptr + base + i, i * 0.0, mask=i < num_nodes)
    tl.store(accepted_ptr + request, 0)
    tl.store(emitted_ptr + request, 0)
    tl.store(rejected_ptr + request, 0)
    tl.store(next_ptr + request, tl.full((), -1, tl.int64))
    tl.store(last_row_ptr + request, 0)
    tl.store(flags_ptr + request, 0)
    start = tl.load(query_start_ptr + request)
    end = tl.minimum(tl.load(query_start_ptr + request + 1), num_forward)
    _fill(commit_ptr, start, end, tl.where(slot >= 0, 1, 0))
    if request == num_requests - 1:
        _fill(commit_ptr, end, num_forward, 0)
