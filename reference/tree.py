"""Lossless acceptance of draft trees, rule by rule as in the papers, over a source of acceptance uniforms and draws.

    walk       y ~ p_v; go to the first child whose token is y, else emit y. For deterministic trees, or any other.
    recursive  (SpecInfer, arXiv 2305.09781; without replacement Sequoia, arXiv 2402.12374): child j is accepted while
               u q_j(x) < p(x); else p <- norm [p - q_j]+ and the next child is tried; after the last child y ~ p.
    traversal  (arXiv 2505.12398): depth first, from the leaves to the root; a node has (P_v, M_v), at first (P_root = 1, p_v);
               P_child = min(1, P_v M_v(x) / q_j(x)). A node without children left is accepted while u < P, then y ~ M. A rejected
               child is deleted: Z = sum [P_v M_v - q_j]+, M_v <- [P_v M_v - q_j]+ / Z, P_v <- Z / (Z + 1 - P_v) (0/0 = 1).
    greedy     the walk with y = argmax p_v.

Symbols: p_v target distribution after node v (after temperature), q_j the distribution that child j was drawn from given its elder
siblings (without replacement: their tokens removed, renormalised), x a child's token, P_v prefix probability, u acceptance uniforms
in (0, 1). Comparisons are strict.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.types import Acceptance, DraftTree, Flag, OneHotProposal, SamplingTensors, VerifyLayout

from .decisions import Decisions
from .distributions import Lazy, column_ids, distribution_of, draft_distribution, draft_scale, log_prob, point_mass
from .layout import refuse_lone_anchors
from .logits import inverse_temperature, read_logits, refuse_repeated
from .sampling import adjust, filtered, of_scaled_target
from .sources import PhiloxSource, Source


class Nodes(NamedTuple):
    """A tree: token of every node (node 0 = the anchor) and its children, elder siblings first."""

    tokens: Sequence[int]
    children: Sequence[Sequence[int]]


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """The nodes from the root's child to `node`; none for the root."""
    path = []
    while 0 < node:
        path.insert(0, node)
        node = parents[node] if parents[node] < node else 0
    return path


def nodes_of(tokens: Sequence[int], parents: Sequence[int]) -> Nodes:
    """parents[v] < v; the root's is -1."""
    children: list[list[int]] = [[] for _ in tokens]
    for node, parent in enumerate(parents[: len(tokens)]):
        if 0 <= parent < node:
            children[parent].append(node)
    return Nodes(tokens, children)


class TreeVerdict(NamedTuple):
    """The nodes of `path` (from the root, 0) stay, then `token`. bad_draft: a child of the last one could not be accepted."""

    path: tuple[int, ...]
    token: int
    empty_residual: bool = False
    bad_draft: bool = False


def _impossible(draft_probs: Tensor, token: int) -> bool:
    """Whether a child's token could not have been drawn."""
    return not 0 <= token < draft_probs.shape[0] or float(draft_probs[token]) <= 0


def _any_impossible(node: int, draft_probs, tree: Nodes) -> bool:
    return any(_impossible(draft_probs[child], tree.tokens[child]) for child in tree.children[node])


def walk_rule(target_probs, draft_probs, tree: Nodes, source: Source, anchor_position: int) -> TreeVerdict:
    """Sample the target along the tree; the draft distributions are not read."""
    path = [0]
    while True:
        node = path[-1]
        token = source.draw(anchor_position + len(path), target_probs[node], node=node)
        following = next((child for child in tree.children[node] if tree.tokens[child] == token), None)
        if following is None:
            return TreeVerdict(tuple(path), token, bad_draft=_outside(node, target_probs[node].shape[0], tree))
        path.append(following)


def _outside(node: int, vocab: int, tree: Nodes) -> bool:
    """Whether a child's token is outside the vocabulary, so that no draw can lead there."""
    return any(not 0 <= tree.tokens[child] < vocab for child in tree.children[node])


