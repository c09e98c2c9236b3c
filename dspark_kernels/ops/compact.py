"""compact_kv: keys and values of accepted tree nodes to consecutive slots, all layers in one launch.

    slot(b + j) <- slot(path[j]),  j = 1..n,  b = the anchor's row

Reference: reference/compact.py. Source: the tree caches of SpecInfer, arXiv 2305.09781.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import library
from ..caches import check_slotted, slot_rows
from ..checks import check_tensor, check_type
from ..launch import arch, compact as compact_launch
from ..library import Out
from ..types import Acceptance, KVLayers, VerifyLayout

OP = "compact_kv"


def compact_kv(layers: KVLayers, acceptance: Acceptance, layout: VerifyLayout, *, extra: Sequence[Tensor] = ()) -> None:
    """Move the keys and values of the accepted path to the cache slots behind the context, in place, in one launch.

    A tree's rows are cached by node (`tree_layout`). Afterwards slot anchor_position + j holds the j-th token of the path, as if a
    chain had been verified. Slots behind the path keep their content. Sources and destinations may overlap. Bytes are moved
    unchanged, so every dtype works, fp8 included.

    Args:
        layers: caches of all layers, made once by `KVLayers.of`.
        acceptance: of `accept_tree`; kv_source int32 [R, M] names the forward rows of the path.
        layout: of the verified rows, with slot_mapping.
        extra: more tensors [pages, page_size, ...] that hold state by cache slot (a drafter's cache, MLA's latents). The first
            call with them copies a table of their addresses to the device, so make it before a graph is captured.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or stride.
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    check_type("layers", layers, KVLayers)
    check_type("acceptance", acceptance, Acceptance)
    check_type("layout", layout, VerifyLayout)
    device = layers.caches[0].device
    if acceptance.kv_source is None:
        raise ValueError("acceptance.kv_source: expected int32 [R, M], as accept_tree gives it, got None")
    if layout.slot_mapping is None:
        raise ValueError("layout.slot_mapping: expected int64 [N], a layout made with block_tables, got None")
    check_tensor("acceptance.kv_source", acceptance.kv_source, device=device)
    check_tensor("layout.slot_mapping", layout.slot_mapping, device=device)
    extra = list(extra)
    check_slotted(extra, "extra", layers.caches[0])
    if acceptance.kv_source.shape[0]:
        arguments = Arguments(
            caches=list(layers.caches),
            table=layers.table,
            pointers=list(layers.pointers),
            unit=layers.unit,
            slot_mapping=layout.slot_mapping,
            kv_source=acceptance.kv_source,
            num_accepted=acceptance.num_accepted,
            extra=extra,
        )
        _compact_kv(arguments)


@functools.lru_cache(maxsize=16)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, device=device)


class Arguments(NamedTuple):
    """The op as torch.library knows it."""

    caches: Out[list[Tensor]]
    table: Tensor
    pointers: list[int]
    unit: int
    slot_mapping: Tensor
    kv_source: Tensor
    num_accepted: Tensor
    extra: Out[list[Tensor]]


@library.register("compact_kv", Arguments)
def _compact_kv(a: Arguments) -> None:
    device = a.slot_mapping.device
    kernels = library.kernels("compact", device)
    planes, table, unit = [*a.caches, *a.extra], a.table, a.unit
    # torch.compile may hand over copies of the caches: then the table made for the originals does not hold.
    if a.extra and library.recording.get() is not None:
        raise NotImplementedError(
            "prepare: compact_kv: extra: expected none, since its addresses are read at every call; see KVLayers"
        )
    if a.extra or any(cache.data_ptr() != pointer for cache, pointer in zip(a.caches, a.pointers, strict=True)):
        rows, unit = slot_rows(planes, "caches")
        table = _table(tuple(rows), device)
    width = max(plane[0, 0].numel() * plane.element_size() if plane.numel() else 0 for plane in planes) // unit
    if width == 0:
        return
    config = compact_launch.pick(arch.current(device), width)
    chunks = -(-width // config.chunk)
    requests, nodes = a.kv_source.shape
    kernels.launch_compact_kv(
        requests * len(planes) * chunks,
        (
            table, a.slot_mapping, a.kv_source, a.num_accepted,
            a.slot_mapping.shape[0], nodes, len(planes), chunks, a.caches[0].shape[1],
        ),
        unit=unit,
        config=config,
    )  # fmt: skip
