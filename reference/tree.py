"""Lossless acceptance of draft trees, in the words of their papers, over a source of coins and draws.

    walk       y ~ p_v; go to the first child whose token is y, else emit y. For trees made without chance, or any other.
    recursive  (SpecInfer, arXiv 2305.09781; without replacement Sequoia, arXiv 2402.12374): child j is accepted while
               u q_j(x) < p(x); else p <- norm [p - q_j]+ and the next child is tried; after the last child y ~ p.
    traversal  (arXiv 2505.12398): depth first, leaf to root, a node keeps (P_v, M_v), at first (P_root = 1, p_v);
               P_child = min(1, P_v M_v(x) / q_j(x)). A leaf is accepted while u < P, then y ~ M. A rejected child is deleted:
               Z = sum [P_v M_v - q_j]+, M_v <- [P_v M_v - q_j]+ / Z, P_v <- Z / (Z + 1 - P_v) (0/0 = 1).
    greedy     the walk with y = argmax p_v.

Symbols: p_v target law after node v (after temperature), q_j the law that child j was drawn from given its elder siblings (without
replacement: their tokens removed, renormalised), x a child's token, u coins in (0, 1), which compare strictly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.types import Acceptance, DraftTree, Flag, OneHotProposal, SamplingTensors, SparseProposal, VerifyLayout

from .accept import _draft_law as draft_law, _log_prob as log_prob, law_of
from .decisions import Decisions
from .logits import inverse_temperature, read_logits
from .sampling import adjust, filtered
from .sources import PhiloxSource, Source


class Nodes(NamedTuple):
    """A tree: token of every node (node 0 = the anchor) and its children, elder siblings first."""

    tokens: Sequence[int]
    children: Sequence[Sequence[int]]


def way(parents: Sequence[int], node: int) -> list[int]:
    """The nodes from the root's child to `node`; none for the root."""
    found = []
    while 0 < node:
        found.insert(0, node)
        node = parents[node] if parents[node] < node else 0
    return found


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


def _impossible(law: Tensor, draft_prob: Tensor, token: int) -> bool:
    return not 0 <= token < law.shape[0] or float(draft_prob[token]) <= 0


def _any_impossible(node: int, target_probs, draft_probs, tree: Nodes) -> bool:
    return any(_impossible(target_probs[node], draft_probs[child], tree.tokens[child]) for child in tree.children[node])


def walk_rule(target_probs, draft_probs, tree: Nodes, source: Source, anchor_position: int) -> TreeVerdict:
    """Sample the target along the tree; which law the tree came from plays no part."""
    path = [0]
    while True:
        node = path[-1]
        token = source.draw(anchor_position + len(path), target_probs[node], node=node)
        following = next((child for child in tree.children[node] if tree.tokens[child] == token), None)
        if following is None:
            return TreeVerdict(tuple(path), token, bad_draft=_outside(node, target_probs[node].shape[0], tree))
        path.append(following)


def _outside(node: int, vocab: int, tree: Nodes) -> bool:
    """Whether a child's token is none of the vocabulary: no draw can lead there."""
    return any(not 0 <= tree.tokens[child] < vocab for child in tree.children[node])


def recursive_rule(target_probs, draft_probs, tree: Nodes, source: Source, anchor_position: int) -> TreeVerdict:
    """Try the children of a node one after another against what the rejected ones leave of the target's law."""
    path = [0]
    while True:
        node, law = path[-1], target_probs[path[-1]]
        for child in tree.children[node]:
            token, proposed = tree.tokens[child], draft_probs[child]
            if not _impossible(law, proposed, token) and source.coin(
                anchor_position + len(path), float(proposed[token]), float(law[token]), node=child
            ):
                path.append(child)
                break
            residual = (law - proposed).clamp(min=0)
            mass = float(residual.sum())
            law = residual / mass if mass > 0 else residual
        else:
            empty = float(law.sum()) <= 0
            token = source.draw(anchor_position + len(path), target_probs[node] if empty else law, node=node)
            return TreeVerdict(tuple(path), token, empty, _any_impossible(node, target_probs, draft_probs, tree))