def recursive_rule(target_probs, draft_probs, tree: Nodes, source: Source, anchor_position: int) -> TreeVerdict:
    """Try the children of a node one after another, each against the residual that the rejected ones leave."""
    path = [0]
    while True:
        node, residual = path[-1], target_probs[path[-1]]
        for child in tree.children[node]:
            token, proposed = tree.tokens[child], draft_probs[child]
            if not _impossible(proposed, token) and source.accepts(
                anchor_position + len(path), float(proposed[token]), float(residual[token]), node=child
            ):
                path.append(child)
                break
            residual = (residual - proposed).clamp(min=0)
            residual_sum = float(residual.sum())
            residual = residual / residual_sum if residual_sum > 0 else residual
        else:
            empty = float(residual.sum()) <= 0
            token = source.draw(anchor_position + len(path), target_probs[node] if empty else residual, node=node)
            return TreeVerdict(tuple(path), token, empty, _any_impossible(node, draft_probs, tree))


def traversal_rule(target_probs, draft_probs, tree: Nodes, source: Source, anchor_position: int) -> TreeVerdict:
    """Test nodes without children, deepest first; a node is tested when all its children were rejected."""

    def visit(path: tuple[int, ...], prefix_prob: float) -> TreeVerdict | None:
        """The verdict where the subtree of path[-1] has an accepted node; None where all of it is rejected."""
        node, position = path[-1], anchor_position + len(path) - 1
        residual = target_probs[node]
        numerator, denominator = prefix_prob, 1.0
        for child in tree.children[node]:
            token, proposed = tree.tokens[child], draft_probs[child]
            child_prob = 0.0
            if not _impossible(proposed, token):
                child_prob = min(1.0, prefix_prob * float(residual[token]) / float(proposed[token]))
            verdict = visit((*path, child), child_prob)
            if verdict is not None:
                return verdict
            residual = (prefix_prob * residual - proposed).clamp(min=0)
            numerator = float(residual.sum())
            denominator = numerator + 1.0 - prefix_prob
            residual = residual / numerator if numerator > 0 else residual
            prefix_prob = numerator / denominator if denominator > 0 else 1.0
        certain = node == 0 or denominator <= 0  # there is nothing left to go back to
        if not certain and not source.accepts(position, denominator, numerator, node=node):
            return None
        empty = float(residual.sum()) <= 0
        token = source.draw(position + 1, target_probs[node] if empty else residual, node=node)
        return TreeVerdict(path, token, empty, _any_impossible(node, draft_probs, tree))

    return visit((0,), 1.0)


def greedy_rule(target_probs, draft_probs, tree: Nodes, source: Source, anchor_position: int) -> TreeVerdict:
    """Follow the target's most probable tokens."""
    path = [0]
    while True:
        probs = target_probs[path[-1]]
        token = int(torch.argmax((probs == probs.max()).int()))
        following = next((child for child in tree.children[path[-1]] if tree.tokens[child] == token), None)
        if following is None:
            return TreeVerdict(tuple(path), token, bad_draft=_outside(path[-1], probs.shape[0], tree))
        path.append(following)


RULES = {"walk": walk_rule, "recursive": recursive_rule, "traversal": traversal_rule, "greedy": greedy_rule}


def sibling_distributions(
    probs: Tensor, tokens: Sequence[int], drawn: str, outside: dict[int, float] | None = None
) -> list[Tensor]:
    """The distribution that each of a node's children was drawn from, given its elder siblings.

    probs [V]: that of the first child. outside: probabilities of ids outside the vocabulary, which the drafter drew from too.
    """
    found, outside = [], dict(outside or {})
    for token in tokens:
        if drawn == "one_hot":
            probs = torch.zeros_like(probs)
            if 0 <= token < probs.shape[0]:
                probs[token] = 1.0
        found.append(probs)
        if drawn == "without_replacement":
            probs = probs.clone()
            if 0 <= token < probs.shape[0]:
                probs[token] = 0.0
            outside.pop(token, None)
            rest = float(probs.sum()) + sum(outside.values())
            if rest > 0:
                probs, outside = probs / rest, {id: prob / rest for id, prob in outside.items()}
    return found


def _outside_probs(proposal, slot: int, node: int, scale: float, vocab: int) -> dict[int, float]:
    """Probabilities of the ids outside the vocabulary in a node's draft distribution."""
    by_column = distribution_of(read_logits(proposal.logits[slot, node])[0], scale)
    ids = column_ids(proposal, slot, node)
    found: dict[int, float] = {}
    for id, prob in zip(range(by_column.shape[0]) if ids is None else ids.tolist(), by_column.tolist(), strict=True):
        if not 0 <= id < vocab:
            found[id] = found.get(id, 0.0) + prob
    return found


