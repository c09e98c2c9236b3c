"""draft_tree by the probability of paths: methods "best_first" and "conditioned".

Oracle: reference/tree_draft.py.
"""

from __future__ import annotations

import torch

from ... import library, workspace as workspaces
from ...checks import check_int, check_tensor, not_yet
from ...kernels.draft.args import BaseLogits, Selection
from ...kernels.draft_tree.args import (
    BlockSums,
    DepthScratch,
    NodeConfidence,
    PathCounters,
    PathScratch,
    PathState,
    PathTree,
    RowScratch,
    WaveCounters,
)
from ...launch import arch
from ...launch.draft import candidates as candidates_launch
from ...launch.draft_tree import best_first as launch
from ...types import DraftTree, GatedMarkovHead, RnnMarkovHead
from ...workspace import Workspace
from ..draft.candidates import LEAST_GROUP, _units, head_records, hidden_states
from .inputs import TreeCall

OP = "draft_tree"
NEEDS, NEEDS_DENSE = "draft_tree paths", "draft_tree dense paths"
FIELDS = 9  # int32 words per node, as in kernels/draft_tree/nodes.py
LEAF = launch.LEAF
# Low bits that no value of a dtype sets in fp32: keys of such logits are told apart without them.
UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@workspaces.declare(NEEDS)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    rows, words, int32 = requests * drafts, workspaces.words_of, torch.int32
    counters = words(requests, int32) + 2 * words(rows, int32)
    scratch = words(rows * _units(vocab, LEAST_GROUP), int32) + 2 * words(rows * launch.MAX_CANDIDATES, int32)
    scratch += words(2 * rows, int32) + words(rows, int32) + words(requests * FIELDS * workspaces.padded_nodes(drafts), int32)
    scratch += words(requests * workspaces.padded_nodes(drafts) * launch.MAX_CANDIDATES, int32)
    return counters, scratch + words(rows * -(-vocab // LEAF), int32) + words(rows * -(-vocab // LEAF), torch.int64)


@workspaces.declare(NEEDS_DENSE)
def _dense_needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    words, int32 = workspaces.words_of, torch.int32
    children = max(1, drafts)
    nodes, rows = workspaces.padded_nodes(drafts), requests * children
    per_request = 3 * words(requests * nodes, int32) + words(requests * (drafts + 1), int32) + words(requests * drafts, int32)
    per_row = words(rows * -(-vocab // launch.UNIT), int32) + words(rows * -(-vocab // launch.UNIT), torch.int64)
    per_row += words(rows * _row_words(vocab, children), int32) + 3 * words(rows * children, int32)
    return 5 * words(requests, int32), per_request + per_row + words(requests * FIELDS * nodes, int32)


def _row_words(vocab: int, children: int) -> int:
    """Maxima of a row's groups, or the logits of as many groups as it has children."""
    return max(-(-vocab // launch.GROUP), children * launch.GROUP)


def by_probability(call: TreeCall, out: DraftTree, workspace: Workspace | None) -> None:
    """Write the trees of a checked call with R >= 1 to `out`, whose slots may hold anything."""
    if call.draft_to_target is not None:
        not_yet(OP, "draft_to_target", "a reduced draft vocabulary in trees of paths is")
    head = None if call.method == "best_first" else call.head
    if call.candidates is not None:
        check_int("candidates", call.candidates, low=1, high=launch.MAX_CANDIDATES)
    rows, drafts, vocab = call.base_logits.shape
    dense = head is not None and call.candidates is None
    if dense and vocab > launch.GROUP * launch.MOST_GROUPS:
        not_yet(OP, "base_logits", f"a vocabulary of more than {launch.GROUP * launch.MOST_GROUPS} ids without candidates is")
    device = call.base_logits.device
    if out.survival is not None:
        check_tensor("out.survival", out.survival, shape=tuple(out.tokens.shape), device=device)
    weight = bias = None
    if isinstance(head, GatedMarkovHead):
        weight, bias = head.gate_weight, head.gate_bias
    elif isinstance(head, RnnMarkovHead):
        weight, bias = head.joint_weight, head.joint_bias
    confidence, hidden = call.confidence, call.hidden
    embeds = None
    if confidence is not None and confidence.weight.shape[0] > hidden.shape[2]:
        embeds = call.head.w1
    counters, scratch = _lend(workspace, dense, rows, max(drafts, call.num_nodes - 1), vocab, head, weight, device)
    arguments = (
        call.base_logits,
        call.anchors,
        None if head is None else head.w1,
        None if head is None else head.w2,
        None if head is None else head.w2_scale,
        weight,
        bias,
        hidden if confidence is not None or weight is not None else None,
        None if confidence is None else confidence.weight,
        None if confidence is None else confidence.bias,
        None if confidence is None else confidence.sts_temperatures,
        embeds,
        None if call.sampling is None else call.sampling.temperature,
        call.node_budgets,
        call.state_indices,
        *(getattr(out, name) for name in TREE),
        out.flags,
        counters,
        scratch,
    )
    if dense:
        _draft_paths_dense(*arguments)
    else:
        _draft_paths(*arguments, 0 if call.candidates is None else call.candidates)


TREE = ("tokens", "parents", "depths", "first_child", "next_sibling", "ancestors", "num_nodes", "survival")


def _lend(workspace, dense, rows, drafts, vocab, head, weight, device):
    needs = NEEDS_DENSE if dense else NEEDS
    if weight is None:
        return workspaces.lend(needs, workspace, rows, drafts, vocab, device)
    counters, scratch = (_dense_needs if dense else _needs)(rows, drafts, vocab)
    scratch += workspaces.node_latent_words(rows, drafts, head.rank, weight.shape[0] // head.rank)
    message = f"expected room for {rows} requests x {drafts} drafts over {vocab} ids and markov_rank={head.rank}"
    return workspaces.lend_words(workspace, counters, scratch, device, message)


SCHEMA = (
    "Tensor base_logits, Tensor anchors, Tensor? w1, Tensor? w2, Tensor? w2_scale, Tensor? latent_weight, "
    "Tensor? latent_bias, Tensor? hidden, Tensor? weight, Tensor? bias, Tensor? sts_temperatures, Tensor? embeds, "
    "Tensor? temperature, Tensor? node_budgets, Tensor? state_indices, Tensor(a!) tokens, Tensor(b!) parents, Tensor(c!) depths, "
    "Tensor(d!) first_child, Tensor(e!) next_sibling, Tensor(f!) ancestors, Tensor(g!) num_nodes, Tensor(h!)? survival, "
    "Tensor(i!) flags, Tensor(j!) counters, Tensor(k!) scratch"
)


@library.register(f"draft_paths({SCHEMA}, int candidates) -> ()")
def _draft_paths(
    base_logits, anchors, w1, w2, w2_scale, latent_weight, latent_bias, hidden, weight, bias, sts_temperatures, embeds,
    temperature, node_budgets, state_indices, tokens, parents, depths, first_child, next_sibling, ancestors, num_nodes, survival,
    flags, counters, scratch, candidates,
):  # fmt: skip
    device = base_logits.device
    kernels = library.kernels("draft_tree.best_first", device)
    rows, drafts, vocab = base_logits.shape
    nodes, positions = tokens.shape[1], rows * drafts
    whole = candidates == 0
    if whole:
        candidates = max(1, nodes - 1)  # a node can get no more children, and their law needs the mass alone
    candidates = min(candidates, vocab)
    kind, head, latent = head_records(w1, w2, w2_scale, latent_weight, latent_bias)
    rank = 0 if w1 is None else w1.shape[1]
    outputs = 0 if latent is None else latent.outputs
    gpu = arch.current(device)
    weights = "bfloat16" if w2 is None else str(w2.dtype).removeprefix("torch.")
    group = candidates_launch.unit_ids(vocab, candidates)
    config = launch.pick(gpu, vocab, candidates, nodes, rank, weights, outputs, group)

    clean = workspaces.Carver(counters, workspaces.RESERVED)
    counted = PathCounters(
        row_ptr=clean.take(positions, torch.int32),
        request_ptr=clean.take(rows, torch.int32),
        status_ptr=clean.take(positions, torch.int32),
    )
    take = workspaces.Carver(scratch).take
    selection = Selection(
        keys_ptr=take(positions * _units(vocab, config.group), torch.int32),
        units_ptr=take(positions * candidates, torch.int32),
        ids_ptr=take(positions * candidates, torch.int32),
        bounds_ptr=take(2 * positions, torch.int32),
    )
    scores, kept = take(positions, torch.float32), take(rows * FIELDS * config.nodes, torch.int32)
    num_leaves, leaves = -(-vocab // LEAF), None
    if whole:
        leaves = BlockSums(
            max_ptr=take(positions * num_leaves, torch.float32), sumexp_ptr=take(positions * num_leaves, torch.int64)
        )  # fmt: skip
    logits = take(rows * config.nodes * config.width, torch.float32)
    products = latents = states = scores  # without a latent nobody reads them
    if latent is not None:
        products = take(positions * outputs, torch.float32)
        latents = take(rows * config.nodes * rank, torch.float32)
        states = take(2 * rows * config.nodes * rank, torch.float32) if kind == "rnn" else latents
    latent_items = kernels.latent_programs(positions, outputs)
    parts = candidates_launch.parts(gpu, positions, -(-vocab // config.block))
    kernels.launch_draft_paths(
        latent_items + positions * parts,
        (
            BaseLogits(ptr=base_logits, stride_request=base_logits.stride(0), stride_position=base_logits.stride(1)),
            _state(anchors, state_indices, temperature, node_budgets),
            head, latent, hidden_states(hidden), _confidence(weight, bias, sts_temperatures, embeds),
            _tree(tokens, parents, depths, first_child, next_sibling, ancestors, num_nodes, survival, flags),
            leaves, selection,
            PathScratch(
                score_ptr=scores, kept_ptr=kept, logits_ptr=logits, products_ptr=products, latent_ptr=latents, states_ptr=states
            ),
            counted, rows, anchors.shape[0], drafts, nodes, vocab, candidates, latent_items, parts,
        ),
        kind=kind,
        leaves=launch.padded(num_leaves) if whole else 0,
        shift=UNUSED_BITS[base_logits.dtype],
        config=config,
    )  # fmt: skip


@library.register(f"draft_paths_dense({SCHEMA}) -> ()")
def _draft_paths_dense(
    base_logits, anchors, w1, w2, w2_scale, latent_weight, latent_bias, hidden, weight, bias, sts_temperatures, embeds,
    temperature, node_budgets, state_indices, tokens, parents, depths, first_child, next_sibling, ancestors, num_nodes, survival,
    flags, counters, scratch,
):  # fmt: skip
    device = base_logits.device
    kernels = library.kernels("draft_tree.best_first_dense", device)
    rows, drafts, vocab = base_logits.shape
    nodes, rank = tokens.shape[1], w1.shape[1]
    kind, head, latent = head_records(w1, w2, w2_scale, latent_weight, latent_bias)
    outputs = 0 if latent is None else latent.outputs
    gpu = arch.current(device)
    config = launch.pick_dense(gpu, vocab, nodes, rank, str(w2.dtype).removeprefix("torch."), outputs > 0)
    clean = workspaces.Carver(counters, workspaces.RESERVED)
    counted = WaveCounters(*(clean.take(rows, torch.int32) for _ in WaveCounters._fields))
    take, int32, fp32 = workspaces.Carver(scratch).take, torch.int32, torch.float32
    kept = take(rows * FIELDS * config.nodes, int32)
    frontier, sizes = take(rows * config.nodes, int32), take(rows * (drafts + 1), int32)
    entries, known = take(rows * config.nodes, fp32), take(rows * config.nodes, int32)
    scores = take(rows * drafts, fp32)
    children = max(1, nodes - 1)
    positions, units, stride = rows * children, -(-vocab // launch.UNIT), _row_words(vocab, children)
    row_scratch = RowScratch(
        unit_max_ptr=take(positions * units, fp32),
        unit_sumexp_ptr=take(positions * units, torch.int64),
        groups_ptr=take(positions * stride, fp32),
        chosen_ptr=take(positions * children, int32),
        keys_ptr=take(positions * children, fp32),
        ids_ptr=take(positions * children, int32),
    )
    products = latents = states = scores  # without a latent nobody reads them
    if latent is not None:
        products, latents = take(rows * drafts * outputs, fp32), take(rows * config.nodes * rank, fp32)
        states = take(2 * rows * config.nodes * rank, fp32) if kind == "rnn" else latents
    latent_items = kernels.latent_programs(rows * drafts, outputs)
    parts = launch.dense_parts(gpu, rows, units)
    kernels.launch_draft_paths_dense(
        latent_items + rows * (2 + drafts * parts + (drafts - 1) * children),
        (
            BaseLogits(ptr=base_logits, stride_request=base_logits.stride(0), stride_position=base_logits.stride(1)),
            _state(anchors, state_indices, temperature, node_budgets),
            head, latent, hidden_states(hidden), _confidence(weight, bias, sts_temperatures, embeds),
            _tree(tokens, parents, depths, first_child, next_sibling, ancestors, num_nodes, survival, flags),
            counters[1:2].view(torch.int32), counted,
            DepthScratch(
                kept_ptr=kept, frontier_ptr=frontier, sizes_ptr=sizes, entries_ptr=entries, tokens_ptr=known, score_ptr=scores,
                products_ptr=products, latent_ptr=latents, states_ptr=states,
            ),
            row_scratch, rows, anchors.shape[0], drafts, nodes, vocab, stride, latent_items, parts,
        ),
        kind=kind,
        config=config,
    )  # fmt: skip


def _state(anchors, state_indices, temperature, node_budgets) -> PathState:
    return PathState(
        anchors_ptr=anchors, stride_anchors=anchors.stride(0), slots_ptr=state_indices, temperature_ptr=temperature,
        budgets_ptr=node_budgets,
    )  # fmt: skip


def _tree(tokens, parents, depths, first_child, next_sibling, ancestors, num_nodes, survival, flags) -> PathTree:
    return PathTree(
        tokens_ptr=tokens, parents_ptr=parents, depths_ptr=depths, first_child_ptr=first_child, next_sibling_ptr=next_sibling,
        ancestors_ptr=ancestors, num_nodes_ptr=num_nodes, survival_ptr=survival, flags_ptr=flags,
    )  # fmt: skip


def _confidence(weight, bias, sts_temperatures, embeds) -> NodeConfidence | None:
    if weight is None:
        return None
    stride, vocab, rank = (0, 0, 0) if embeds is None else (embeds.stride(0), *embeds.shape)
    return NodeConfidence(
        weight_ptr=weight, bias_ptr=bias, sts_ptr=sts_temperatures, w1_ptr=embeds, stride_w1=stride, vocab=vocab, rank=rank
    )  # fmt: skip