def traversal_rule(target_probs, draft_probs, tree: Nodes, source: Source, anchor_position: int) -> TreeVerdict:
    """Test leaves, deepest first; a node becomes a leaf when all its children were rejected."""
    return _visit(0, 1.0, (0,), target_probs, draft_probs, tree, source, anchor_position)


def _visit(node, kept, path, target_probs, draft_probs, tree, source, anchor_position) -> TreeVerdict | None:
    """The verdict where the subtree of `node`, entered with P = kept, has an accepted node; None where it is rejected."""
    law = target_probs[node]
    numerator, denominator = kept, 1.0
    for child in tree.children[node]:
        token, proposed = tree.tokens[child], draft_probs[child]
        chance = 0.0
        if not _impossible(law, proposed, token):
            chance = min(1.0, kept * float(law[token]) / float(proposed[token]))
        verdict = _visit(child, chance, (*path, child), target_probs, draft_probs, tree, source, anchor_position)
        if verdict is not None:
            return verdict
        residual = (kept * law - proposed).clamp(min=0)
        numerator = float(residual.sum())
        denominator = numerator + 1.0 - kept
        law = residual / numerator if numerator > 0 else residual
        kept = numerator / denominator if denominator > 0 else 1.0
    depth = len(path) - 1
    sure = node == 0 or denominator <= 0  # nothing is left to go back to
    if not sure and not source.coin(anchor_position + depth, denominator, numerator, node=node):
        return None
    empty = float(law.sum()) <= 0
    token = source.draw(anchor_position + depth + 1, target_probs[node] if empty else law, node=node)
    return TreeVerdict(path, token, empty, _any_impossible(node, target_probs, draft_probs, tree))


def greedy_rule(target_probs, draft_probs, tree: Nodes, source: Source, anchor_position: int) -> TreeVerdict:
    """Follow the target's most probable tokens."""
    path = [0]
    while True:
        law = target_probs[path[-1]]
        token = int(torch.argmax((law == law.max()).int()))
        following = next((child for child in tree.children[path[-1]] if tree.tokens[child] == token), None)
        if following is None:
            return TreeVerdict(tuple(path), token, bad_draft=_outside(path[-1], law.shape[0], tree))
        path.append(following)


RULES = {"walk": walk_rule, "recursive": recursive_rule, "traversal": traversal_rule, "greedy": greedy_rule}


def sibling_laws(law: Tensor, tokens: Sequence[int], drawn: str, beyond: dict[int, float] | None = None) -> list[Tensor]:
    """The law each of a node's children was drawn from, given its elder siblings; law [V]: that of the first.

    beyond: chances of ids that are none of the vocabulary, which the drafter drew from like the others.
    """
    found, beyond = [], dict(beyond or {})
    for token in tokens:
        if drawn == "one_hot":
            law = torch.zeros_like(law)
            if 0 <= token < law.shape[0]:
                law[token] = 1.0
        found.append(law)
        if drawn == "without_replacement":
            law = law.clone()
            if 0 <= token < law.shape[0]:
                law[token] = 0.0
            beyond.pop(token, None)
            rest = float(law.sum()) + sum(beyond.values())
            if rest > 0:
                law, beyond = law / rest, {id: chance / rest for id, chance in beyond.items()}
    return found


def _beyond(proposal, slot: int, node: int, scale: float, vocab: int) -> dict[int, float]:
    """Chances of the ids that a node's law has outside the vocabulary."""
    chances = law_of(read_logits(proposal.logits[slot, node])[0], scale)
    if isinstance(proposal, SparseProposal):
        ids = proposal.ids[slot, node].tolist()
    elif proposal.draft_to_target is not None:
        ids = proposal.draft_to_target.tolist()
    else:
        ids = range(chances.shape[0])
    found: dict[int, float] = {}
    for id, chance in zip(ids, chances.tolist(), strict=True):
        if not 0 <= id < vocab:
            found[id] = found.get(id, 0.0) + chance
    return found


