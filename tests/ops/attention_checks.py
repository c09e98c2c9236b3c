"""tree_attention beside reference/attention.py and beside PyTorch in the queries' own dtype, for tests."""

import dataclasses
import math

import torch

import dspark_kernels as dk
from dspark_kernels.launch import arch, attention as attention_launch
from reference import attention, cases
from tests.ops.errors import excess_error

FP8 = torch.float8_e4m3fn


def casts_fp8() -> bool:
    """Whether the architecture that kernels run on here has fp8 casts of its own."""
    return attention_launch.pick(arch.current(torch.device("cpu")), None, 64, 2, 1, 1).native_fp8


def small_parts(pick, **changes):
    """`pick` with blocks of 16 keys, parts of at least one block and 12 programs to share them."""
    changes = dict(block_n=16, own_block=16, programs=12, min_blocks=1, invariant_parts=5) | changes

    def picked(arch, packed, *rest):
        config = pick(arch, packed, *rest)
        return dataclasses.replace(config, block_m=min(config.block_m, 32), **changes)

    return picked


def _eager(case):
    """PyTorch in the queries' own dtype: products rounded to it, softmax in fp32, weights rounded to it; out and lse."""
    dtype, group = case.q.dtype, case.q.shape[1] // case.kv.k_cache.shape[2]
    out = torch.zeros_like(case.q)
    lse = torch.full(case.q.shape[:2], -math.inf)

    def widened(cache, scale):
        return cache.float() * (1 if scale is None else scale[:, None]) if cache.dtype == FP8 else cache

    caches = [widened(case.kv.k_cache, case.kv.k_scale), widened(case.kv.v_cache, case.kv.v_scale)]
    page_size = caches[0].shape[1]
    starts = case.layout.query_start_loc.tolist()
    slots = range(len(starts) - 1) if case.state_indices is None else case.state_indices.tolist()
    for slot, begin, end in zip(slots, starts[:-1], starts[1:], strict=True):
        n = end - begin
        if slot < 0 or n == 0:
            continue
        context = int(case.kv.context_lens[slot])
        at = torch.arange(context)
        places = case.kv.block_tables[slot].long()[at // page_size], at % page_size
        own = [case.k_new, case.v_new]
        if case.k_new is None:
            rows = case.layout.slot_mapping[begin:end]
            own = [c[rows // page_size, rows % page_size] for c in caches]
        else:
            own = [t[begin:end] for t in own]
        keys, values = (
            torch.cat([c[places].to(dtype), o.to(dtype)]).repeat_interleave(group, 1) for c, o in zip(caches, own, strict=True)
        )
        rules = dict(mask=case.mask, window=case.window)
        if case.mask == "tree":
            words = case.ancestors[slot, :n] if case.ancestors.dim() == 2 else case.ancestors[begin:end]
            rules |= dict(ancestors=words) if n <= 64 else dict(mask="chain")
        seen = attention.visible_keys(n, context, **rules)
        scale = case.q.shape[-1] ** -0.5 if case.scale is None else case.scale
        scores = torch.einsum("nhd,mhd->nhm", case.q[begin:end], keys) * scale
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        scores = scores.float().masked_fill(~seen[:, None], -math.inf)
        if case.sinks is not None:
            scores = torch.cat([scores, case.sinks.float()[None, :, None].expand(n, -1, 1)], -1)
        lse[begin:end] = scores.logsumexp(-1)
        weights = scores.softmax(-1)[..., : context + n].to(dtype)
        out[begin:end] = torch.einsum("nhm,mhd->nhd", weights, values)
    return out, lse


def run(case, **options):
    """The op into poisoned outputs."""
    out = torch.full_like(case.q, math.nan), torch.full(case.q.shape[:2], math.nan, device=case.q.device)
    have = dk.tree_attention(**case.arguments(), return_lse=True, out=out, **options)
    assert have[0] is out[0] and have[1] is out[1]
    return have


def check(case, **options):
    out, lse = (t.cpu() for t in run(case, **options))
    case = on_cpu(case)
    exact, exact_lse = attention.tree_attention(**case.arguments(), return_lse=True)
    eager, eager_lse = _eager(case)
    excess_error(out, eager, exact, "out")
    excess_error(lse, eager_lse, exact_lse, "lse")
    return out, lse


def on_cpu(value):
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if dataclasses.is_dataclass(value):
        return type(value)(**{f.name: on_cpu(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def plan_of(case, **options):
    return dk.plan_attention(
        case.layout, case.kv, query_heads=case.q.shape[1], dtype=case.q.dtype, state_indices=case.state_indices,
        window=case.window, **options,
    )  # fmt: skip


def chain_as_tree(case):
    """The same rows, each request a tree that does not branch."""
    words = [attention.chain_ancestors(n) for n in (case.layout.query_start_loc.diff()).tolist()]
    padding = torch.full((case.q.shape[0] - sum(map(len, words)),), -1)
    return dataclasses.replace(case, mask="tree", ancestors=torch.cat([*words, padding]))


def take_requests(case, requests, padding):
    """Some requests of a case as a batch of their own, in this order, with padding rows behind."""
    starts = case.layout.query_start_loc.tolist()
    index = [row for r in requests for row in range(starts[r], starts[r + 1])]
    rows = torch.tensor(index + [0] * padding, dtype=torch.int64)
    take = lambda t: None if t is None else t[rows]  # noqa: E731
    counts = [starts[r + 1] - starts[r] for r in requests]
    kv = dataclasses.replace(case.kv, block_tables=case.kv.block_tables[requests], context_lens=case.kv.context_lens[requests])
    layout = cases.attention_layout(counts, kv.context_lens.tolist(), torch.zeros(len(rows), dtype=torch.int64), None)
    part = dataclasses.replace(
        case, q=take(case.q), kv=kv, layout=layout, ancestors=take(case.ancestors), k_new=take(case.k_new), v_new=take(case.v_new)
    )
    return part, index
