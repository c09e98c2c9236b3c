"""reference/tree_draft.py: trees against brute force over all paths, shapes by hand, distributions of the children."""

import itertools

import pytest
import torch

from dspark_kernels.types import ConfidenceHead, Flag, MarkovHead, SamplingTensors, Stream
from reference import heads, philox
from reference.tree_draft import draft_tree, expand_tree

VOCAB, DRAFTS = 5, 3


def arguments(seed=0, requests=1, head=True, temperature=0.7):
    g = torch.Generator().manual_seed(seed)
    markov = MarkovHead(torch.randn(VOCAB, 4, generator=g), torch.randn(VOCAB, 4, generator=g)) if head else None
    return dict(
        base_logits=torch.randn(requests, DRAFTS, VOCAB, generator=g) * 2,
        anchors=torch.randint(0, VOCAB, (requests,), generator=g),
        head=markov,
        anchor_positions=torch.arange(requests) + 30,
        sampling=SamplingTensors(torch.full((requests,), temperature), torch.arange(requests) + 5),
    )


def paths(tree, slot=0):
    """The tokens after the anchor that lead to each node."""
    found = {0: ()}
    for node in range(1, int(tree.num_nodes[slot])):
        found[node] = (*found[int(tree.parents[slot, node])], int(tree.tokens[slot, node]))
    return found


@pytest.mark.parametrize("method", ["conditioned", "best_first"])
@pytest.mark.parametrize("nodes", [1, 2, 9, 40])
def test_best_first_trees_hold_the_most_probable_paths(method, nodes):
    given = arguments(3)
    tree = draft_tree(**given, method=method, num_nodes=nodes)
    probabilities = {}
    w2 = heads.output_weights(given["head"])
    for depth in range(1, DRAFTS + 1):
        for path in itertools.product(range(VOCAB), repeat=depth):
            probability, previous = 1.0, int(given["anchors"][0])
            for k, token in enumerate(path):
                logits = given["base_logits"][0, k].double()
                if method == "conditioned":
                    logits = logits + w2 @ given["head"].w1[previous].double()
                probability *= float(torch.softmax(logits / float(given["sampling"].temperature[0]), 0)[token])
                previous = token
            probabilities[path] = probability
    best = sorted(probabilities, key=lambda path: -probabilities[path])[: nodes - 1]
    have = paths(tree)
    assert int(tree.num_nodes[0]) == nodes and [have[node] for node in range(1, nodes)] == best
    assert tree.drawn == "one_hot"


def test_links_depths_and_ancestors():
    given = arguments(4, requests=2)
    tree = draft_tree(**given, method="conditioned", num_nodes=12, node_budgets=torch.tensor([12, 1], dtype=torch.int32))
    assert tree.num_nodes.tolist() == [12, 1] and tree.tokens[1].tolist() == [int(given["anchors"][1])] + [-1] * 11
    parents = tree.parents[0].tolist()
    for node in range(12):
        children = [child for child in range(12) if parents[child] == node]
        walk, child = [], int(tree.first_child[0, node])
        while child >= 0:
            walk.append(child)
            child = int(tree.next_sibling[0, child])
        assert walk == children
        chain = {node}
        while parents[min(chain)] >= 0:
            chain.add(parents[min(chain)])
        assert int(tree.ancestors[0, node]) == sum(1 << each for each in chain) and int(tree.depths[0, node]) == len(chain) - 1
    assert draft_tree(**arguments(4), method="conditioned", num_nodes=64).ancestors[0, 63] < 0  # bit 63 is the sign


def test_static_trees_take_the_best_tokens_of_their_own_parent():
    given = arguments(5)
    tree = draft_tree(**given, method="top_k", num_nodes=64, branching=(2, 2))
    assert tree.parents[0, :8].tolist() == [-1, 0, 0, 1, 1, 2, 2, -1] and int(tree.num_nodes[0]) == 7
    w2 = heads.output_weights(given["head"])
    for parent, children in ((0, (1, 2)), (1, (3, 4)), (2, (5, 6))):
        depth = int(tree.depths[0, parent])
        logits = given["base_logits"][0, depth].double() + w2 @ given["head"].w1[int(tree.tokens[0, parent])].double()
        assert tree.tokens[0, list(children)].tolist() == logits.argsort(descending=True)[:2].tolist()
    cut = draft_tree(**given, method="top_k", num_nodes=4, branching=(2, 2))
    assert cut.parents[0].tolist() == [-1, 0, 0, 1] and torch.equal(cut.tokens[0], tree.tokens[0, :4])


def test_candidates_limit_the_children():
    given = arguments(6)
    tree = draft_tree(**given, method="conditioned", num_nodes=64, candidates=2)
    assert int(tree.num_nodes[0]) == 1 + 2 + 4 + 8
    for path in paths(tree).values():
        for k, token in enumerate(path):
            assert token in given["base_logits"][0, k].topk(2).indices


