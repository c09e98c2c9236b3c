"""dk.accept_chain, dk.accept_tree, dk.draft_block and dk.schedule_prefixes in the form that the suite takes.

    python -m dspark_kernels.testing dspark_kernels.testing.ours:token
    python -m dspark_kernels.testing dspark_kernels.testing.ours:traversal

`token`, `block`, `coupled` and `greedy` are acceptance functions on chains, `walk`, `recursive`, `traversal` and `greedy_tree` on
trees; `draft`, `draft_coupled` are samplers and `causal` is a schedule. On CPU tensors they run in Triton's interpreter
(TRITON_INTERPRET=1), where a request takes about 50 ms (a tree: 100), so the suite takes fewer of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..choices import ChainRule, Drawn, Noise, TreeRule
from ..ops.accept.chain import accept_chain
from ..ops.accept.tree import accept_tree
from ..ops.draft.dense import draft_block
from ..ops.layout.fixed import fixed_layout, tree_layout
from ..ops.layout.schedule import schedule_prefixes
from ..types import CostTable, DenseProposal, DraftBlock, DraftTree, OneHotProposal, SamplingTensors
from . import interpreter
from .tree.rules import depths_of

INTERPRETED_REQUESTS = 256


def _accept(
    rule: ChainRule,
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    temperature: Tensor,
    seeds: Tensor,
    draft_lens: Tensor,
    anchor_positions: Tensor,
) -> Tensor:
    proposal = OneHotProposal() if draft_logits is None else DenseProposal(draft_logits)
    flags = torch.zeros_like(draft_lens)
    present = torch.where(draft_tokens == -1, 0, draft_tokens)  # a layout would cut the rows at a missing draft
    block = DraftBlock(present, proposal, flags)
    layout = fixed_layout(block, draft_lens, anchors=torch.zeros_like(seeds), anchor_positions=anchor_positions)
    rows = torch.arange(target_logits.shape[1], device=seeds.device) <= draft_lens[:, None]
    missing = (torch.nn.functional.pad(draft_tokens, (1, 0)) == -1)[rows]
    layout.token_ids[: len(missing)].masked_fill_(missing, -1)
    # The packed rows keep their distance, so that a view of wider rows stays one.
    packed = _packed(target_logits, rows)
    sampling = SamplingTensors(temperature, seeds)
    return accept_chain(packed, layout, proposal, sampling=sampling, rule=rule).tokens


def _packed(target_logits: Tensor, rows: Tensor) -> Tensor:
    """Rows [L, V] of target_logits [R, K+1, V]; behind each lies what lay there before."""
    requests, count, vocab = target_logits.shape
    stride = max(vocab, target_logits.stride(1)) if target_logits.stride(1) > 0 else vocab
    if stride == vocab or requests == 0:
        return target_logits[rows].contiguous()
    return target_logits.as_strided((requests, count, stride), target_logits.stride())[rows][:, :vocab]


def _accept_tree(
    rule: TreeRule,
    node_logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    draft_logits: Tensor | None,
    drawn: Drawn,
    temperature: Tensor,
    seeds: Tensor,
    num_nodes: Tensor,
    anchor_positions: Tensor,
) -> Tensor:
    tree = _tree(tokens, parents, draft_logits, drawn, num_nodes)
    layout = tree_layout(tree, anchor_positions=anchor_positions)
    rows = torch.arange(tokens.shape[1], device=seeds.device) < num_nodes[:, None]
    return accept_tree(
        _packed(node_logits, rows), layout, tree, sampling=SamplingTensors(temperature, seeds), rule=rule
    ).tokens  # fmt: skip


def _tree(tokens: Tensor, parents: Tensor, draft_logits: Tensor | None, drawn: Drawn, num_nodes: Tensor) -> DraftTree:
    """The tree with its links; nodes that do not exist have none."""
    index = torch.arange(tokens.shape[1], device=tokens.device)
    parents = torch.where(index < num_nodes[:, None], parents, -1).to(torch.int32)
    links = {name: torch.full_like(parents, -1) for name in ("first_child", "next_sibling")}
    ancestors = torch.ones_like(tokens) << index
    rows = torch.arange(len(tokens), device=tokens.device)
    for node in reversed(range(1, tokens.shape[1])):
        there = parents[:, node] >= 0
        parent = parents[:, node].clamp(min=0)
        links["next_sibling"][:, node] = torch.where(there, links["first_child"][rows, parent], -1)
        links["first_child"][rows, parent] = torch.where(there, node, links["first_child"][rows, parent])
    for node in range(1, tokens.shape[1]):
        there = parents[:, node] >= 0
        ancestors[:, node] |= torch.where(there, ancestors[rows, parents[:, node].clamp(min=0)], 0)
    return DraftTree(
        tokens=tokens.contiguous(),
        parents=parents,
        depths=depths_of(parents),
        ancestors=ancestors,
        num_nodes=num_nodes,
        proposal=OneHotProposal() if draft_logits is None else DenseProposal(draft_logits),
        drawn=drawn,
        flags=torch.zeros_like(num_nodes),
        **links,
    )


def _named(function: Callable[..., Tensor], rule: str) -> Callable[..., Tensor]:
    function.rule = rule  # type: ignore[attr-defined]  # a function takes attributes, which its type cannot say
    if interpreter.interpreting():
        interpreter.repair()
        function.max_requests = INTERPRETED_REQUESTS  # type: ignore[attr-defined]
    return function


token = _named(functools.partial(_accept, "token"), "token")
block = _named(functools.partial(_accept, "block"), "block")
coupled = _named(functools.partial(_accept, "coupled"), "coupled")
# Temperature 0 is greedy under every rule.
greedy = _named(functools.partial(_accept, "token"), "greedy")
walk, recursive, traversal = (_named(functools.partial(_accept_tree, rule), rule) for rule in ("walk", "recursive", "traversal"))
greedy_tree = _named(functools.partial(_accept_tree, "walk"), "greedy_tree")


def _draft(
    noise: Noise, draft_logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, anchor_positions: Tensor
) -> Tensor:
    sampling = SamplingTensors(temperature, seeds)
    first = int((positions - anchor_positions)[0]) - 1 if len(seeds) else 0
    return draft_block(
        draft_logits[:, None],
        torch.zeros_like(seeds),
        anchor_positions=anchor_positions,
        sampling=sampling,
        first_draft=first,
        noise=noise,
    ).tokens[:, 0]


draft = functools.partial(_draft, "draft")
draft_coupled = functools.partial(_draft, "coupled")


def causal(confidence: Tensor) -> Tensor:
    """Lengths of policy "causal", a request scheduled alone: rows cost less and less."""
    requests, drafts = confidence.shape
    seconds = torch.tensor([0.0, *(0.01 + 0.002 * n**0.7 for n in range(drafts + 1))], device=confidence.device)
    zeros = torch.zeros(1, dtype=torch.int64, device=confidence.device)
    lengths = []
    for row in confidence.float().unique(dim=0, return_inverse=True)[0].split(1):
        block = DraftBlock(zeros.expand(1, drafts).contiguous(), OneHotProposal(), zeros.int(), confidence=row)
        layout = schedule_prefixes(block, CostTable(seconds), anchors=zeros, anchor_positions=zeros)
        lengths.append(layout.draft_lens)
    return torch.cat(lengths)[confidence.float().unique(dim=0, return_inverse=True)[1]]
