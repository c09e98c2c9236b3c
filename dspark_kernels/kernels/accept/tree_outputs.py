"""Every output of tree acceptance: the accepted path, the token after it, and which rows stay.

Symbols: R requests, M nodes of a tree, N forward rows. Reference: reference/tree.py.
"""

import triton
import triton.language as tl

from ..primitives.constants import BAD_TOKEN_ID, EMPTY_RESIDUAL, NAN, NONFINITE_ROW
from .outputs import token_log_probs
from .rows import pick, read_stats


@triton.jit
def write_outputs(
    request, last, parent, token, status, bad, empty, draft, forward, i, sampled, view, layout, outputs, raw, stats, scale, sizes,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Everything a request gets: the path up to `last`, then `token`. Per node [WIDTH]: parent, draft (its token), forward (its
    row), status of that row, bad (could not be accepted)."""
    length, num_nodes = view.length, sizes.num_drafts
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
    tl.store(outputs.tokens_ptr + base + rank - 1, draft.to(tl.int64), mask=kept & (rank > 0))
    tl.store(outputs.tokens_ptr + base + i, tl.where(i == accepted, token, -1).to(tl.int64), mask=(i >= accepted) & (i < num_nodes))
    nothing = tl.full([WIDTH], -1, tl.int32)
    tl.store(outputs.path_ptr + base + rank, i, mask=kept)
    tl.store(outputs.path_ptr + base + i, nothing, mask=behind)
    tl.store(outputs.source_ptr + base + rank, forward, mask=kept)
    tl.store(outputs.source_ptr + base + i, nothing, mask=behind)
    if outputs.log_probs_ptr is not None:
        # A node's token has its probability from its parent's row; what is drawn, from the last one's: lane 0 stands for it.
        giver = tl.where(i == 0, last, tl.where(kept, parent, 0))
        emitted = tl.where(i == 0, token.to(tl.int64), tl.where(kept, draft, 0).to(tl.int64))
        rows = (view.row0 + giver).to(tl.int64)
        given = read_stats(rows, kept, kept, raw, None, stats.row, False)
        log_probs = token_log_probs(giver, rows, emitted, kept, sampled == 0, view, raw, given, scale)
        tl.store(outputs.log_probs_ptr + base + tl.where(i == 0, accepted, rank - 1), log_probs, mask=kept)
        tl.store(outputs.log_probs_ptr + base + i, i * 0.0, mask=behind)
    flags = tl.where(tl.max(tl.where(kept, status & NAN, 0), axis=0) > 0, NAN, 0)
    flags |= pick(status & NONFINITE_ROW, last, i)
    flags |= tl.where(tl.max(tl.where(bad & (parent == last), 1, 0), axis=0) > 0, BAD_TOKEN_ID, 0)
    flags |= tl.where(empty > 0, EMPTY_RESIDUAL, 0)
    tl.store(outputs.accepted_ptr + request, accepted)
    tl.store(outputs.emitted_ptr + request, accepted + 1)
    tl.store(outputs.rejected_ptr + request, length - accepted)
    tl.store(outputs.next_token_ptr + request, token.to(tl.int64))
    tl.store(outputs.last_row_ptr + request, pick(forward, last, i))
    tl.store(outputs.flags_ptr + request, flags)
    root = pick(forward, 0, i)
    if outputs.anchors_ptr is not None:
        tl.store(outputs.anchors_ptr + view.slot * outputs.stride_anchors, token)
    if outputs.anchor_positions_ptr is not None:
        where = outputs.anchor_positions_ptr + view.slot * outputs.stride_anchor_positions
        tl.store(where, tl.load(layout.positions_ptr + root) + accepted + 1)
    # Rows before the anchor's are a prompt's and stay; rows of nodes that are not on the path go.
    tl.store(outputs.commit_ptr + forward, kept, mask=i <= length)
    start = tl.load(layout.query_start_ptr + request)
    end = tl.minimum(tl.load(layout.query_start_ptr + request + 1), sizes.num_forward)
    _fill(outputs.commit_ptr, start, tl.minimum(root, end), 1)
    _fill(outputs.commit_ptr, tl.maximum(root + length + 1, start), end, 0)
    if request == sizes.num_requests - 1:
        _fill(outputs.commit_ptr, end, sizes.num_forward, 0)


@triton.jit
def _fill(commit_ptr, start, end, value):
    for first in range(start, end, 128):
        row = first + tl.arange(0, 128)
        tl.store(commit_ptr + row, row * 0 + value != 0, mask=row < end)


@triton.jit
def write_no_outputs(request, slot, layout, outputs, sizes, WIDTH: tl.constexpr):
    """A request without logit rows (a prefill chunk keeps all its rows) or a padding row."""
    num_nodes = sizes.num_drafts
    i = tl.arange(0, WIDTH)
    base = request.to(tl.int64) * num_nodes
    tl.store(outputs.tokens_ptr + base + i, tl.full([WIDTH], -1, tl.int64), mask=i < num_nodes)
    tl.store(outputs.path_ptr + base + i, tl.full([WIDTH], -1, tl.int32), mask=i < num_nodes)
    tl.store(outputs.source_ptr + base + i, tl.full([WIDTH], -1, tl.int32), mask=i < num_nodes)
    if outputs.log_probs_ptr is not None:
        tl.store(outputs.log_probs_ptr + base + i, i * 0.0, mask=i < num_nodes)
    tl.store(outputs.accepted_ptr + request, 0)
    tl.store(outputs.emitted_ptr + request, 0)
    tl.store(outputs.rejected_ptr + request, 0)
    tl.store(outputs.next_token_ptr + request, tl.full((), -1, tl.int64))
    tl.store(outputs.last_row_ptr + request, 0)
    tl.store(outputs.flags_ptr + request, 0)
    start = tl.load(layout.query_start_ptr + request)
    end = tl.minimum(tl.load(layout.query_start_ptr + request + 1), sizes.num_forward)
    _fill(outputs.commit_ptr, start, end, tl.where(slot >= 0, 1, 0))
    if request == sizes.num_requests - 1:
        _fill(outputs.commit_ptr, end, sizes.num_forward, 0)
