"""The reference's tree rules emit the target's distribution exactly, and relate to each other as their papers say."""

import pytest
import torch

from reference import accept, tree
from reference.enumeration import (
    CrowdSource,
    EnumeratingSource,
    emitted_distribution,
    round_distribution,
    simulate,
    target_distribution,
    total_variation,
)
from reference.sources import PhiloxSource
from reference.tree import RULES
from reference.tree_enumeration import TreeDecoder
from tests.reference import wrong_rules as wrong
from tests.reference.test_lossless import random_distribution

EXACT = 1e-12
PROMPT = (0,)
SAMPLED = ("walk", "recursive", "traversal")
DRAWN = ("one_hot", "iid", "without_replacement")
# Parents of every node, parents before children; depth 1 to 3.
SHAPES = {
    "root": (-1,),
    "pair": (-1, 0, 1),
    "chain": (-1, 0, 1, 2),
    "siblings": (-1, 0, 0),
    "elder": (-1, 0, 0, 1, 1),  # the elder child goes on
    "second": (-1, 0, 0, 2, 2),  # the younger child goes on
    "odd": (-1, 0, 0, 1, 3, 3),
    "full": (-1, 0, 0, 1, 1, 2, 2),
}
# (shape, vocabulary, how children are drawn): what exact enumeration takes about a second for, over all rules.
CASES = [
    ("root", 4, "iid"),
    *(("siblings", 4, drawn) for drawn in (*DRAWN, "mixed")),
    *(("second", 4, drawn) for drawn in ("iid", "without_replacement", "mixed")),
    *(("odd", 3, drawn) for drawn in ("iid", "without_replacement", "mixed")),
    ("full", 2, "iid"),
    ("full", 3, "mixed"),
    ("full", 3, "one_hot"),
]


def decoder(rule, shape, vocab, drawn, salt=0, sharpness=1.5, equal=False):
    parents = SHAPES[shape]
    how = tuple(DRAWN[(node + salt) % 3] if drawn == "mixed" else drawn for node in range(len(parents)))
    target = random_distribution(vocab, 11 + salt, sharpness)
    draft = target if equal else random_distribution(vocab, 12 + salt, sharpness)
    return TreeDecoder(target, draft, RULES[rule] if isinstance(rule, str) else rule, parents, how)


def bias(toy, tokens=4, rounds=1, source=EnumeratingSource):
    return total_variation(round_distribution(toy, PROMPT, tokens, rounds, source), target_distribution(toy, PROMPT, tokens))


@pytest.mark.parametrize("rule", SAMPLED)
@pytest.mark.parametrize(("shape", "vocab", "drawn"), CASES)
def test_emits_the_targets_distribution(rule, shape, vocab, drawn):
    assert bias(decoder(rule, shape, vocab, drawn)) <= EXACT


@pytest.mark.parametrize("rule", SAMPLED)
def test_three_rounds_of_one_seed(rule):
    """Noise of one round says nothing about the next one's."""
    assert bias(decoder(rule, "siblings", 2, "iid"), tokens=4, rounds=3) <= EXACT


@pytest.mark.parametrize("rule", SAMPLED)
def test_impossible_tokens(rule):
    """Distributions with zeros: no impossible token is emitted, and no draft that cannot be drawn is met."""
    parents = SHAPES["second"]
    toy = TreeDecoder(
        random_distribution(4, 31, zeros=True), random_distribution(4, 32, zeros=True), RULES[rule], parents, ("iid",) * 5
    )
    assert bias(toy) <= EXACT


@pytest.mark.parametrize("drawn", ["iid", "without_replacement"])
@pytest.mark.parametrize("rule", ["recursive", "traversal"])
def test_a_draft_distribution_equal_to_the_targets_loses_nothing(rule, drawn):
    """The first child is always kept: as long as the chain of elder children."""
    assert decoder(rule, "second", 3, drawn, equal=True).mean_accepted(PROMPT, EnumeratingSource) == pytest.approx(1, abs=EXACT)
    assert decoder(rule, "odd", 2, drawn, equal=True).mean_accepted(PROMPT, EnumeratingSource) == pytest.approx(3, abs=EXACT)


