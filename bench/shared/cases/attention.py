"""Cases of tree_attention for bench.kernels.

    bytes  keys and values of every context once, those of the rows themselves, queries and results, page tables
    flops  two products of head size per visible pair of row and key, 2 per element each

The plan of the step is made outside of the timed call, as one plan serves all layers. Symbols: R requests, Hq/Hkv query and
key-value heads, D head size; heads and pages are Qwen3-4B's in bf16.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import dspark_kernels as dk
from bench.shared.baselines import BASELINES, Baseline
from bench.shared.cases.case import BF16, DRAFTS, PAGE, Case, Target
from bench.shared.cases.checks import require
from reference import attention, cases


@dataclasses.dataclass(frozen=True)
class Attention:
    """Every request has `context` keys and `rows` rows of this step. mask "chain" or "tree"."""

    requests: int
    context: int
    rows: int = DRAFTS + 1
    mask: str = "chain"
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = PAGE

    op = "tree_attention"
    instructions = 0

    @property
    def bytes(self) -> int:
        rows = self.requests * self.rows
        cached = 2 * self.kv_heads * self.head_dim * BF16 * (self.requests * self.context + rows)
        tables = 4 * self.requests * -(-self.context // self.page_size)
        words = 8 * rows if self.mask == "tree" else 0
        return cached + 2 * rows * self.query_heads * self.head_dim * BF16 + tables + words + 8 * self.requests + 4

    @property
    def flops(self) -> int:
        """Own keys are counted as in a chain: the most a tree can see."""
        pairs = self.rows * self.context + self.rows * (self.rows + 1) // 2
        return 4 * self.head_dim * self.query_heads * self.requests * pairs

    def small(self) -> Attention:
        sizes = dict(requests=min(self.requests, 3), context=min(self.context, 70), rows=min(self.rows, 9))
        return dataclasses.replace(self, **sizes, query_heads=4, kv_heads=2, head_dim=32)

    def make(self, seed: int) -> dict:
        case = cases.attention_case(
            seed=seed,
            rows=(self.rows,) * self.requests,
            contexts=(self.context,) * self.requests,
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            dtype=torch.bfloat16,
            mask=self.mask,
            padding_rows=0,
            max_drafts=self.rows - 1,
        )
        return case.arguments()

    def prepare(self, inputs: dict) -> dict:
        plan = dk.plan_attention(inputs["layout"], inputs["kv"], query_heads=self.query_heads)
        return inputs | dict(plan=plan)

    def workspace(self, device) -> dk.Workspace:
        heads = dict(query_heads=self.query_heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
        return dk.Workspace(self.requests, self.rows - 1, 1, device, **heads)

    def run(self, inputs: dict) -> tuple[Tensor, None]:
        return dk.tree_attention(**inputs), None

    def compare(self, inputs: dict, out: Tensor, _) -> None:
        """Within twice the error of dense fp32 attention and one rounding to bf16, as bench/shared/parity.py does."""
        exact = attention.tree_attention(**inputs)
        dense = attention.tree_attention(**inputs, dtype=torch.float32)
        error, own = (out.double() - exact).abs().max().item(), (dense.double() - exact).abs().max().item()
        bound = 2 * own + torch.finfo(out.dtype).eps * max(1.0, exact.abs().max().item())
        require(error <= bound, f"tree_attention: error {error:.3g} exceeds {bound:.3g}")


def gathered(q, k_cache, v_cache, block_tables, k_new, v_new, seen, context: int):
    """Pages gathered into [R, Hkv, keys, D], then torch's own attention. seen: bool [R, 1, rows, keys]. Equal contexts."""
    requests, rows = seen.shape[0], seen.shape[2]

    def keys(cache, new):
        pages = cache[block_tables].flatten(1, 2)[:, :context]
        return torch.cat([pages, new.unflatten(0, (requests, rows))], 1).transpose(1, 2)

    queries = q.unflatten(0, (requests, rows)).transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(
        queries, keys(k_cache, k_new), keys(v_cache, v_new), attn_mask=seen, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1)


def _arguments(inputs: dict) -> tuple:
    kv, layout, words = inputs["kv"], inputs["layout"], inputs["ancestors"]
    requests = layout.draft_lens.shape[0]
    rows = inputs["q"].shape[0] // requests
    context = int(kv.context_lens[0])
    own = torch.arange(rows, device=words.device if words is not None else inputs["q"].device)
    if words is None:
        visible = (own[None, :] <= own[:, None]).expand(requests, rows, rows)
    else:
        visible = (words.view(requests, rows, 1) >> own) & 1 > 0
    ahead = torch.ones(requests, rows, context, dtype=torch.bool, device=own.device)
    tables = kv.block_tables[:, : -(-context // kv.k_cache.shape[1])].long()
    seen = torch.cat([ahead, visible], 2)[:, None]
    return inputs["q"], kv.k_cache, kv.v_cache, tables, inputs["k_new"], inputs["v_new"], seen, context


BASELINES["tree_attention"] = Baseline(gathered, _arguments)


def registry() -> list[Case]:
    """At 85 % of the copy's bandwidth from 8192 keys on, while rows x group are at most 64."""
    streaming = Target(floors=1 / 0.85)
    return [
        Case("tree_attention", "r1_c8192_q8", Attention(1, 8192), streaming),
        Case("tree_attention", "r1_c131072_q8", Attention(1, 131072), streaming),
        Case("tree_attention", "r32_c8192_q1", Attention(32, 8192, 1), streaming),
        Case("tree_attention", "r32_c8192_q8", Attention(32, 8192), streaming),
        Case("tree_attention", "r64_c2048_q8", Attention(64, 2048)),
        Case("tree_attention", "r32_c8192_tree32", Attention(32, 8192, 32, "tree")),
    ]