@pytest.mark.parametrize("method", ["iid", "without_replacement"])
def test_sampled_children(method):
    """Every child wins a race on the noise of its address; the logits kept for a node are those its children raced with."""
    given = arguments(7, requests=4)
    given["sampling"].temperature[3] = 0.0
    tree = draft_tree(**given, method=method, num_nodes=9, branching=(2, 3))
    assert tree.drawn == method and tree.num_nodes.tolist() == [9] * 4
    for slot in range(3):
        for parent, children in ((0, (1, 2)), (1, (3, 4, 5)), (2, (6, 7, 8))):
            depth, left = int(tree.depths[slot, parent]), tree.proposal.logits[slot, parent].double() / 0.7
            for child in children:
                node = child if method == "iid" else parent
                noise = philox.gumbel(slot + 5, torch.arange(VOCAB), slot + 31 + depth, slot + 30, Stream.DRAFT, node)
                assert int(tree.tokens[slot, child]) == int((left + noise).argmax())
                if method == "without_replacement":
                    left[tree.tokens[slot, child]] = -torch.inf
    best = tree.proposal.logits[3, 0].argsort(descending=True)[:2]
    assert torch.equal(tree.tokens[3, 1:3], best)


def test_survival_ranks_by_confidence():
    """All paths by hand: the confidence of a step is computed from the token before it."""
    g = torch.Generator().manual_seed(3)
    given = arguments(2)
    hidden, head = torch.randn(1, DRAFTS, 6, generator=g), given["head"]
    confidence = ConfidenceHead(torch.randn(10, generator=g), torch.tensor([0.2]), torch.tensor([0.7, 1.0, 1.4]))
    w2 = heads.output_weights(head)
    found = {(): 1.0}
    for path in itertools.chain.from_iterable(itertools.product(range(VOCAB), repeat=n) for n in range(1, DRAFTS + 1)):
        k, before = len(path) - 1, (int(given["anchors"][0]), *path)[-2]
        probs = ((given["base_logits"][0, k].double() + w2 @ head.w1[before].double()) / 0.7).softmax(0)
        raw = torch.cat([hidden[0, k], head.w1[before]]).double() @ confidence.weight.double() + 0.2
        found[path] = found[path[:-1]] * float(torch.sigmoid(raw / confidence.sts_temperatures[k])) * float(probs[path[-1]])
    tree = draft_tree(**given, num_nodes=14, hidden=hidden, confidence=confidence)
    best = sorted(found, key=lambda path: -found[path])[:14]
    assert [paths(tree).get(node, ()) for node in range(14)] == best
    assert torch.allclose(tree.survival[0].double(), torch.tensor([found[path] for path in best]).double(), rtol=1e-5)
    plain = draft_tree(**given, num_nodes=14)
    assert list(paths(plain).values()) != list(paths(tree).values())
    cut = draft_tree(**given, num_nodes=14, hidden=hidden, confidence=confidence, node_budgets=torch.tensor([4]).int())
    assert int(cut.num_nodes[0]) == 4 and torch.equal(cut.survival, tree.survival), "the budget leaves the survival"


def test_expansion_depth_by_depth_gives_the_static_tree():
    """A drafter whose logits do not see the path, run once per depth."""
    given = arguments(8, requests=2, head=False)
    for method in ("top_k", "iid", "without_replacement"):
        want = draft_tree(**given, method=method, num_nodes=10, branching=(2, 3, 1))
        tree = draft_tree(**given, method=method, num_nodes=10, branching=(2,))
        for depth, width in ((1, 3), (2, 1)):
            rows = int((tree.depths[0] == depth).sum())
            tree = expand_tree(
                tree,
                given["base_logits"][:, depth : depth + 1].expand(-1, rows, -1),
                depth=depth,
                branching=width,
                anchor_positions=given["anchor_positions"],
                method=method,
                sampling=given["sampling"],
            )
        for name in ("tokens", "parents", "depths", "first_child", "next_sibling", "ancestors", "num_nodes"):
            assert torch.equal(getattr(tree, name), getattr(want, name)), (method, name)
        if method != "top_k":
            inner = want.first_child >= 0
            assert torch.equal(tree.proposal.logits[inner], want.proposal.logits[inner])


def test_bad_values():
    given = arguments(9)
    given["base_logits"][0, 1, 2] = torch.nan
    given["anchors"][0] = 77
    tree = draft_tree(**given, method="conditioned", num_nodes=20)
    assert int(tree.flags[0]) == Flag.NAN | Flag.BAD_TOKEN_ID
    assert all(len(path) < 2 or path[1] != 2 for path in paths(tree).values())
    given["base_logits"][0, 1] = -torch.inf
    tree = draft_tree(**given, method="conditioned", num_nodes=20)
    assert int(tree.num_nodes[0]) == 1 + VOCAB and int(tree.flags[0]) & Flag.NONFINITE_ROW
