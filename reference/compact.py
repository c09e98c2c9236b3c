"""compact_kv in plain torch: the keys and values of the accepted path move to consecutive cache slots.

    cache[cache slot of row b + j] = cache[cache slot of row path[j]],  j = 1..n,  b = the anchor's row

All sources are read before anything is written. Symbols: R requests, M tree nodes, N forward rows; n accepted drafts. Source: the
tree caches of SpecInfer, arXiv 2305.09781.
"""

from __future__ import annotations

from torch import Tensor

from dspark_kernels.types import Acceptance, VerifyLayout


def compact_kv(planes: list[Tensor], acceptance: Acceptance, layout: VerifyLayout) -> None:
    """planes: [pages, page_size, ...] tensors, moved in place; keys and values of all layers and whatever else lies by slot.

    acceptance.kv_source: int32 [R, M], forward rows of the path, the anchor's first. A row without a cache slot (-1) is neither
    read nor written.
    """
    moves = []
    for r, accepted in enumerate(acceptance.num_accepted.tolist()):
        rows = acceptance.kv_source[r].tolist()
        for j in range(1, accepted + 1):
            source, destination = int(layout.slot_mapping[rows[j]]), int(layout.slot_mapping[rows[0] + j])
            if source >= 0 and destination >= 0:
                moves.append((source, destination))
    for plane in planes:
        size = plane.shape[1]
        values = [plane[source // size, source % size].clone() for source, _ in moves]
        for (_, destination), value in zip(moves, values, strict=True):
            plane[destination // size, destination % size] = value
