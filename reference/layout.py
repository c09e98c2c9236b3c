"""The packed rows of a forward pass: which token sits where, for chains, trees and the drafter's own block, in plain Python.

    row i of a request: its anchor (i = 0) or its draft i, at position anchor_position + i (in a tree: + depth of node i)

Symbols: R requests, S request slots, K drafts per request, M tree nodes, N rows allocated. Keys and values of row i go to
the cache slot of anchor_position + i, in a tree too: siblings share a position but not a cache slot.

Source of the ragged verification batch: "DSpark: Confidence-Scheduled Speculative Decoding with Semi-Autoregressive
Generation", arXiv 2607.05147; tree rows: SpecInfer, arXiv 2305.09781.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dspark_kernels.types import DraftBlock, DraftTree, Flag, VerifyLayout


@dataclasses.dataclass(frozen=True)
class Request:
    """One batch row as the host sees it."""

    slot: int | None  # None: a padding row of the batch
    anchor: int = 0
    position: int = 0
    prefill: int = 0
    emits: bool = True
    drafts: tuple[int, ...] = ()

    @property
    def fixed_rows(self) -> int:
        return 0 if self.slot is None else self.prefill or 1

    @property
    def takes_drafts(self) -> bool:
        return self.slot is not None and self.prefill == 0 and self.emits


def refuse_buffers(out, workspace):
    for name, value in (("out", out), ("workspace", workspace)):
        if value is not None:
            raise ValueError(f"{name}: expected None (the reference allocates its results), got {type(value).__name__}")


def refuse_lone_anchors(anchors: Tensor | None, anchor_positions: Tensor | None) -> None:
    """The random numbers of a round follow from its anchor's position, so tokens and positions advance together."""
    if (anchors is None) != (anchor_positions is None):
        raise ValueError("anchors, anchor_positions: expected both or neither, got one of them")


def slots_of(state_indices: Tensor | None, batch_rows: int, state_slots: int) -> list[int | None]:
    if state_indices is None:
        return list(range(batch_rows))
    return [slot if 0 <= slot < state_slots else None for slot in state_indices.tolist()]


def read_requests(tokens, anchors, anchor_positions, slots, num_prefill_tokens, emits) -> list[Request]:
    rows = len(slots)
    ids, positions, drafts = anchors.tolist(), anchor_positions.tolist(), tokens.tolist()
    prefill = [0] * rows if num_prefill_tokens is None else [max(0, n) for n in num_prefill_tokens.tolist()]
    emitting = [True] * rows if emits is None else [bool(e) for e in emits.tolist()]
    return [
        Request(None)
        if slot is None
        else Request(slot, ids[slot], positions[slot], prefill[row], emitting[row], tuple(drafts[slot]))
        for row, slot in enumerate(slots)
    ]


def present(request: Request, length: int) -> tuple[int, int]:
    """`length` cut before the first missing draft, and the flag of a cut."""
    for k, token in enumerate(request.drafts[:length]):
        if token < 0:
            return k, int(Flag.MISSING_DRAFT)
    return length, 0


@dataclasses.dataclass
class RequestRows:
    """Forward rows of one request, and which of them give logits. Without depths they sit at consecutive positions."""

    slot: int | None
    position: int
    ids: list[int]
    logit_rows: range
    draft_len: int
    flags: int
    depths: list[int] | None = None


