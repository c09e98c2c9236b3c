"""Known-bad rules on draft trees, for the suite to detect: they lose the target's distribution, or accept less.

Each is one of rules.py with one mistake. `KNOWN_BAD` holds them by name; `DRAFTS` (wrong_drafts.py) holds what is wrong in drawing the children.
Which test detects which: tests/package/test_testing_tree.py. Try

    python -m dspark_kernels.testing dspark_kernels.testing.known_wrong_tree:traversal_divided_by_the_child
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..chain import known_wrong as chain_known_wrong
from ..chain.known_wrong import Accepts, Verdict
from ..chain.rules import NEG_INF, at
from . import rules, wrong_noise
from .rules import Recursive, Traversal, Trees
from .wrong_drafts import (
    DRAFTS as DRAFTS,
    best_of_what_is_left as best_of_what_is_left,
    draft_position_only as draft_position_only,
    drawn_again as drawn_again,
    one_noise_for_siblings as one_noise_for_siblings,
)

KNOWN_BAD: dict[str, Accepts] = {}
known_bad = functools.partial(chain_known_wrong.known_bad, table=KNOWN_BAD)
RULES = {"walk": rules.walk_rule, "recursive": rules.recursive_rule, "traversal": rules.traversal_rule}


def known_bad_rule(rule: str, **options: Any) -> Callable[[Callable[[Trees], Verdict]], Accepts]:
    """Register a rule on Trees: (last node, token)."""

    def register(of_trees: Callable[[Trees], Verdict]) -> Accepts:
        @functools.wraps(of_trees)
        def function(*arguments: Any) -> Tensor:
            return rules.accept(of_trees, *arguments, **options)

        del function.__dict__["__wrapped__"]
        return known_bad(rule)(function)

    return register


def _on(rule: str, name: str, text: str, **options: Any) -> Accepts:
    """Register a rule with another Noise or other Trees."""

    def function(*arguments: Any) -> Tensor:
        return rules.accept(RULES[rule], *arguments, **options)

    function.__name__, function.__doc__ = name, text
    return known_bad(rule)(function)


# ---- noise


_on(
    "recursive",
    "draw_with_draft_noise",
    "Tokens drawn with the noise that drew the first child.",
    noise=wrong_noise.DraftNoiseInDraws,
)
_on(
    "traversal",
    "position_only_noise",
    "Noise addressed by position alone: met again when drafted again.",
    noise=wrong_noise.PositionOnly,
)
_on(
    "recursive",
    "one_uniform_for_siblings",
    "Acceptance uniforms addressed by position alone: siblings share theirs.",
    noise=wrong_noise.OneUniformPerDepth,
)
_on(
    "traversal",
    "one_uniform_per_depth",
    "Acceptance uniforms addressed by position alone: siblings and cousins share.",
    noise=wrong_noise.OneUniformPerDepth,
)
_on("traversal", "one_uniform_per_tree", "One acceptance uniform for all nodes.", noise=wrong_noise.OneUniformPerTree)
_on("traversal", "noise_by_row", "Noise that depends on the batch row.", noise=wrong_noise.ByRow)
_on("walk", "low_word_of_seed", "Seeds cut to 32 bits.", noise=wrong_noise.LowWord)
_on("walk", "gumbel_floor", "Gumbel noise with a floor: rare tokens are never drawn.", noise=wrong_noise.GumbelFloor)


# ---- what siblings are drawn from


class _DrawnStays(Trees):
    def next_probs(self, proposed: Tensor, tokens: Tensor) -> Tensor:
        return proposed


class _DrawnRemovedOnly(Trees):
    def next_probs(self, proposed: Tensor, tokens: Tensor) -> Tensor:
        ids = torch.arange(proposed.shape[1], device=tokens.device)
        return proposed if self.drawn == "iid" else torch.where(ids == tokens[:, None], 0.0, proposed)


class _DrawnRemovedAlways(Trees):
    def next_probs(self, proposed: Tensor, tokens: Tensor) -> Tensor:
        same = Trees(self.target, self.draft, self.tokens, self.parents, self.depths, "without_replacement", self.noise)
        return same.next_probs(proposed, tokens)


class _NothingTakenOut(Trees):
    def residual(self, target_probs: Tensor, proposed: Tensor) -> Tensor:
        return target_probs


_on("recursive", "drawn_sibling_stays", "Without replacement, a rejected sibling's token stays in the distribution of the next.",
    trees=_DrawnStays)  # fmt: skip
_on("traversal", "drawn_sibling_stays_in_traversal", "The same in traversal.", trees=_DrawnStays)
_on("recursive", "sibling_distribution_not_normalised", "Without replacement, the token is removed and the rest is not normalised.",
    trees=_DrawnRemovedOnly)  # fmt: skip
_on("recursive", "independent_taken_for_distinct", "Independent siblings verified as if drawn without replacement.",
    trees=_DrawnRemovedAlways)  # fmt: skip
_on("recursive", "nothing_taken_out", "What was rejected stays in the target distribution, for the next sibling and for the draw.",
    trees=_NothingTakenOut)  # fmt: skip


@known_bad("recursive")
def draft_cut_to_the_targets_ids(
    node_logits: Tensor, tokens: Tensor, parents: Tensor, draft_logits: Tensor | None, *rest: Any
) -> Tensor:
    """A wider draft distribution is cut and normalised before its siblings are verified."""
    if draft_logits is not None:
        draft_logits = draft_logits[..., : node_logits.shape[2]]
    return rules.recursive(node_logits, tokens, parents, draft_logits, *rest)


@known_bad("traversal")
def distribution_of_the_childs_row(
    node_logits: Tensor, tokens: Tensor, parents: Tensor, draft_logits: Tensor | None, *rest: Any
) -> Tensor:
    """The draft row of a node taken for the distribution it was itself drawn from, not for that of its children."""
    if draft_logits is not None:
        last = torch.zeros_like(parents, dtype=torch.int64)
        for node in range(1, parents.shape[1]):
            last.scatter_(1, parents[:, node, None].clamp(min=0).long(), node)
        draft_logits = draft_logits.gather(1, last[..., None].expand_as(draft_logits))
    return rules.traversal(node_logits, tokens, parents, draft_logits, *rest)


@known_bad("recursive")
def distribution_ignored(node_logits: Tensor, tokens: Tensor, parents: Tensor, draft_logits: Tensor | None, *rest: Any) -> Tensor:
    """Sampled trees taken for one-hot ones: lossless, and accepts less."""
    return rules.recursive(node_logits, tokens, parents, None, *rest)


@known_bad("recursive")
def duplicates_merged(
    node_logits: Tensor, tokens: Tensor, parents: Tensor, draft_logits: Tensor | None, drawn: str, *rest: Tensor
) -> Tensor:
    """Independent siblings with one token merged before they are verified."""
    parents = parents.clone()
    for node in range(1, tokens.shape[1]):
        again = (parents[:, :node] == parents[:, node, None]) & (tokens[:, :node] == tokens[:, node, None]) & (drawn == "iid")
        parents[:, node] = torch.where(again[:, 1:].any(1), -1, parents[:, node])
    return rules.recursive(node_logits, tokens, parents, draft_logits, drawn, *rest)


# ---- rules


class _NotNormalised(Recursive):
    def rest(self) -> Tensor:
        return self.trees.residual(self.target_probs, self.proposed)


class _AgainstTheWholeTarget(Recursive):
    def against(self) -> Tensor:
        return at(self.trees.target, self.node)


@known_bad_rule("recursive")
def residual_not_normalised(trees: Trees) -> Verdict:
    """The next sibling verified against [p - q]+ as it is."""
    return _NotNormalised(trees).run()


@known_bad_rule("recursive")
def siblings_against_the_whole_target(trees: Trees) -> Verdict:
    """Every sibling verified against p; what the elder ones were rejected for is taken out of the final draw alone."""
    return _AgainstTheWholeTarget(trees).run()


@known_bad_rule("recursive")
def youngest_sibling_first(trees: Trees) -> Verdict:
    """Siblings tried in another order than they were drawn in: what the first was drawn from is the distribution for the last."""
    state = Recursive(trees)
    live = torch.ones_like(state.node, dtype=torch.bool)
    for _ in range(trees.num_nodes - 1):
        start = state.node
        for child in reversed(range(1, trees.num_nodes)):
            state.attempt(child, live & (trees.parents[:, child] == start) & (state.node == start))
        live = live & (state.node > start)
    return state.node, trees.draw(state.node, state.target_probs)


@known_bad_rule("walk")
def walk_to_the_first_child(trees: Trees) -> Verdict:
    """Where no child has the token, the first child is taken all the same."""
    here = torch.zeros_like(trees.tokens[:, 0])
    says = torch.stack([trees.draw(here + node, trees.target[:, node]) for node in range(trees.num_nodes)], 1)
    node = here
    for _ in range(trees.num_nodes - 1):
        children = trees.parents == node[:, None]
        right = children & (trees.tokens == at(says, node)[:, None])
        chosen = torch.where(right.any(1, keepdim=True), right, children)
        node = torch.where(children.any(1), chosen.long().argmax(1), node)
    return node, at(says, node)


@known_bad_rule("walk")
def token_from_the_parents_row(trees: Trees) -> Verdict:
    """The token behind the path from the row that verified the last node."""
    node, token = rules.walk_rule(trees)
    above = at(trees.target, at(trees.parents, node).clamp(min=0))
    return node, torch.where(node > 0, trees.draw(node, above), token)


@known_bad_rule("recursive")
def token_from_the_targets_distribution(trees: Trees) -> Verdict:
    """After the last child, a token from p: what was rejected is not taken out."""
    node, _ = rules.recursive_rule(trees)
    return node, trees.draw(node, at(trees.target, node))


@known_bad_rule("recursive", noise=wrong_noise.Coarse)
def equality_passes(trees: Trees) -> Verdict:
    """u q <= p with a u that can be 0: impossible children pass."""
    trees.uniforms = trees.uniforms - 1e-12
    return rules.recursive_rule(trees)


class _DividedByTheChild(Traversal):
    def normaliser(self, total: Tensor, prefix_prob: Tensor, node: Tensor) -> Tensor:
        return total + 1.0 - self.at(self.prefix_prob, node)


class _Restarts(Traversal):
    def delete(self, where: Tensor) -> None:
        self.set(self.open, self.node, where, torch.zeros_like(where))
        self.node = torch.where(where, 0, self.node)


class _WithoutPrefixProb(Traversal):
    """The parent's P stays as it was."""

    def delete(self, where: Tensor) -> None:
        parent = torch.where(where, self.at(self.trees.parents, self.node), 0)
        before = self.at(self.prefix_prob, parent)
        super().delete(where)
        self.set(self.prefix_prob, parent, where, before)
        self.set(self.above, parent, where, before)
        self.set(self.below, parent, where, torch.ones_like(before))