class _GreedySource:
    """Answers a draw by the arg-max of the node's logits, and records its margin."""

    def __init__(self, rows, decisions: Decisions, request: int):
        self._rows, self._decisions, self._request = rows, decisions, request

    def draw(self, position: int, weights: Tensor, node: int = 0) -> int:
        return self._decisions.pick(self._request, "greedy", self._rows[node])


class TreeRequest(NamedTuple):
    """One request: its tree and the target rows that verify it."""

    request: int  # batch row
    slot: int
    nodes: Nodes
    position: int  # of the anchor
    rows: list[Tensor]  # by node, fp64 [V], after all sampling settings but temperature
    row_flags: Sequence[int]
    scale: float  # 1 / temperature, 0: greedy


def accept_tree(
    target_logits: Tensor,
    layout: VerifyLayout,
    tree: DraftTree,
    *,
    sampling: SamplingTensors | None = None,
    rule: str = "walk",
    target_scaled: bool = False,
    logprobs: str | None = None,
    anchors: Tensor | None = None,
    anchor_positions: Tensor | None = None,
    state_indices: Tensor | None = None,
    out: Acceptance | None = None,
    workspace=None,
    decisions: Decisions | None = None,
) -> Acceptance:
    """The op's arguments and result (dspark_kernels.ops.tree), plus `decisions` to record margins.

    Node m of a request is its m-th logit row, with the token of the layout's row; nodes without a row do not exist. A greedy
    request, and every deterministic tree, is verified by the walk under each rule: there the three rules emit the same
    distribution. Children of a node without a finite logit are not looked at. Sampling settings count as emitted the tokens on a
    node's own path: the nodes from the anchor's child to the node itself, not their siblings; the anchor is counted with the
    earlier tokens. Draft distributions are read as stored.
    """
    for name, value in (("out", out), ("workspace", workspace)):
        if value is not None:
            raise ValueError(f"{name}: expected None, the reference allocates its results, got {type(value).__name__}")
    if rule not in ("walk", "recursive", "traversal"):
        raise ValueError(f"rule: expected one of 'walk', 'recursive', 'traversal', got {rule!r}")
    refuse_lone_anchors(anchors, anchor_positions)
    refuse_repeated(getattr(tree.proposal, "draft_to_target", None), target_logits.shape[1])
    if logprobs not in (None, "raw", "processed"):
        raise ValueError(f"logprobs: expected one of None, 'raw', 'processed', got {logprobs!r}")
    decisions = Decisions() if decisions is None else decisions
    if target_scaled:
        sampling, proposal = of_scaled_target(sampling, tree.proposal)
        tree = dataclasses.replace(tree, proposal=proposal)
    device, batch, nodes = target_logits.device, layout.draft_lens.shape[0], tree.tokens.shape[1]
    result = Acceptance(
        tokens=torch.full((batch, nodes), -1, dtype=torch.int64, device=device),
        **{
            name: torch.zeros(batch, dtype=torch.int32, device=device)
            for name in ("num_accepted", "num_emitted", "num_rejected", "last_row", "flags")
        },
        next_token=torch.full((batch,), -1, dtype=torch.int64, device=device),
        commit_mask=torch.zeros(layout.token_ids.shape[0], dtype=torch.bool, device=device),
        path=torch.full((batch, nodes), -1, dtype=torch.int32, device=device),
        kv_source=torch.full((batch, nodes), -1, dtype=torch.int32, device=device),
        logprobs=None if logprobs is None else torch.zeros(batch, nodes, device=device),
    )
    offsets, starts = layout.cu_num_logits.tolist(), layout.query_start_loc.tolist()
    row_of, ids = layout.logits_indices.tolist(), layout.token_ids.tolist()
    for r in range(batch):
        slot = r if state_indices is None else int(state_indices[r])
        if not 0 <= slot < tree.tokens.shape[0]:
            continue
        first, count = offsets[r], min(offsets[r + 1] - offsets[r], nodes)
        if count <= 0:
            result.commit_mask[starts[r] : starts[r + 1]] = True  # a prefill chunk that does not emit keeps its rows
            continue
        forward = row_of[first : first + count]
        links, tokens = tree.parents[slot, :count].tolist(), [ids[row] for row in forward]
        raw = [target_logits[first + m] for m in range(count)]
        # fp32 as the kernels have it, because what is adjusted is an input of the rules.
        adjusted = [
            adjust(row.float(), sampling, slot, first + m, [tokens[node] for node in path_to(links, m)])
            for m, row in enumerate(raw)
        ]
        rows, row_flags = zip(*map(read_logits, adjusted), strict=True)
        scale = inverse_temperature(float(sampling.temperature[slot])) if sampling is not None else 0.0
        rows = [filtered(row, scale, sampling, slot, decisions, r) for row in rows]
        parents = [-1 if 0 <= p < count and row_flags[p] & Flag.NONFINITE_ROW else p for p in links]
        shape = nodes_of(tokens, parents)
        position = int(layout.positions[forward[0]])
        request = TreeRequest(r, slot, shape, position, rows, row_flags, scale)
        verdict = _verify(request, tree, sampling, rule, decisions)
        n = len(verdict.path) - 1
        result.path[r, : n + 1] = torch.tensor(verdict.path, dtype=torch.int32)
        result.kv_source[r, : n + 1] = torch.tensor([forward[node] for node in verdict.path], dtype=torch.int32)
        result.tokens[r, : n + 1] = torch.tensor([*(shape.tokens[node] for node in verdict.path[1:]), verdict.token])
        result.next_token[r] = verdict.token
        result.num_accepted[r], result.num_emitted[r], result.num_rejected[r] = n, n + 1, count - 1 - n
        result.last_row[r] = forward[verdict.path[-1]]
        if logprobs is not None:
            for j, node in enumerate(verdict.path):
                row = read_logits(raw[node])[0] if logprobs == "raw" else rows[node]
                result.logprobs[r, j] = log_prob(row, int(result.tokens[r, j]), 1.0 if logprobs == "raw" else scale)
        result.commit_mask[starts[r] : forward[0]] = True
        result.commit_mask[[forward[node] for node in verdict.path]] = True
        result.flags[r] = (
            (Flag.NAN if any(row_flags[node] & Flag.NAN for node in verdict.path) else 0)
            | (row_flags[verdict.path[-1]] & Flag.NONFINITE_ROW)
            | (Flag.BAD_TOKEN_ID if verdict.bad_draft else 0)
            | (Flag.EMPTY_RESIDUAL if verdict.empty_residual else 0)
        )
        if anchors is not None:
            anchors[slot] = verdict.token
        if anchor_positions is not None:
            anchor_positions[slot] = position + n + 1
    return result


