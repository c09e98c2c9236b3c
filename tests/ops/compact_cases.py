"""Caches and random accepted paths for compact_kv, made from a seed."""

import dataclasses

import torch

import dspark_kernels as dk
from reference import layout as layouts
from tests.blocks import tree_of


def bytes_of(tensor):
    return tensor.contiguous().view(torch.uint8)


def filled(g, *shape, dtype):
    """Random bits; NaN among them."""
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=g, dtype=torch.uint8).view(dtype)


def cache_of(g, pages, page_size, kind, dtype):
    """Caches of three layouts: slots side by side, heads outside of slots, slots further apart than they are wide."""
    heads, size = [(1, 3), (2, 8), (3, 5), (8, 16)][int(torch.randint(0, 4, (1,), generator=g))]
    if kind == "heads first":
        return filled(g, pages, heads, page_size, size, dtype=dtype).transpose(1, 2)
    if kind == "apart":
        return filled(g, pages + 1, page_size, heads + 1, size + 3, dtype=dtype)[1:, :, :heads, :size]
    return filled(g, pages, page_size, heads, size, dtype=dtype)


@dataclasses.dataclass
class Case:
    caches: list
    extra: list
    acceptance: dk.Acceptance
    layout: dk.VerifyLayout


def case_of(seed, requests, nodes, page_size, kinds=("plain",), dtypes=(torch.bfloat16,), max_rows=None, extra=0):
    """Random trees with a random path of each; a request of every fifth emits nothing. Pages lie anywhere, some are missing."""
    g = torch.Generator().manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high, (1,), generator=g))  # noqa: E731
    trees = [[(number(0, 99), -1)] + [(number(0, 99), number(max(0, m - 3), m)) for m in range(1, nodes)] for _ in range(requests)]
    tree = tree_of(trees, nodes)
    positions = torch.tensor([number(0, 40) for _ in range(requests)])
    pages = -(-(41 + nodes) // page_size)
    tables = torch.randperm(requests * pages + 2, generator=g)[: requests * pages].reshape(requests, pages).int()
    if number(0, 3) == 0:
        tables[number(0, requests), number(0, pages)] = -1
    layout = layouts.tree_layout(
        tree, anchor_positions=positions, block_tables=tables, page_size=page_size, max_rows=max_rows,
        emits=torch.tensor([number(0, 5) > 0 for _ in range(requests)]),
    )  # fmt: skip
    kv_source = torch.full((requests, nodes), -1, dtype=torch.int32)
    accepted = torch.zeros(requests, dtype=torch.int32)
    for r in range(requests):
        start = int(layout.query_start_loc[r])
        count = int(layout.draft_lens[r]) + 1 if layout.cu_num_logits[r + 1] > layout.cu_num_logits[r] else 0
        path = [number(count // 2, count)] if count else []
        while path and path[0] > 0:
            path.insert(0, trees[r][path[0]][1])
        kv_source[r, : len(path)] = start + torch.tensor(path)
        accepted[r] = max(0, len(path) - 1)
    zeros = torch.zeros(requests, dtype=torch.int32)
    acceptance = dk.Acceptance(
        torch.zeros(requests, nodes).long(), accepted, zeros, zeros, zeros.long(), zeros, torch.zeros(len(layout.token_ids)).bool(),
        zeros, kv_source=kv_source,
    )  # fmt: skip
    count = requests * pages + 2
    planes = [cache_of(g, count, page_size, kind, dtype) for kind in kinds for dtype in dtypes for _ in "kv"]
    more = [filled(g, count, page_size, *shape, dtype=torch.float32) for shape in [(), (6,), (2, 2, 2)][:extra] if shape]
    more += [filled(g, count, page_size, dtype=torch.int16)] if extra else []
    return Case(planes, more, acceptance, layout)