def assemble(rows: list[RequestRows], capacity, max_drafts, device, block_tables, page_size) -> VerifyLayout:
    """Pack the rows of all requests, in batch order, into `capacity` rows."""
    if (block_tables is None) != (page_size is None):
        raise ValueError("page_size: expected together with block_tables, got one of the two")
    if page_size is not None and page_size < 1:
        raise ValueError(f"page_size: expected >= 1, got {page_size}")
    tables = None if block_tables is None else block_tables.tolist()
    starts, logit_starts, ids, positions, owners, mapping, logits = [0], [0], [], [], [], [], []
    for index, part in enumerate(rows):
        logits += [len(ids) + local for local in part.logit_rows]
        where = range(part.position, part.position + len(part.ids))
        ids += part.ids
        positions += where if part.depths is None else [part.position + depth for depth in part.depths]
        owners += [index] * len(part.ids)
        if tables is not None:
            mapping += [_cache_slot(tables[part.slot], position, page_size) for position in where]
        starts.append(len(ids))
        logit_starts.append(len(logits))

    def packed(values, fill, dtype):
        return torch.tensor(values + [fill] * (capacity - len(values)), dtype=dtype, device=device)

    def per_request(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    return VerifyLayout(
        draft_lens=per_request([part.draft_len for part in rows]),
        query_start_loc=per_request(starts),
        cu_num_logits=per_request(logit_starts),
        token_ids=packed(ids, 0, torch.int64),
        positions=packed(positions, 0, torch.int64),
        batch_indices=packed(owners, -1, torch.int32),
        logits_indices=packed(logits, 0, torch.int32),
        num_rows=per_request([len(ids)]),
        flags=per_request([part.flags for part in rows]),
        slot_mapping=None if tables is None else packed(mapping, -1, torch.int64),
        max_drafts=max_drafts,
    )


def _cache_slot(table: list[int], position: int, page_size: int) -> int:
    """Cache slot of a position; -1 (write nothing) where the block table has no page for it."""
    page = position // page_size
    if not 0 <= page < len(table) or table[page] < 0:
        return -1
    return table[page] * page_size + position % page_size


def verify_rows(requests: list[Request], lengths: list[int], flags: list[int], capacity: int) -> list[RequestRows]:
    """Rows of every request within `capacity`: anchor and prefill rows of all, then drafts, each in batch order."""
    left = capacity

    def take(wanted):
        nonlocal left
        given = min(wanted, left)
        left -= given
        return given

    fixed = [take(request.fixed_rows) for request in requests]
    parts = []
    for request, have, length, flag in zip(requests, fixed, lengths, flags, strict=True):
        ids, logit_rows, drafts = [0] * have, range(0), 0
        if request.prefill:
            # A prefill that was cut short has no last token to continue from.
            if request.emits and have == request.prefill:
                logit_rows = range(have - 1, have)
        elif request.slot is not None:
            if request.anchor < 0:
                flag |= int(Flag.BAD_TOKEN_ID)
            if have:
                drafts = take(length)
                ids = [max(0, request.anchor), *request.drafts[:drafts]]
            if request.emits:
                logit_rows = range(len(ids))
        parts.append(RequestRows(request.slot, request.position, ids, logit_rows, drafts, flag))
    return parts


def capacity_of(max_rows: int | None, batch_rows: int, drafts: int) -> int:
    if max_rows is None:
        return batch_rows * (drafts + 1)
    if max_rows < 0:
        raise ValueError(f"max_rows: expected >= 0, got {max_rows}")
    return max_rows


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
    out=None,
    workspace=None,
) -> VerifyLayout:
    """Rows of the target's pass for draft lengths chosen elsewhere.

    block.tokens [S, K]; draft_lens int [R], clamped to [0, K] and cut before the first draft below 0 (MISSING_DRAFT);
    anchors, anchor_positions int [S]; num_prefill_tokens int [R] and emits bool [R], optional; block_tables int32 [S,
    max_pages] with page_size, optional; state_indices int32 [R], a slot outside [0, S) is a padding row and gets no
    rows.

    A decode request has its anchor row, then its drafts. An anchor below 0 is written as 0 (BAD_TOKEN_ID). A prefill
    request (num_prefill_tokens > 0) has that many rows with id 0, for the engine to fill, and one logit row, its last.
    A request that does not emit has no drafts and no logit rows. The arrays hold max_rows rows, R * (K + 1) unless
    given. Where they are too few, anchor and prefill rows of all requests come first, then drafts, each in batch order;
    a prefill cut short has no logit row, and a request without any row emits nothing.
    """
    refuse_buffers(out, workspace)
    state_slots, drafts = block.tokens.shape
    slots = slots_of(state_indices, state_slots, state_slots)
    if len(draft_lens) != len(slots):
        raise ValueError(f"draft_lens: expected shape [{len(slots)}], got {list(draft_lens.shape)}")
    requests = read_requests(block.tokens, anchors, anchor_positions, slots, num_prefill_tokens, emits)
    lengths, flags = [], []
    for request, wanted in zip(requests, draft_lens.tolist(), strict=True):
        wanted = max(0, min(wanted, drafts)) if request.takes_drafts else 0
        length, flag = present(request, wanted)
        lengths.append(length)
        flags.append(flag)
    capacity = capacity_of(max_rows, len(slots), drafts)
    rows = verify_rows(requests, lengths, flags, capacity)
    return assemble(rows, capacity, drafts, block.tokens.device, block_tables, page_size)


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
    out=None,
    workspace=None,
) -> VerifyLayout:
    """Rows of the target's pass for draft trees: node m of request r is its row m, at anchor_position + depth of m.

    tree: tokens, depths int [S, M], num_nodes int [S]; node 0 is the anchor. anchor_positions int [S]; the rest, and what
    becomes of rows, as in `fixed_layout`. num_nodes is clamped to [1, M] and cut before the first node below 0
    (MISSING_DRAFT): parents come before their children, so what is left is a tree. draft_lens counts the nodes but the
    anchor; every row gives logits.
    """
    refuse_buffers(out, workspace)
    state_slots, nodes = tree.tokens.shape
    slots = slots_of(state_indices, state_slots, state_slots)
    requests = read_requests(tree.tokens[:, 1:], tree.tokens[:, 0], anchor_positions, slots, num_prefill_tokens, emits)
    sizes, depths = tree.num_nodes.tolist(), tree.depths.tolist()
    lengths, flags = [], []
    for request in requests:
        wanted = max(1, min(sizes[request.slot], nodes)) - 1 if request.takes_drafts else 0
        length, flag = present(request, wanted)
        lengths.append(length)
        flags.append(flag)
    capacity = capacity_of(max_rows, len(slots), nodes - 1)
    rows = verify_rows(requests, lengths, flags, capacity)
    for part, request in zip(rows, requests, strict=True):
        if request.slot is not None and not request.prefill:
            part.depths = depths[request.slot][: len(part.ids)]
    return assemble(rows, capacity, nodes - 1, tree.tokens.device, block_tables, page_size)


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
    out=None,
    workspace=None,
) -> VerifyLayout:
    """Rows of the drafter's own block of K = block_size drafts.

    anchor_first=True (DSpark): the anchor and K - 1 masks, every row predicts: row i (from 0) gives draft i + 1.
    anchor_first=False (DFlash): the anchor and K masks, only the masks predict: row i >= 1 gives draft i. Row i sits at
    anchor_position + i. draft_lens and max_drafts count the mask rows, so that a request has draft_lens + 1 rows as in
    any layout; the logit rows are the K that predict. anchors, anchor_positions: int [S]; an anchor below 0 is written
    as 0 (BAD_TOKEN_ID).
    """
    refuse_buffers(out, workspace)
    if block_size < 1:
        raise ValueError(f"block_size: expected >= 1, got {block_size}")
    if mask_token_id < 0:
        raise ValueError(f"mask_token_id: expected >= 0, got {mask_token_id}")
    masks = block_size - 1 if anchor_first else block_size
    ids, positions = anchors.tolist(), anchor_positions.tolist()
    rows = []
    for slot in slots_of(state_indices, len(ids), len(ids)):
        if slot is None:
            rows.append(RequestRows(None, 0, [], range(0), 0, 0))
            continue
        flag = int(Flag.BAD_TOKEN_ID) if ids[slot] < 0 else 0
        predicting = range(masks + 1 - block_size, masks + 1)
        rows.append(RequestRows(slot, positions[slot], [max(0, ids[slot])] + [mask_token_id] * masks, predicting, masks, flag))
    return assemble(rows, len(rows) * (masks + 1), masks, anchors.device, block_tables, page_size)


def layout_of_rows(cu_num_logits: Tensor, token_ids: Tensor, positions: Tensor, max_drafts: int) -> VerifyLayout:
    """`VerifyLayout.of_rows`: a layout whose forward rows are an engine's logit rows; rows behind the last request are padding."""
    starts = cu_num_logits.tolist()
    counts = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    owners = [request for request, count in enumerate(counts) for _ in range(count)]

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device=token_ids.device)

    return VerifyLayout(
        draft_lens=ints([max(count - 1, 0) for count in counts]),
        query_start_loc=ints(starts),
        cu_num_logits=ints(starts),
        token_ids=token_ids,
        positions=positions,
        batch_indices=ints(owners + [-1] * (len(token_ids) - len(owners))),
        logits_indices=ints(range(len(token_ids))),
        num_rows=ints(starts[-1:]),
        flags=ints([0] * len(counts)),
        max_drafts=max_drafts,
    )
