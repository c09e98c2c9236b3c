"""The kernels' records that accept_chain, accept_tree and acceptance on shards make alike from their arguments."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from ...kernels.accept.args import ChainScratch, DenseDraft, IdMap, MapProgress, Outputs, SparseDraft, Target, TreeScratch
from ...kernels.sizes import MAP_COLUMNS, MAX_GROUP, VOCAB_BLOCK
from .. import sampling as sampling_args
from .checks import Emitted, check_anchor_pair

Scratch = TypeVar("Scratch", ChainScratch, TreeScratch)


def stride(tensor: Tensor | None, dim: int) -> int:
    return 0 if tensor is None else tensor.stride(dim)


def target_record(logits: Tensor, flat: sampling_args.Flat) -> Target:
    return Target(logits, logits.stride(0), sampling_args.adjust_settings(flat) if flat.adjusts else None)


def sparse_record(ids: Tensor, logits: Tensor) -> SparseDraft:
    ids_slot, ids_row, _ = ids.stride()
    slot, row, _ = logits.stride()
    return SparseDraft(ids, logits, ids_slot, ids_row, slot, row, logits.shape[2])


def draft_record(
    logits: Tensor | None, ids: Tensor | None, lse: Tensor | None, draft_to_target: Tensor | None, inverse: Tensor,
    starts: Tensor | None = None,
) -> DenseDraft | SparseDraft | None:  # fmt: skip
    """DenseDraft or SparseDraft; None without logits. inverse: memory for that of the map. starts: of packed logits, [1, rows, V]."""
    if logits is None:
        return None
    if ids is not None:
        return sparse_record(ids, logits)
    id_map = None if draft_to_target is None else IdMap(draft_to_target, inverse)
    slot, row, _ = logits.stride()
    return DenseDraft(logits, lse, slot, row, stride(lse, 0), logits.shape[2], id_map, starts)


def map_parts(draft: DenseDraft | SparseDraft | None) -> int:
    """Work items that invert the id map of a draft; 0 without one."""
    if isinstance(draft, DenseDraft) and draft.id_map is not None:
        return -(-draft.width // MAP_COLUMNS)
    return 0


def map_record(draft: DenseDraft | SparseDraft | None, progress: Tensor) -> MapProgress | None:
    parts = map_parts(draft)
    return MapProgress(progress, progress[1:], parts) if parts else None


class Written(Protocol):
    """What the arguments of every op that accepts have."""

    @property
    def emitted(self) -> Emitted: ...
    @property
    def commit_mask(self) -> Tensor: ...
    @property
    def flags(self) -> Tensor: ...
    @property
    def anchors(self) -> Tensor | None: ...
    @property
    def anchor_positions(self) -> Tensor | None: ...


class Paths(NamedTuple):
    """Of a tree."""

    path: Tensor | None
    kv_source: Tensor | None


OF_A_CHAIN = Paths(None, None)


def outputs_record(a: Written, log_probs: Tensor | None = None, paths: Paths = OF_A_CHAIN) -> Outputs:
    """a: the arguments of an op. Raises ValueError as `check_anchor_pair`."""
    check_anchor_pair(a.anchors, a.anchor_positions)  # once more: torch's op may be called without the public function
    return Outputs(
        *a.emitted, a.commit_mask, a.flags, log_probs, a.anchors, stride(a.anchors, 0), a.anchor_positions,
        stride(a.anchor_positions, 0), *paths,
    )  # fmt: skip


def used(scratch: Scratch, *, raw: bool, swept: bool, filtered: bool) -> Scratch:
    """Scratch of a chain or a tree without the regions that a call does not use. swept: whether draft rows are summed."""
    return scratch._replace(
        raw=scratch.raw if raw else None,
        draft=scratch.draft if swept else None,
        filters=scratch.filters if filtered else None,
        limits=scratch.limits if filtered else None,
    )


def tile_of(draft: DenseDraft | SparseDraft | None, blocks: int, width: int, flat: sampling_args.Flat) -> dict[str, Any]:
    """The fields of AcceptTile that follow from the sizes of a call. width: padded number of rows of a request."""
    filtered = flat.filters is not None
    return dict(
        CANDIDATES=1 << (draft.count - 1).bit_length() if isinstance(draft, SparseDraft) else 1,
        BLOCKS=max(4, 1 << (blocks - 1).bit_length()),
        GROUPS=1 << (blocks * (VOCAB_BLOCK // MAX_GROUP) - 1).bit_length() if filtered else 1,
        WIDTH=width,
        JOINT=flat.joint and filtered,
    )
