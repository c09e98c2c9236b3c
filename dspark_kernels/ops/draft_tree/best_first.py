"""draft_tree by the probability of paths: methods "best_first" and "conditioned".

Reference: reference/tree_draft.py.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import check_int, check_tensor, not_yet
from ...kernels.draft.args import Head, Latent, Selection
from ...kernels.draft_tree.args import (
    BlockSums,
    DepthScratch,
    LatentScratch,
    NodeConfidence,
    PathCounters,
    PathScratch,
    PathState,
    PathTree,
    PathWidths,
    PhaseCounters,
    RowScratch,
)
from ...kernels.sizes import NODE_FIELDS, TREE_MAX_GROUP, TREE_SUB_BLOCK, VOCAB_BLOCK
from ...launch import arch
from ...launch.draft import candidates as candidates_launch
from ...launch.draft_tree import best_first as launch
from ...library import Out
from ...types import DraftTree
from ...workspace import Workspace
from ..draft.args import (
    ConfidenceWeights,
    LatentHead,
    base_record,
    confidence_weights,
    has_latents,
    latent_room,
    weights_name,
    weights_of,
)
from ..draft.candidates import LEAST_GROUP, head_records, hidden_states, selection_of, unused_bits
from .inputs import Nodes, TreeCall, nodes_of

OP = "draft_tree"
NodeScratch = TypeVar("NodeScratch", PathScratch, DepthScratch)
NO_LATENTS = LatentScratch(None, None, None)  # until `_with_latents`
NEEDS, NEEDS_DENSE = "draft_tree paths", "draft_tree dense paths"


def _counters(take: workspaces.Take, requests: int, drafts: int) -> tuple[Tensor, PathCounters]:
    """Arrivals at rows, for `Selection`, and the others."""
    rows = take(requests * drafts, torch.int32)
    return rows, PathCounters(request_ptr=take(requests, torch.int32), status_ptr=take(requests * drafts, torch.int32))


def _scratch(
    take: workspaces.Take, requests: int, drafts: int, vocab: int, group: int, candidates: int, nodes: int, width: int
) -> tuple[Selection, BlockSums, PathScratch]:
    """Scratch on candidates, without latents. nodes: of a tree, width: candidates of a node, both padded."""
    positions, blocks = requests * drafts, -(-vocab // VOCAB_BLOCK)
    selection = selection_of(take, positions, vocab, group, candidates)
    scores, kept = take(positions, torch.float32), take(requests * NODE_FIELDS * nodes, torch.int32)
    sums = BlockSums(max_ptr=take(positions * blocks, torch.float32), sumexp_ptr=take(positions * blocks, torch.int64))
    logits = take(requests * nodes * width, torch.float32)
    return selection, sums, PathScratch(scores, kept, logits, NO_LATENTS)


@workspaces.declare(NEEDS)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    most = (LEAST_GROUP, launch.MAX_CANDIDATES, workspaces.padded_nodes(drafts), launch.MAX_CANDIDATES)
    return workspaces.measured(_counters, requests, drafts), workspaces.measured(_scratch, requests, drafts, vocab, *most)


def _dense_counters(take: workspaces.Take, requests: int) -> PhaseCounters:
    return PhaseCounters(*(take(requests, torch.int32) for _ in PhaseCounters._fields))


def _dense_scratch(
    take: workspaces.Take, requests: int, drafts: int, vocab: int, nodes: int, children: int
) -> tuple[DepthScratch, RowScratch]:
    """Scratch on the whole vocabulary, without latents. nodes: of a tree, padded; children: largest number per depth."""
    rows, sub_blocks = requests * children, -(-vocab // TREE_SUB_BLOCK)
    depths = DepthScratch(
        kept_ptr=take(requests * NODE_FIELDS * nodes, torch.int32),
        frontier_ptr=take(requests * nodes, torch.int32),
        sizes_ptr=take(requests * (drafts + 1), torch.int32),
        entries_ptr=take(requests * nodes, torch.float32),
        tokens_ptr=take(requests * nodes, torch.int32),
        score_ptr=take(requests * drafts, torch.float32),
        latents=NO_LATENTS,
    )
    return depths, RowScratch(
        sub_block_max_ptr=take(rows * sub_blocks, torch.float32),
        sub_block_sumexp_ptr=take(rows * sub_blocks, torch.int64),
        groups_ptr=take(rows * _row_words(vocab, children), torch.float32),
        chosen_ptr=take(rows * children, torch.int32),
        keys_ptr=take(rows * children, torch.float32),
        ids_ptr=take(rows * children, torch.int32),
    )


@workspaces.declare(NEEDS_DENSE)
def _dense_needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    most = (workspaces.padded_nodes(drafts), max(1, drafts))
    return workspaces.measured(_dense_counters, requests), workspaces.measured(_dense_scratch, requests, drafts, vocab, *most)


def _row_words(vocab: int, children: int) -> int:
    """Words per row: maxima of its max-groups, or the logits of as many groups as the node has children."""
    return max(-(-vocab // TREE_MAX_GROUP), children * TREE_MAX_GROUP)


def by_probability(call: TreeCall, out: DraftTree, workspace: Workspace | None) -> None:
    """Write the trees of a checked call with R >= 1 to `out`, whose content may be anything before."""
    if call.draft_to_target is not None:
        not_yet(OP, "draft_to_target", f"with method {call.method!r} it is")
    head = None if call.method == "best_first" else call.head
    if call.candidates is not None:
        check_int("candidates", call.candidates, low=1, high=launch.MAX_CANDIDATES)
    rows, drafts, vocab = call.base_logits.shape
    dense = head is not None and call.candidates is None
    if dense and vocab > TREE_MAX_GROUP * launch.MOST_GROUPS:
        not_yet(OP, "base_logits", f"a vocabulary of more than {TREE_MAX_GROUP * launch.MOST_GROUPS} ids without candidates is")
    device = call.base_logits.device
    if out.survival is not None:
        check_tensor("out.survival", out.survival, shape=tuple(out.tokens.shape), device=device)
    confidence, hidden = call.confidence, call.hidden
    confidence_head = confidence_weights(confidence)
    needs, most = NEEDS_DENSE if dense else NEEDS, max(drafts, call.num_nodes - 1)
    room = latent_room(head, rows, most, workspaces.node_latent_words)
    lent = workspaces.lend(needs, workspace, rows, most, vocab, device, **room)
    arguments = PathArguments(
        base_logits=call.base_logits,
        anchors=call.anchors,
        head=LatentHead(*weights_of(head)),
        hidden=hidden if confidence is not None or has_latents(head) else None,
        confidence_head=confidence_head,
        embeds=call.head.w1 if call.head is not None and confidence_head.with_markov(hidden) else None,
        temperature=None if call.sampling is None else call.sampling.temperature,
        node_budgets=call.node_budgets,
        state_indices=call.state_indices,
        tree=nodes_of(out),
        survival=out.survival,
        flags=out.flags,
        lent=lent,
    )
    if dense:
        _draft_paths_dense(arguments)
    else:
        candidates = 0 if call.candidates is None else call.candidates
        _draft_paths(CandidateArguments(arguments, candidates))


class PathArguments(NamedTuple):
    """`draft_paths_dense` as torch.library knows it."""

    base_logits: Tensor
    anchors: Tensor
    head: LatentHead
    hidden: Tensor | None
    confidence_head: ConfidenceWeights
    embeds: Tensor | None
    temperature: Tensor | None
    node_budgets: Tensor | None
    state_indices: Tensor | None
    tree: Nodes
    survival: Out[Tensor | None]
    flags: Out[Tensor]
    lent: workspaces.Lent

    def state(self) -> PathState:
        return PathState(
            anchors_ptr=self.anchors, stride_anchors=self.anchors.stride(0), slots_ptr=self.state_indices,
            temperature_ptr=self.temperature, budgets_ptr=self.node_budgets,
        )  # fmt: skip

    def confidence(self) -> NodeConfidence | None:
        weight, bias, sts_temperatures = self.confidence_head
        if weight is None:
            return None
        stride, vocab, rank = (0, 0, 0) if self.embeds is None else (self.embeds.stride(0), *self.embeds.shape)
        return NodeConfidence(
            weight_ptr=weight, bias_ptr=bias, sts_ptr=sts_temperatures, w1_ptr=self.embeds, stride_w1=stride, vocab=vocab,
            rank=rank,
        )  # fmt: skip

    def outputs(self) -> PathTree:
        return PathTree(**self.tree.pointers(), survival_ptr=self.survival, flags_ptr=self.flags)


class CandidateArguments(NamedTuple):
    """`draft_paths` as torch.library knows it. candidates: 0 = every id is a candidate."""

    paths: PathArguments
    candidates: int


@library.register("draft_paths", CandidateArguments)
def _draft_paths(arguments: CandidateArguments) -> None:
    a, candidates = arguments
    device = a.base_logits.device
    kernels = library.kernels("draft_tree.best_first", device)
    rows, drafts, vocab = a.base_logits.shape
    nodes, positions = a.tree.tokens.shape[1], rows * drafts
    whole = candidates == 0
    if whole:
        candidates = max(
            1, nodes - 1
        )  # a node can get no more children, and their distribution needs the sum of exponentials alone
    candidates = min(candidates, vocab)
    kind, head, latent = head_records(a.head)
    outputs = a.head.outputs
    gpu = arch.current(device)
    group = candidates_launch.sub_block_ids(vocab, candidates)
    config = launch.pick(gpu, vocab, candidates, nodes, a.head.rank, weights_name(a.head.w2), outputs, group)

    row_arrivals, counters = _counters(workspaces.Carver(a.lent.counters, workspaces.RESERVED).take, rows, drafts)
    take = workspaces.Carver(a.lent.scratch).take
    sizes = (config.group, candidates, config.nodes, config.width)
    selection, sums, scratch = _scratch(take, rows, drafts, vocab, *sizes)
    selection = selection._replace(arrivals_ptr=row_arrivals)
    latent_items = kernels.latent_programs(positions, outputs)
    parts = candidates_launch.parts(gpu, positions, -(-vocab // config.block))
    kernels.launch_draft_paths(
        latent_items + positions * parts,
        (
            base_record(a.base_logits), a.state(), head, latent, hidden_states(a.hidden), a.confidence(), a.outputs(),
            sums if whole else None, selection, _with_latents(scratch, take, head, latent, positions, rows * config.nodes),
            counters, rows, a.anchors.shape[0], drafts, nodes, PathWidths(vocab, candidates), latent_items, parts,
        ),
        kind=kind,
        blocks=launch.padded(-(-vocab // VOCAB_BLOCK)) if whole else 0,
        shift=unused_bits(a.base_logits, None),
        config=config,
    )  # fmt: skip


@library.register("draft_paths_dense", PathArguments)
def _draft_paths_dense(a: PathArguments) -> None:
    device = a.base_logits.device
    kernels = library.kernels("draft_tree.best_first_dense", device)
    rows, drafts, vocab = a.base_logits.shape
    nodes, outputs = a.tree.tokens.shape[1], a.head.outputs
    kind, head, latent = head_records(a.head)
    gpu = arch.current(device)
    config = launch.pick_dense(gpu, vocab, nodes, a.head.rank, weights_name(a.head.w2), outputs > 0)
    counters = _dense_counters(workspaces.Carver(a.lent.counters, workspaces.RESERVED).take, rows)
    take, children = workspaces.Carver(a.lent.scratch).take, max(1, nodes - 1)
    depths, row_scratch = _dense_scratch(take, rows, drafts, vocab, config.nodes, children)
    latent_items = kernels.latent_programs(rows * drafts, outputs)
    parts = launch.dense_parts(gpu, rows, -(-vocab // TREE_SUB_BLOCK))
    kernels.launch_draft_paths_dense(
        latent_items + rows * (2 + drafts * parts + (drafts - 1) * children),
        (
            base_record(a.base_logits), a.state(), head, latent, hidden_states(a.hidden), a.confidence(), a.outputs(),
            a.lent.counters[1:2].view(torch.int32), counters,
            _with_latents(depths, take, head, latent, rows * drafts, rows * config.nodes),
            row_scratch, rows, a.anchors.shape[0], drafts, nodes, vocab, _row_words(vocab, children), latent_items, parts,
        ),
        kind=kind,
        config=config,
    )  # fmt: skip


def _with_latents(
    scratch: NodeScratch,
    take: workspaces.Take,
    head: Head | None,
    latent: Latent | None,
    products: int,
    nodes: int,
) -> NodeScratch:
    """The scratch with room for a gated or rnn head: products with all hidden states, and latents of the nodes of all trees."""
    precomputed = latents = states = scratch.score_ptr  # without a latent nobody reads them
    if head is not None and latent is not None:
        sizes = (products, nodes, 2 * nodes, head.rank, latent.outputs // head.rank)
        precomputed, latents, states = workspaces.latents_of(take, *sizes)
    return scratch._replace(latents=LatentScratch(precomputed, latents, latents if states is None else states))
