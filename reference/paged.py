"""Keys and values in pages of a pool, read by the attention op instead of dense attention.

    row of position p of a slot = block_table[slot][p // page_size] * page_size + p % page_size

The interface is that of reference/model.KVCache. Every slot has a block table. Pages come from one pool in random order and return
to it when a slot gives up rows, so that the pages of a request lie anywhere. What was never written is NaN, which makes a read
outside a request's rows visible. The plan of the attention op is made once per pass and shared by the layers.

Symbols: N rows, S slots, Hq/Hkv query and key-value heads, D head size. Source: PagedAttention, arXiv 2309.06180.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from dspark_kernels.types import Acceptance, KVLayers, PagedKV, VerifyLayout

from .model import Rows, Shape


class PagedCache:
    """Keys and values of S slots in pages of `page_size` positions.

    ops: namespace with plan_attention and tree_attention, and for trees compact_kv.
    """

    def __init__(self, shape: Shape, slots: int, device, dtype, *, ops, page_size: int = 16):
        self.lengths = [0] * slots
        self._ops, self._page_size, self._scale = ops, page_size, shape.attention_scale
        self._tables: list[list[int]] = [[] for _ in range(slots)]
        self._free: list[int] = []
        self._random = random.Random(0)
        empty = torch.empty(shape.layers, 0, page_size, shape.kv_heads, shape.head_dim, device=device, dtype=dtype)
        self._keys, self._values = empty, empty.clone()  # [layers, pages, page_size, Hkv, D]
        self._rows = None  # of the pass that `_step` is for

    def crop(self, slot: int, length: int) -> None:
        """Keep the first `length` positions of a slot. Raises ValueError where fewer are cached."""
        if not 0 <= length <= self.lengths[slot]:
            raise ValueError(f"length: expected 0 to {self.lengths[slot]} (cached), got {length}")
        self.lengths[slot] = length
        table, needed = self._tables[slot], -(-length // self._page_size)
        self._free += table[needed:]
        del table[needed:]

    def compact(self, rows: Rows, acceptance: Acceptance) -> None:
        """Move the accepted path of every tree of a pass to the places from its anchor's on."""
        layers = KVLayers.of(zip(self._keys, self._values, strict=True))
        self._ops.compact_kv(layers, acceptance, self._layout(rows)[0])

    def claim(self, rows: Rows) -> None:
        """Make room for the rows of a pass. Raises ValueError where a slot would be left with a gap."""
        for slot, start, begin, end in rows.segments:
            if start > self.lengths[slot]:
                raise ValueError(f"positions: expected at most {self.lengths[slot]} (cached) first, got {start}")
            self.crop(slot, start)
            self.lengths[slot] = start + end - begin
            table = self._tables[slot]
            for _ in range(-(-self.lengths[slot] // self._page_size) - len(table)):
                if not self._free:
                    self._grow()
                table.append(self._free.pop(self._random.randrange(len(self._free))))
        self._rows = None

    def _grow(self) -> None:
        pages = self._keys.shape[1]
        more = max(8, pages)
        self._free += range(pages, pages + more)
        layers, page = self._keys.shape[0], self._keys.shape[2:]
        new = self._keys.new_full((layers, more, *page), torch.nan)
        self._keys, self._values = torch.cat([self._keys, new], 1), torch.cat([self._values, new], 1)

    def _places(self, rows: Rows) -> Tensor:
        """Page * page_size + place in the page of every row, int64 [N]."""
        size = self._page_size
        places = [
            self._tables[slot][position // size] * size + position % size
            for slot, start, begin, end in rows.segments
            for position in range(start, start + end - begin)
        ]
        return torch.tensor(places, dtype=torch.int64, device=self._keys.device)

    def write(self, layer: int, rows: Rows, keys: Tensor, values: Tensor) -> None:
        """keys, values: [N, Hkv, D], of rows that were claimed."""
        places = self._places(rows)
        self._keys[layer].flatten(0, 1)[places] = keys
        self._values[layer].flatten(0, 1)[places] = values

    def attend(self, layer: int, rows: Rows, queries: Tensor, *, causal: bool) -> Tensor:
        """Attention of the rows over their slots, [N, Hq, D] -> [N, Hq * D]; causal as in KVCache."""
        if self._rows is not rows:
            self._rows, self._step = rows, self._layout(rows)
            kv, layout, state_indices = self._paged(layer), *self._step
            self._plan = self._ops.plan_attention(
                layout, kv, query_heads=queries.shape[1], dtype=queries.dtype, state_indices=state_indices
            )
        layout, state_indices = self._step
        out = self._ops.tree_attention(
            queries,
            self._paged(layer),
            layout,
            mask=("chain" if rows.ancestors is None else "tree") if causal else "full",
            ancestors=rows.ancestors if causal else None,
            scale=self._scale,
            plan=self._plan,
            state_indices=state_indices,
        )
        return out.flatten(1)

    def _paged(self, layer: int) -> PagedKV:
        return PagedKV(self._keys[layer], self._values[layer], self._block_tables, self._context_lens)

    def _layout(self, rows: Rows) -> tuple[VerifyLayout, Tensor]:
        """The pass as the op sees it; a slot's context ends where its rows begin."""
        device = self._keys.device

        def ints(values):
            return torch.tensor(values, dtype=torch.int32, device=device)

        width = max(1, max(map(len, self._tables)))
        self._block_tables = ints([table + [-1] * (width - len(table)) for table in self._tables])
        context = [0] * len(self.lengths)
        for segment in rows.segments:
            context[segment.slot] = segment.start
        self._context_lens = ints(context)
        counts = [segment.end - segment.begin for segment in rows.segments]
        starts = ints([0, *(segment.end for segment in rows.segments)])
        layout = VerifyLayout(
            draft_lens=ints([count - 1 for count in counts]),
            query_start_loc=starts,
            cu_num_logits=starts,
            token_ids=torch.zeros_like(rows.positions),
            positions=rows.positions,
            batch_indices=ints([index for index, count in enumerate(counts) for _ in range(count)]),
            logits_indices=ints(list(range(len(rows.positions)))),
            num_rows=ints([len(rows.positions)]),
            flags=ints([0] * len(counts)),
            slot_mapping=self._places(rows),
            max_drafts=max(counts) - 1,
        )
        return layout, ints([segment.slot for segment in rows.segments])