class _LeavesOnly(Traversal):
    """After a rejected node, verification ends at its parent; the other children are not tried."""

    def delete(self, where: Tensor) -> None:
        parent = torch.where(where, self.at(self.trees.parents, self.node), -1)
        super().delete(where)
        self.open = self.open & (self.trees.parents != parent[:, None])


@known_bad_rule("traversal")
def traversal_divided_by_the_child(trees: Trees) -> Verdict:
    """The rejected child's prefix probability in the normaliser, where the node's own belongs (a published implementation's)."""
    return _DividedByTheChild(trees).run()


@known_bad_rule("traversal")
def traversal_restarts(trees: Trees) -> Verdict:
    """After a rejected node, the rest of the tree is verified as if that node had not been there."""
    return _Restarts(trees).run()


@known_bad_rule("traversal")
def traversal_without_prefix_probability(trees: Trees) -> Verdict:
    """A node's prefix probability does not change when a child is rejected."""
    return _WithoutPrefixProb(trees).run()


@known_bad_rule("traversal")
def traversal_of_first_children(trees: Trees) -> Verdict:
    """Only the first child of every node is verified: lossless, and accepts less."""
    return _LeavesOnly(trees).run()


@known_bad_rule("traversal")
def traversal_draws_from_the_target(trees: Trees) -> Verdict:
    """The token from p, where M belongs."""
    node, _ = rules.traversal_rule(trees)
    return node, trees.draw(node, at(trees.target, node))


