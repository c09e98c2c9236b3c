"""Rounds of trees through the kernel under one seed: drafts, acceptance and the next anchor, against the reference."""

import dataclasses

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels.testing.statistics import compare
from reference import layout as layouts
from reference.cases import AcceptTreeCase, accept_tree_case
from reference.sources import PhiloxSource
from reference.tree import nodes_of
from reference.tree_enumeration import TreeDecoder
from tests.blocks import tree_of
from tests.ops.accept_checks import check

VOCAB = 2
TARGET = torch.tensor([[0.3, 0.7], [0.55, 0.45]], dtype=torch.float64)  # the next token's, by the last one
DRAFT = torch.tensor([[0.6, 0.4], [0.4, 0.6]], dtype=torch.float64)
SHAPES = {"iid": (-1, 0, 0, 1), "without_replacement": (-1, 0, 0, 2)}


def batch_of(decoder, contexts, seeds, drawn, rule):
    """A case of one request for each context, its tree drawn from the seed's noise at the context's end."""
    nodes = len(decoder.parents)
    children = nodes_of(decoder.parents, decoder.parents).children
    draft_logits = torch.full((len(contexts), nodes, VOCAB), -float("inf"))
    trees, rows = [], []
    for r, (context, seed) in enumerate(zip(contexts, seeds, strict=True)):
        drafted = decoder.propose(PhiloxSource(seed, len(context) - 1), context)
        trees.append(list(zip(drafted.nodes.tokens, decoder.parents, strict=True)))
        rows += [probs.log().float() for probs in drafted.target_probs]
        for node, mine in enumerate(children):
            if mine:
                draft_logits[r, node] = drafted.draft_probs[mine[0]].log().float()
    tree = dataclasses.replace(tree_of(trees), proposal=dk.DenseProposal(draft_logits), drawn=drawn)
    layout = layouts.tree_layout(tree, anchor_positions=torch.tensor([len(context) - 1 for context in contexts]))
    sampling = dk.SamplingTensors(torch.ones(len(contexts)), torch.tensor(seeds))
    return AcceptTreeCase(torch.stack(rows), layout, tree, sampling, None, rule)


@pytest.mark.parametrize(("rule", "drawn"), [("recursive", "iid"), ("traversal", "without_replacement")])
def test_three_rounds_under_one_seed(rule, drawn):
    """Pairs of tokens one after the other have the target's distribution; every round's tokens are those of the reference."""
    decoder = TreeDecoder(lambda c: TARGET[c[-1]], lambda c: DRAFT[c[-1]], None, SHAPES[drawn], (drawn,) * 4)
    seeds = list(range(40, 51))
    contexts = [(r % VOCAB,) for r in range(len(seeds))]
    anchors = torch.tensor([context[-1] for context in contexts])
    positions = torch.zeros(len(seeds), dtype=torch.int64)
    for _ in range(3):
        case = batch_of(decoder, contexts, seeds, drawn, rule)
        acceptance = check(case, anchors=anchors, anchor_positions=positions)
        contexts = [
            (*context, *tokens[: count + 1].tolist())
            for context, tokens, count in zip(contexts, acceptance.tokens, acceptance.num_accepted.tolist(), strict=True)
        ]
        assert anchors.tolist() == [context[-1] for context in contexts]
        assert positions.tolist() == [len(context) - 1 for context in contexts]
    pairs = torch.zeros(VOCAB, VOCAB)
    for context in contexts:
        for before, after in zip(context, context[1:], strict=False):
            pairs[before, after] += 1
    assert pairs.sum() > 50
    for token in range(VOCAB):
        for finding in compare(f"after {token}", pairs[token], TARGET[token], 1e-4):
            assert finding.p_value > 1e-4, finding


def test_siblings_have_uniforms_of_their_own():
    """The first child passes with probability 0.5, then the second with 0.44: with one uniform for both it never would."""
    tree = tree_of([[(0, -1), (1, 0), (2, 0)]] * 24)
    logits = torch.tensor([0.05, 0.5, 0.45]).log().expand(24, 3, 3).contiguous()
    tree = dataclasses.replace(tree, proposal=dk.DenseProposal(logits), drawn="iid")
    layout = layouts.tree_layout(tree, anchor_positions=torch.full((24,), 3))
    target = torch.tensor([0.25, 0.25, 0.5]).log().expand(72, 3).contiguous()
    sampling = dk.SamplingTensors(torch.ones(24), torch.arange(24))
    acceptance = check(AcceptTreeCase(target, layout, tree, sampling, None, "recursive"))
    first, second = ((acceptance.path[:, 1] == node).sum() for node in (1, 2))
    assert first > 5 and second > 2


@pytest.mark.parametrize(("rule", "drawn"), [("walk", "one_hot"), ("recursive", "iid"), ("traversal", "without_replacement")])
def test_unequal_trees_in_one_batch(rule, drawn):
    """No drafts, all 63 that a tree may have, and a few."""
    case = accept_tree_case(9, 3, 64, 12, drawn, rule, counts=[1, 64, 6], reach=5, temperatures=(1.0,), sharpness=1.0)
    acceptance = check(case)
    assert acceptance.num_accepted[0] == 0
    assert (acceptance.num_accepted + acceptance.num_rejected).tolist() == [0, 63, 5]