class _Lazy:
    """Laws by node, computed when a rule asks for them."""

    def __init__(self, make):
        self._make, self._laws = make, {}

    def __getitem__(self, node: int):
        if node not in self._laws:
            self._laws[node] = self._make(node)
        return self._laws[node]


class _GreedySource:
    """Answers draws by the arg-max, from logits, with its margin."""

    def __init__(self, rows, decisions: Decisions, request: int):
        self._rows, self._decisions, self._request = rows, decisions, request

    def draw(self, position: int, weights: Tensor, node: int = 0) -> int:
        return self._decisions.pick(self._request, "greedy", self._rows[node])


def accept_tree(
    target_logits: Tensor,
    layout: VerifyLayout,
    tree: DraftTree,
    *,
    sampling: SamplingTensors | None = None,
    rule: str = "walk",
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
    row, and every row of a tree made without chance, is judged by the walk under each rule: there the three emit one law. Children
    of a node without a finite logit are not looked at. Sampling settings see as emitted what is on a node's own path: the nodes
    from the anchor's child to the node itself, not their siblings; the anchor is counted where earlier tokens are. The laws of
    drafts are as stored.
    """
    for name, value in (("out", out), ("workspace", workspace)):
        if value is not None:
            raise ValueError(f"{name}: expected None, the reference allocates its results, got {type(value).__name__}")
    if rule not in ("walk", "recursive", "traversal"):
        raise ValueError(f"rule: expected one of 'walk', 'recursive', 'traversal', got {rule!r}")
    if logprobs not in (None, "raw", "processed"):
        raise ValueError(f"logprobs: expected one of None, 'raw', 'processed', got {logprobs!r}")
    decisions = Decisions() if decisions is None else decisions
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
            adjust(row.float(), sampling, slot, first + m, [tokens[node] for node in way(links, m)]) for m, row in enumerate(raw)
        ]
        rows, row_flags = zip(*map(read_logits, adjusted), strict=True)
        scale = inverse_temperature(float(sampling.temperature[slot])) if sampling is not None else 0.0
        rows = [filtered(row, scale, sampling, slot, decisions, r) for row in rows]
        parents = [-1 if 0 <= p < count and row_flags[p] & Flag.NONFINITE_ROW else p for p in links]
        shape = nodes_of(tokens, parents)
        position = int(layout.positions[forward[0]])
        verdict = _judge(rows, row_flags, shape, tree, slot, sampling, rule, r, position, decisions)
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


def _judge(rows, row_flags, shape, tree, slot, sampling, rule, request, position, decisions) -> TreeVerdict:
    """Apply the rule to one request."""
    vocab, device = rows[0].shape[0], rows[0].device
    scale = inverse_temperature(float(sampling.temperature[slot])) if sampling is not None else 0.0
    if scale == 0:
        return walk_rule(rows, None, shape, _GreedySource(rows, decisions, request), position)

    def target_law(node):
        if row_flags[node] & Flag.NONFINITE_ROW:
            law = torch.zeros(vocab, dtype=torch.float64, device=device)
            law[int(torch.argmax((rows[node] > -math.inf).int()))] = 1.0
            return law
        return law_of(rows[node], scale)

    source = PhiloxSource(int(sampling.seed[slot]), position, decisions, request)
    proposal = tree.proposal
    draft_scale = scale
    if not isinstance(proposal, OneHotProposal) and proposal.temperature is not None:
        draft_scale = inverse_temperature(float(proposal.temperature[slot]))
    by_chance = not isinstance(proposal, OneHotProposal) and tree.drawn != "one_hot" and draft_scale > 0
    draft_probs = {}
    if by_chance and rule != "walk":
        for node, children in enumerate(shape.children):
            if children:
                law = draft_law(proposal, slot, node, 0, scale, vocab, device, -1)
                tokens = [shape.tokens[child] for child in children]
                beyond = _beyond(proposal, slot, node, draft_scale, vocab)
                draft_probs.update(zip(children, sibling_laws(law, tokens, tree.drawn, beyond), strict=True))
    chosen = RULES[rule if by_chance else "walk"]
    return chosen(_Lazy(target_law), draft_probs, shape, source, position)