@known_bad_rule("traversal")
def recursive_for_traversal(trees: Trees) -> Verdict:
    """The recursive rule: lossless, and accepts less."""
    return rules.recursive_rule(trees)


@known_bad_rule("walk")
def always_rejects(trees: Trees) -> Verdict:
    """Lossless and useless: one token of the target per round."""
    root = torch.zeros_like(trees.tokens[:, 0])
    return root, trees.draw(root, trees.target[:, 0])


@known_bad_rule("traversal")
def last_id_without_residual(trees: Trees) -> Verdict:
    """The last id where nothing is left of [p - q]+."""
    state = Traversal(trees)
    node, token = state.run()
    empty = state.at(state.target_probs, node).sum(1) <= 0
    return node, torch.where(empty, trees.target.shape[2] - 1, token)


# ---- what is read


@known_bad("recursive")
def all_nodes_verified(
    node_logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    draft_logits: Tensor | None,
    drawn: str,
    temperature: Tensor,
    seeds: Tensor,
    num_nodes: Tensor,
    anchor_positions: Tensor,
) -> Tensor:
    """Verifies all M nodes whatever the tree has."""
    whole = torch.full_like(num_nodes, tokens.shape[1])
    return rules.recursive(
        node_logits, tokens, parents, draft_logits, drawn, temperature, seeds, whole, anchor_positions
    )  # fmt: skip