def test_wrong_rules_are_detected():
    assert bias(decoder(wrong.traversal_divided_by_the_child, "chain", 2, "iid")) > 0.2
    assert bias(decoder(wrong.traversal_divided_by_the_child, "odd", 3, "without_replacement", salt=60)) > 0.07
    assert bias(decoder(wrong.recursive_without_residual, "siblings", 4, "iid")) > 0.02
    assert bias(decoder("recursive", "siblings", 4, "without_replacement", salt=160), source=wrong.OneUniformForSiblings) > 0.05
    assert bias(decoder("recursive", "siblings", 3, "iid", salt=140), source=wrong.OneUniformForSiblings) > 0.005


class WithoutNodes(PhiloxSource):
    """A chain's addresses: what a tree says of nodes is dropped."""

    def accepts(self, position, denominator, numerator, node=0):
        return super().accepts(position, denominator, numerator)

    def draw(self, position, weights, node=0):
        return super().draw(position, weights)


def test_traversal_is_the_block_rule_on_a_chain():
    """The same tokens from the same acceptance uniforms, drafts with impossible tokens among them."""
    g = torch.Generator().manual_seed(5)
    lengths = set()
    for seed in range(300):
        drafts = int(torch.randint(0, 5, (1,), generator=g))
        logits = 2 * torch.randn(drafts + 1, 5, generator=g, dtype=torch.float64)
        target = torch.softmax(logits, 1)
        draft = torch.softmax(logits + 0.7 * torch.randn(drafts + 1, 5, generator=g, dtype=torch.float64), 1)
        tokens = [int(torch.multinomial(probs, 1, generator=g)) for probs in draft[:drafts]]
        if seed % 7 == 0 and drafts:
            tokens[seed % drafts] = 5  # outside the vocabulary
        source = WithoutNodes(seed, 40)
        chain = accept.block_rule(target, draft, tokens, source, 40)
        nodes = tree.nodes_of([9, *tokens], range(-1, drafts))
        verdict = tree.traversal_rule(target, [None, *draft[:drafts]], nodes, source, 40)
        assert verdict.path == tuple(range(chain.num_accepted + 1)) and verdict.token == chain.token
        assert (verdict.empty_residual, verdict.bad_draft) == (chain.empty_residual, chain.bad_draft)
        lengths.add((drafts, chain.num_accepted))
    assert {(4, n) for n in range(5)} <= lengths


@pytest.mark.parametrize("shape", ["siblings", "odd", "full"])
def test_rules_agree_on_deterministic_trees(shape):
    """Walk, recursive, traversal: one distribution of what a round emits, and so of how much."""
    want, *others = (emitted_distribution(decoder(rule, shape, 3, "one_hot"), PROMPT) for rule in SAMPLED)
    assert all(total_variation(other, want) <= EXACT for other in others)


@pytest.mark.parametrize("salt", [0, 20])
def test_mean_lengths_stand_in_the_order_of_the_sources(salt):
    """Traversal keeps more than recursive, children without replacement more than independent ones, a tree more than its chain."""

    def mean(rule, drawn, shape="elder"):
        return decoder(rule, shape, 3, drawn, salt).mean_accepted(PROMPT, EnumeratingSource)

    assert mean("traversal", "iid") > mean("recursive", "iid") > mean("walk", "iid")
    assert mean("traversal", "without_replacement") > mean("recursive", "without_replacement") > mean("recursive", "iid")
    assert mean("traversal", "without_replacement") > mean("traversal", "iid") > mean("traversal", "iid", "pair")


def test_many_seeds_decode_the_targets_distribution():
    """Addressed Philox noise over several rounds; the distributions depend on the last token alone."""
    g = torch.Generator().manual_seed(3)
    target, draft = (torch.softmax(2 * torch.randn(3, 3, generator=g, dtype=torch.float64), 1) for _ in "td")
    shape = (-1, 0, 0)
    toy = TreeDecoder(lambda c: target[c[-1]], lambda c: draft[c[-1]], RULES["recursive"], shape, ("iid",) * 3)
    object.__setattr__(toy, "num_drafts", 1)  # what a round can keep, for the room that `simulate` makes
    seeds = torch.arange(20000) * 2654435761
    history = simulate(toy, 0, seeds, 3, CrowdSource)
    want = target_distribution(toy, PROMPT, 3)
    counts = {key: 0 for key in want}
    for key, count in zip(*(part.tolist() for part in torch.unique(history, dim=0, return_counts=True)), strict=True):
        counts[tuple(key)] = count
    statistic = sum((counts[key] - 20000 * probability) ** 2 / (20000 * probability) for key, probability in want.items())
    assert statistic < 55  # 26 degrees of freedom: exceeded with probability 0.0008