def _verify(
    request: TreeRequest, tree: DraftTree, sampling: SamplingTensors | None, rule: str, decisions: Decisions
) -> TreeVerdict:
    """Apply the rule to one request."""
    rows, nodes, scale = request.rows, request.nodes, request.scale
    if scale == 0:
        return walk_rule(rows, None, nodes, _GreedySource(rows, decisions, request.request), request.position)

    def target_probs(node: int) -> Tensor:
        if request.row_flags[node] & Flag.NONFINITE_ROW:
            return point_mass(int(torch.argmax((rows[node] > -math.inf).int())), rows[node])
        return distribution_of(rows[node], scale)

    source = PhiloxSource(int(sampling.seed[request.slot]), request.position, decisions, request.request)
    random = not isinstance(tree.proposal, OneHotProposal) and tree.drawn != "one_hot"
    random = random and draft_scale(tree.proposal, request.slot, scale) > 0
    if not random or rule == "walk":
        return walk_rule(Lazy(target_probs), None, nodes, source, request.position)
    draft_probs = _draft_probs(request, tree)
    return RULES[rule](Lazy(target_probs), draft_probs, nodes, source, request.position)


def _draft_probs(request: TreeRequest, tree: DraftTree) -> dict[int, Tensor]:
    """By child, the distribution that it was drawn from."""
    vocab, device = request.rows[0].shape[0], request.rows[0].device
    own_scale = draft_scale(tree.proposal, request.slot, request.scale)
    found: dict[int, Tensor] = {}
    for node, children in enumerate(request.nodes.children):
        if children:
            probs = draft_distribution(tree.proposal, request.slot, node, 0, scale=request.scale, vocab=vocab, device=device)
            tokens = [request.nodes.tokens[child] for child in children]
            outside = _outside_probs(tree.proposal, request.slot, node, own_scale, vocab)
            found.update(zip(children, sibling_distributions(probs, tokens, tree.drawn, outside), strict=True))
    return found