@known_bad("walk")
def at_least_one_child(
    node_logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    draft_logits: Tensor | None,
    drawn: str,
    temperature: Tensor,
    seeds: Tensor,
    num_nodes: Tensor,
    anchor_positions: Tensor,
) -> Tensor:
    """Takes a tree of the root alone for one with a child."""
    return rules.walk(
        node_logits, tokens, parents, draft_logits, drawn, temperature, seeds, num_nodes.clamp(min=2), anchor_positions
    )  # fmt: skip


@known_bad("walk")
def one_shape_for_all(
    node_logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    draft_logits: Tensor | None,
    drawn: str,
    temperature: Tensor,
    seeds: Tensor,
    num_nodes: Tensor,
    anchor_positions: Tensor,
) -> Tensor:
    """The first request's tree taken for everybody's."""
    if len(tokens):
        parents, num_nodes = parents[:1].expand_as(parents), num_nodes[:1].expand_as(num_nodes)
    return rules.walk(node_logits, tokens, parents, draft_logits, drawn, temperature, seeds, num_nodes, anchor_positions)


@known_bad("recursive")
def temperature_on_target_only(
    node_logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    draft_logits: Tensor | None,
    drawn: str,
    temperature: Tensor,
    *rest: Tensor,
) -> Tensor:
    """The ratio against a draft distribution without temperature."""
    if draft_logits is not None:
        draft_logits = draft_logits * torch.where(temperature > 0, temperature, 1.0)[:, None, None]
    return rules.recursive(node_logits, tokens, parents, draft_logits, drawn, temperature, *rest)


@known_bad("traversal")
def draft_distribution_rounded(
    node_logits: Tensor, tokens: Tensor, parents: Tensor, draft_logits: Tensor | None, *rest: Any
) -> Tensor:
    """The ratio against bf16 logits, where the children were drawn from finer ones."""
    draft_logits = None if draft_logits is None else draft_logits.bfloat16().float()
    return rules.traversal(node_logits, tokens, parents, draft_logits, *rest)


@known_bad("walk")
def nan_wins(node_logits: Tensor, *rest: Any) -> Tensor:
    """NaN is the largest, as it is for many an arg-max."""
    return rules.walk(torch.where(node_logits.isnan(), float("inf"), node_logits), *rest)


@known_bad("walk")
def masked_tokens_drawn(node_logits: Tensor, *rest: Any) -> Tensor:
    """-inf read as the least finite number of what is left of the row: masked tokens are drawn."""
    finite = torch.where(node_logits == NEG_INF, float("inf"), node_logits).amin(-1, keepdim=True)
    return rules.walk(torch.where(node_logits == NEG_INF, finite, node_logits), *rest)


@known_bad("walk")
def strides_ignored(node_logits: Tensor, *rest: Any) -> Tensor:
    """Rows read as if they lay one behind the other."""
    shape = node_logits.shape
    room = node_logits.untyped_storage().nbytes() // node_logits.element_size()
    if node_logits.numel() <= room and node_logits.numel():
        node_logits = node_logits.as_strided(shape, (shape[1] * shape[2], shape[2], 1))
    return rules.walk(node_logits, *rest)


@known_bad("recursive")
def scaled_in_half(
    node_logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    draft_logits: Tensor | None,
    drawn: str,
    temperature: Tensor,
    *rest: Tensor,
) -> Tensor:
    """Logits divided by the temperature in fp16: overflow, and inf - inf."""
    scale = torch.where(temperature > 0, temperature, 1.0).half()[:, None, None]
    scaled = [None if x is None else (x.half() / scale).float() for x in (node_logits, draft_logits)]
    heat = torch.where(temperature > 0, 1.0, 0.0)
    return rules.recursive(scaled[0], tokens, parents, scaled[1], drawn, heat, *rest)


@known_bad("traversal")
def greedy_rows_sampled(
    node_logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    draft_logits: Tensor | None,
    drawn: str,
    temperature: Tensor,
    *rest: Tensor,
) -> Tensor:
    """Temperature 0 taken for 1."""
    heat = torch.where(temperature > 0, temperature, 1.0)
    return rules.traversal(node_logits, tokens, parents, draft_logits, drawn, heat, *rest)


@known_bad("greedy_tree")
def greedy_highest_tie(node_logits: Tensor, tokens: Tensor, *rest: Any) -> Tensor:
    """Ties to the highest id."""
    width = node_logits.shape[2]

    def flip(ids: Tensor) -> Tensor:
        return torch.where(ids >= 0, width - 1 - ids, ids)

    return flip(rules.greedy(node_logits.flip(2), flip(tokens), *rest))
