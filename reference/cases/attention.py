"""Inputs of `tree_attention`: ragged rows over a paged cache in which whatever no row may read is NaN.

    row i of a request stands at context + i, in a tree at context + its number of proper ancestors

Symbols: R requests, S request slots, N packed rows, Hq/Hkv query and key-value heads, D head size, M tree nodes.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.types import PagedKV, VerifyLayout

from .tensors import Case, generator, normal, slot_map

MAX_NODES = 64  # bits of an ancestor word


@dataclasses.dataclass
class AttentionCase(Case):
    """Arguments of `tree_attention`."""

    q: Tensor
    kv: PagedKV
    layout: VerifyLayout
    mask: str
    ancestors: Tensor | None
    k_new: Tensor | None
    v_new: Tensor | None
    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    state_indices: Tensor | None


class Filling(NamedTuple):
    """The tensors of a case while requests are written into them; keys first, then values where there are two."""

    cache: list[Tensor]  # fp32 [pages, page_size, Hkv, D]
    own: list[Tensor]  # fp32 [N, Hkv, D]
    slot_mapping: Tensor  # int64 [N]
    depths: Tensor  # int64 [N]
    words: Tensor  # int64 [S, M] or [N], ancestor words
    tables: Tensor  # int32 [S, max_pages]
    context_lens: Tensor  # int [S]


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The axes of `tree_attention`."""

    seed: int = 0
    rows: tuple[int, ...] = (3, 0, 5)  # by request
    contexts: tuple[int, ...] = (37, 9, 70)  # cached keys by request
    query_heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    page_size: int = 4
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None  # None: dtype; e4m3 comes with scales
    mask: str = "chain"
    cached: bool = False  # own keys and values lie in the cache, at slot_mapping
    by_slot: bool = False  # ancestors [S, M] instead of [N]
    scattered: bool = False  # S = R + 3 slots in shuffled order
    padding_rows: int = 2
    padding_requests: int = 0  # the last requests have no slot
    swapped: bool = False  # the cache is stored head before slot
    sinks: bool = False
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    max_drafts: int | None = None
    position_dtype: torch.dtype = torch.int32

    @property
    def stored_scales(self) -> tuple[float, float]:
        """Of keys and of values: stored = value / scale."""
        return (0.7, 1.5) if self.cache_dtype == torch.float8_e4m3fn else (1.0, 1.0)

    def inputs(self) -> AttentionCase:
        # The order of the calls with `g` fixes the values of every case: keep it.
        g = generator(self.seed)
        requests, total = len(self.rows), sum(self.rows)
        slots = requests + 3 if self.scattered or self.padding_requests else requests
        state_indices = slot_map(self.seed + 2, requests, self.padding_requests) if slots > requests else None
        slot_of = list(range(requests)) if state_indices is None else state_indices.tolist()
        count = total + self.padding_rows
        filling = self._fill(g, slots, slot_of, count)
        q = torch.full((count, self.query_heads, self.head_dim), float("nan"), dtype=self.dtype)
        q[:total] = normal(g, total, self.query_heads, self.head_dim, scale=1.5, dtype=self.dtype)
        k_new, v_new = (None, None) if self.cached else (side.to(self.dtype) for side in filling.own)
        slot_mapping = filling.slot_mapping if self.cached else None
        return AttentionCase(
            q=q,
            kv=self._paged(filling),
            layout=attention_layout(list(self.rows), list(self.contexts), filling.depths, slot_mapping, self.max_drafts),
            mask=self.mask,
            ancestors=filling.words if self.mask == "tree" else None,
            k_new=k_new,
            v_new=v_new,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sinks=normal(g, self.query_heads) if self.sinks else None,
            state_indices=state_indices,
        )

    def _fill(self, g, slots: int, slot_of: list[int], count: int) -> Filling:
        """Every request's keys, values, table and tree; the rest NaN, and unused entries of block tables point nowhere."""
        heads = (self.kv_heads, self.head_dim)
        needed = [-(-(c + n) // self.page_size) for c, n in zip(self.contexts, self.rows, strict=True)]
        pages = sum(needed) + 2
        order = torch.randperm(pages, generator=g).tolist()
        most = max(self.rows, default=0)
        filling = Filling(
            cache=[torch.full((pages, self.page_size, *heads), float("nan")) for _ in range(2)],
            own=[torch.full((count, *heads), float("nan")) for _ in range(2)],
            slot_mapping=torch.full((count,), -1, dtype=torch.int64),
            depths=torch.zeros(count, dtype=torch.int64),
            words=torch.full((slots, min(most, MAX_NODES)) if self.by_slot else (count,), -1, dtype=torch.int64),
            tables=torch.full((slots, max(needed, default=0) + 2), 2**31 - 1, dtype=torch.int32),
            context_lens=torch.full((slots,), 10**6, dtype=self.position_dtype),
        )
        begin = 0
        for request, slot in enumerate(slot_of):
            table = [order.pop() for _ in range(needed[request])]
            self._write_keys_values(g, filling, request, begin, table)
            self._write_tree(g, filling, self.rows[request], begin, slot)
            if slot >= 0:
                filling.tables[slot, : len(table)] = torch.tensor(table, dtype=torch.int32)
                filling.context_lens[slot] = self.contexts[request]
            begin += self.rows[request]
        return filling

    def _write_keys_values(self, g, filling: Filling, request: int, begin: int, table: list[int]) -> None:
        n, context, size = self.rows[request], self.contexts[request], self.page_size
        places = torch.tensor([table[j // size] * size + j % size for j in range(context + n)], dtype=torch.int64)
        stored = context + n if self.cached else context
        for cache, own in zip(filling.cache, filling.own, strict=True):
            values = normal(g, context + n, self.kv_heads, self.head_dim)
            cache.view(-1, self.kv_heads, self.head_dim)[places[:stored]] = values[:stored]
            own[begin : begin + n] = values[context:]
        filling.slot_mapping[begin : begin + n] = places[context:]

    def _write_tree(self, g, filling: Filling, n: int, begin: int, slot: int) -> None:
        filling.depths[begin : begin + n] = torch.arange(n)
        if self.mask != "tree" or n == 0:
            return
        words = torch.zeros(n, dtype=torch.int64)
        if n <= MAX_NODES:
            words = ancestor_words(random_tree(g, n))
            ancestors = [bin(word & (1 << 64) - 1).count("1") - 1 for word in words.tolist()]
            filling.depths[begin : begin + n] = torch.tensor(ancestors)
        if not self.by_slot:
            filling.words[begin : begin + n] = words
        elif slot >= 0:
            filling.words[slot, : min(n, MAX_NODES)] = words[:MAX_NODES]

    def _paged(self, filling: Filling) -> PagedKV:
        key_scale, value_scale = self.stored_scales
        stored = [(c / s).to(self.cache_dtype or self.dtype) for c, s in zip(filling.cache, self.stored_scales, strict=True)]
        if self.swapped:
            stored = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in stored]
        scales = {}
        if self.cache_dtype == torch.float8_e4m3fn:
            scales = dict(k_scale=torch.tensor([key_scale]), v_scale=torch.full((self.kv_heads,), value_scale))
        return PagedKV(*stored, filling.tables, filling.context_lens, **scales)


def random_tree(g: torch.Generator, nodes: int) -> list[int]:
    """Parents of a random tree in slot order; the root's is -1."""
    return [-1] + [int(torch.randint(max(0, node - 5), node, (), generator=g)) for node in range(1, nodes)]


def ancestor_words(parents: list[int]) -> Tensor:
    """int64 word per node: bit s = slot s is an ancestor or the node itself."""
    words = []
    for node, parent in enumerate(parents):
        words.append((words[parent] if parent >= 0 else 0) | 1 << node)
    return torch.tensor([word - (1 << 64) if word >> 63 else word for word in words], dtype=torch.int64)


def attention_layout(
    rows: list[int], contexts: list[int], depths: Tensor, slot_mapping: Tensor | None, max_drafts: int | None = None
) -> VerifyLayout:
    """A VerifyLayout of these rows per request; depths int64 [N] gives positions, and its length the number of rows."""
    count = depths.shape[0]
    ints = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    starts = [0]
    for n in rows:
        starts.append(starts[-1] + n)
    owners = [r for r, n in enumerate(rows) for _ in range(n)]
    bases = torch.tensor([contexts[r] for r in owners] + [0] * (count - len(owners)), dtype=torch.int64)
    return VerifyLayout(
        draft_lens=ints([max(n - 1, 0) for n in rows]),
        query_start_loc=ints(starts),
        cu_num_logits=ints(starts),
        token_ids=torch.zeros(count, dtype=torch.int64),
        positions=bases + depths,
        batch_indices=ints(owners + [-1] * (count - len(owners))),
        logits_indices=ints(list(range(count))),
        num_rows=ints([len(owners)]),
        flags=ints([0] * len(rows)),
        slot_mapping=slot_mapping,
        max_drafts=max_drafts,
    )


def attention_case(*axes, **named) -> AttentionCase:
    """The inputs of an `AttentionSpec` with these axes."""
    return AttentionSpec(*axes, **named).inputs()
