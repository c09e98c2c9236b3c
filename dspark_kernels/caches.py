"""Key-value caches of the target: pages of slots, as attention reads them and as `compact_kv` moves them.

Symbols: S request slots of the engine, Hkv key-value heads, D head size, P caches of all layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .checks import INT_DTYPES, LOGIT_DTYPES, Checked, check_int, check_tensor


@dataclasses.dataclass(frozen=True, eq=False)
class PagedKV(Checked):
    """The paged key-value cache of one layer.

    k_cache, v_cache   bf16, fp16, fp32 or fp8 e4m3 [pages, page_size, Hkv, D], any strides but the last
    block_tables       int32 [S, max_pages], pages of each request slot
    context_lens       int32 or int64 [S], cached tokens before this step's rows
    k_scale, v_scale   fp32 [1] or [Hkv]; needed for fp8
    """

    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    context_lens: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def _check(self) -> None:
        cache = LOGIT_DTYPES + (torch.float8_e4m3fn,)
        k = self._tensor("k_cache", dtype=cache, shape=("pages", "page_size", "Hkv", "D"), last_contiguous=True)
        self._tensor("v_cache", dtype=k.dtype, shape=tuple(k.shape), device=k.device, last_contiguous=True)
        tables = self._tensor("block_tables", dtype=torch.int32, shape=("S", "max_pages"), device=k.device, last_contiguous=True)
        self._tensor("context_lens", dtype=INT_DTYPES, shape=(tables.shape[0],), device=k.device, contiguous=True)
        for field in ("k_scale", "v_scale"):
            scale = self._optional(field, dtype=torch.float32, shape=("1 or Hkv",), device=k.device)
            if scale is not None and scale.shape[0] not in (1, k.shape[2]):
                raise ValueError(f"{self._name(field)}: expected shape [1] or [{k.shape[2]}], got {list(scale.shape)}")
        if k.dtype == torch.float8_e4m3fn and (self.k_scale is None or self.v_scale is None):
            raise ValueError(f"{self._name('k_scale')}: expected scales for an fp8 cache, got None")


_LAYER = "a PagedKV or a tuple of its caches (one cache alone: `(cache,)`)"


@dataclasses.dataclass(frozen=True, eq=False)
class KVLayers(Checked):
    """The caches of all layers and their addresses, for `compact_kv`. Make it once, with `KVLayers.of`.

    caches     tensors [pages, page_size, ...]: keys and values of every layer, any strides but the last
    table      int64 [P, 6] on their device, one row per cache: its address; then, counted in pieces of `unit` bytes, the
               strides of a page, of a cache slot and of the dimension that may lie apart (heads); the size of that dimension;
               and the pieces of one entry of it
    pointers   the addresses again, for the host
    unit       bytes of a piece, 1 to 8
    """

    caches: tuple[Tensor, ...]
    table: Tensor
    pointers: tuple[int, ...]
    unit: int

    @classmethod
    def of(cls, layers: Iterable[PagedKV | Sequence[Tensor]]) -> KVLayers:
        """The layers' caches with their table.

        layers: for each layer its (k_cache, v_cache), a `PagedKV`, or a tuple of any number of caches (MLA: one). The addresses are
        copied to the device, so call this once and not in every step; the caches must keep their addresses. Raises TypeError or
        ValueError where caches differ in device or page size, or a cache slot is not made of contiguous parts with one stride.
        """
        if isinstance(layers, (Tensor, PagedKV, str)) or not isinstance(layers, Iterable):
            raise TypeError(f"layers: expected a list with an entry per layer, {_LAYER}, got {type(layers).__name__}")
        caches: list[Tensor] = []
        for number, layer in enumerate(layers):
            if not isinstance(layer, (PagedKV, tuple, list)):
                raise TypeError(f"layers[{number}]: expected {_LAYER}, got {type(layer).__name__}")
            caches += (layer.k_cache, layer.v_cache) if isinstance(layer, PagedKV) else layer
        if not caches:
            raise ValueError("layers: expected at least one layer, got none")
        rows, unit = slot_rows(caches, "layers")
        return cls(tuple(caches), torch.tensor(rows, device=caches[0].device), tuple(row[0] for row in rows), unit)

    def to(self, device: torch.device | str | int | None) -> KVLayers:
        """The caches on `device`, with a table of their addresses there."""
        return KVLayers.of([tuple(cache.to(device) for cache in self.caches)])

    def _check(self) -> None:
        check_int(self._name("unit"), self.unit, low=1, high=8)
        check_slotted(self.caches, self._name("caches"))
        shape = (len(self.caches), 6)
        self._tensor("table", dtype=torch.int64, shape=shape, device=self.caches[0].device, contiguous=True)


def check_slotted(caches: Sequence[Tensor], name: str, like: Tensor | None = None) -> None:
    """Raise TypeError or ValueError unless all are [pages, page_size, ...] with the device and page size of `like`.

    like: None = the first of them.
    """
    for number, cache in enumerate(caches):
        like = check_tensor(f"{name}[{number}]", cache) if like is None else like
        check_tensor(f"{name}[{number}]", cache, device=like.device)
        size = like.shape[1] if like.dim() > 1 else "page_size"
        if cache.dim() < 2 or cache.shape[1] != size:
            raise ValueError(f"{name}[{number}]: expected shape [pages, {size}, ...], got {list(cache.shape)}")


def slot_rows(caches: Sequence[Tensor], name: str) -> tuple[list[tuple[int, ...]], int]:
    """(rows of the table of `KVLayers`, bytes of its unit: the largest power of two up to 8 that divides them all)."""
    check_slotted(caches, name)
    rows, together = [], 8
    for number, cache in enumerate(caches):
        sizes, strides = [1], [1]  # of the dimensions behind the slot, those that lie side by side joined
        for size, stride in zip(reversed(cache.shape[2:]), reversed(cache.stride()[2:]), strict=True):
            if size == 1:
                continue
            if stride == sizes[-1] * strides[-1]:
                sizes[-1] *= size
            else:
                sizes.append(size)
                strides.append(stride)
        if len(sizes) > 2 or strides[0] != 1:
            raise ValueError(
                f"{name}[{number}]: expected a slot of contiguous parts with one stride between them, got shape "
                f"{list(cache.shape)}, strides {list(cache.stride())}"
            )
        parts, apart = (sizes[1], strides[1]) if len(sizes) > 1 else (1, 0)
        row = (cache.data_ptr(), *(n * cache.element_size() for n in (cache.stride(0), cache.stride(1), apart)), parts,
               sizes[0] * cache.element_size())  # fmt: skip
        rows.append(row)
        together = math.gcd(together, *(n for n in (*row[:4], row[5])))
    return [(row[0], *(n // together for n in row[1:4]), row[4], row[5] // together) for row in rows], together
