"""Decoding with draft trees on tiny random models: the plain text, the target's distribution, caches, and the kernels' rounds."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from dspark_kernels.types import DenseProposal
from reference import compact
from reference.drafters import MTP, Autoregressive, TreeShape
from reference.loop import REFERENCE_OPS, Request, decode
from reference.model import KVCache, Rows, rms_norm, run_layers
from tests.reference.test_loop_sampled import dist_dspark, dist_results, dist_target, misfit
from tests.reference.test_paged import _paged_ops
from tests.reference.toy_models import (
    TARGET,
    VOCAB,
    all_logits,
    make_block,
    make_draft_model,
    make_dspark,
    make_mtp,
    plain_greedy,
    requests_of,
)

TREES = {
    "DSpark": (make_dspark, TreeShape(12)),
    "DSpark, rnn": (lambda target: make_dspark(target, kind="rnn"), TreeShape(9)),
    "DSpark, candidates": (make_dspark, TreeShape(12, candidates=4)),
    "DSpark, drawn": (make_dspark, TreeShape(12, "without_replacement", (3, 2, 1), rule="recursive")),
    "block": (make_block, TreeShape(12, "best_first")),
    "MTP": (make_mtp, TreeShape(12, "top_k", (3, 2, 1))),
    "MTP, drawn": (make_mtp, TreeShape(11, "iid", (3, 2, 1), rule="traversal")),
}


def mixed_requests(temperature=0.0):
    """Short prompts, and two of 64 and 70 rows: as many as an ancestor word has bits, and more."""
    ids = torch.randint(0, VOCAB - 1, (70,), generator=torch.Generator().manual_seed(3)).tolist()
    long = [Request(ids[:length], 5, temperature, seed=length) for length in (70, 64)]
    return [*requests_of(4, temperature), *long]


def watching(seen, **replaced):
    """The reference's ops; what accept_tree and expand_tree were given, and gave, is appended to `seen`."""

    def accept_tree(logits, layout, tree, **options):
        acceptance = REFERENCE_OPS.accept_tree(logits, layout, tree, **options)
        seen.append(SimpleNamespace(tree=tree, layout=layout, acceptance=acceptance))
        return acceptance

    return SimpleNamespace(**{**vars(REFERENCE_OPS), "accept_tree": accept_tree, **replaced})


def paged_ops(**changes):
    def compact_kv(layers, acceptance, layout):
        compact.compact_kv(layers.caches, acceptance, layout)

    return _paged_ops(**{"compact_kv": compact_kv, **changes})


# --- the text ---


@pytest.mark.parametrize("name", TREES)
def test_greedy_text_is_the_plain_one(name):
    make, shape = TREES[name]
    requests, seen = mixed_requests(), []
    results = decode(TARGET, make(TARGET), requests, batch_size=3, tree=shape, ops=watching(seen))
    for result, request in zip(results, requests, strict=True):
        assert result.output_ids == plain_greedy(TARGET, request)
    steps = [step for step in seen if step.layout.num_rows > 0]
    paths = [path[path >= 0].tolist() for step in steps for path in step.acceptance.path]
    assert any(path != list(range(len(path))) for path in paths), "every path was a chain: nothing had to move"
    assert any((step.tree.num_nodes > 0).any() and step.acceptance.commit_mask.sum() > 10 for step in steps), "no mixed pass"


def test_a_tree_of_one_node_is_plain_decoding():
    requests = mixed_requests(0.9)
    for make, shape in ((make_dspark, TreeShape(1)), (make_mtp, TreeShape(1, "top_k", (2,)))):
        results = decode(TARGET, make(TARGET), requests, batch_size=2, tree=shape)
        plain = decode(TARGET, Autoregressive(), requests, batch_size=2)
        for have, want in zip(results, plain, strict=True):
            assert have.output_ids == want.output_ids and set(have.proposal_lengths) <= {0}


@pytest.mark.parametrize("name", ["DSpark", "MTP", "MTP, drawn"])
def test_a_request_does_not_depend_on_its_batch(name):
    make, shape = TREES[name]
    requests = [dataclasses.replace(r, temperature=t) for r, t in zip(requests_of(4), (1.0, 0.0, 0.7, 1.3), strict=True)]
    drafter = make(TARGET)
    for result, request in zip(decode(TARGET, drafter, requests, batch_size=3, tree=shape), requests, strict=True):
        (alone,) = decode(TARGET, drafter, [request], tree=shape)
        for field in ("output_ids", "acceptance_lengths", "proposal_lengths", "proposal_depths", "draft_passes", "accepted"):
            assert getattr(result, field) == getattr(alone, field), field
        log_probs = torch.log_softmax(all_logits(TARGET, result.output_ids) / (request.temperature or 1.0), -1)
        begin = len(request.prompt)
        want = [float(log_probs[i - 1, result.output_ids[i]]) for i in range(begin, len(result.output_ids))]
        assert result.logprobs == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("name", ["DSpark", "MTP"])
def test_counts(name):
    make, shape = TREES[name]
    for result in decode(TARGET, make(TARGET), requests_of(4, 1.0), tree=shape):
        assert result.draft_passes == (3 if name == "MTP" else 1) * result.target_passes
        assert sum(result.acceptance_lengths) >= result.new_tokens - 1
        for accepted, verified, depth in zip(
            result.acceptance_lengths, result.proposal_lengths, result.proposal_depths, strict=True
        ):
            assert accepted <= depth + 1 <= 5 and depth < verified == shape.num_nodes - 1


# --- caches ---


@pytest.mark.parametrize("name", ["DSpark", "block", "MTP"])
def test_paged_caches_give_the_same_tokens(name):
    make, shape = TREES[name]
    requests = mixed_requests(1.0)
    want = decode(TARGET, make(TARGET), requests, batch_size=2, tree=shape)
    have = decode(TARGET, make(TARGET), requests, batch_size=2, tree=shape, ops=paged_ops())
    assert [r.output_ids for r in have] == [r.output_ids for r in want]
    assert [r.acceptance_lengths for r in have] == [r.acceptance_lengths for r in want]


def test_rows_that_do_not_move_change_the_text():
    """The comparison above has power: without compaction the cache keeps a rejected sibling."""
    requests = requests_of(7)
    ops = paged_ops(compact_kv=lambda *arguments: None)
    results = decode(TARGET, make_block(TARGET), requests, tree=TreeShape(12, "best_first"), ops=ops)
    assert any(result.output_ids != plain_greedy(TARGET, request) for result, request in zip(results, requests, strict=True))


@pytest.mark.parametrize("name", ["DSpark", "block", "MTP"])
def test_a_drafter_proposes_the_same_whatever_was_rejected_before(name):
    """What it knows of accepted paths equals what a fresh start on the same text gives it."""
    make, shape = TREES[name]
    drafter, rounds = make(TARGET), []

    def draft_tree(base_logits, *arguments, anchor_positions, **options):
        rounds.append((int(anchor_positions[0]), base_logits.clone()))
        return REFERENCE_OPS.draft_tree(base_logits, *arguments, anchor_positions=anchor_positions, **options)

    ops, request = watching([], draft_tree=draft_tree), requests_of()[2]
    (result,) = decode(TARGET, drafter, [request], tree=shape, ops=ops)
    assert max(result.acceptance_lengths) > 1
    text, seen = plain_greedy(TARGET, dataclasses.replace(request, max_new_tokens=40)), rounds[:]
    for position, base_logits in seen[1:]:
        rounds.clear()
        decode(TARGET, drafter, [Request(text[:position], 1)], tree=shape, ops=ops)
        assert rounds[0][0] == position
        torch.testing.assert_close(base_logits, rounds[0][1], rtol=0, atol=2e-5)


def test_every_mtp_node_stands_on_its_own_path():
    """Logits of each node: the module over the whole text and the node's path alone, without a cache."""
    drafter, seen = make_mtp(TARGET), []

    def expand_tree(tree, node_logits, *, depth, anchor_positions, **options):
        seen.append((tree, node_logits.clone(), depth, int(anchor_positions[0])))
        return REFERENCE_OPS.expand_tree(tree, node_logits, depth=depth, anchor_positions=anchor_positions, **options)

    request = requests_of()[0]
    decode(TARGET, drafter, [request], tree=TreeShape(12, "top_k", (3, 2, 1)), ops=watching([], expand_tree=expand_tree))
    text, checked = plain_greedy(TARGET, dataclasses.replace(request, max_new_tokens=40)), 0
    for tree, node_logits, depth, position in seen[2:8]:
        frontier = [node for node in range(int(tree.num_nodes[0])) if tree.depths[0, node] == depth]
        for row, node in enumerate(frontier):
            path = [int(tree.tokens[0, m]) for m in range(1, node + 1) if int(tree.ancestors[0, node]) >> m & 1]
            assert len(path) == depth
            want = _mtp_logits(drafter, text[: position + 1], path)
            torch.testing.assert_close(node_logits[0, row], want, rtol=0, atol=2e-5)
            checked += 1
    assert checked >= 15


def _mtp_logits(drafter: MTP, ids: list[int], path: list[int]):
    """After the text `ids` (its last token is the anchor) and drafts `path`."""
    position, eps = len(ids) - 1, drafter.shape.eps
    out = TARGET.forward(torch.tensor(ids[:-1]), Rows.of([(0, 0, position)], "cpu"), TARGET.new_cache(1))
    hidden, following = out.pre_norm, [*ids[1:], *path]
    while True:
        embedded = rms_norm(TARGET.embedding[torch.tensor(following[: len(hidden)])], drafter.embedding_norm, eps)
        x = torch.cat([embedded, rms_norm(hidden, drafter.hidden_norm, eps)], -1) @ drafter.projection.T
        rows, cache = Rows.of([(0, 0, len(hidden))], "cpu"), KVCache(drafter.shape, 1, "cpu", torch.float32)
        (state,) = run_layers([drafter.layer], x, rows, cache, causal=True)
        if len(hidden) == len(following):
            return TARGET.logits(rms_norm(state[-1], drafter.norm, eps))
        hidden = torch.cat([hidden, state[-1:]])


# --- the distribution ---


@pytest.mark.parametrize(
    "shape",
    [
        TreeShape(5),
        TreeShape(6, "without_replacement", (2, 1, 1), rule="traversal"),
    ],
    ids=lambda shape: shape.rule,
)
def test_distribution_of_three_tokens(shape):
    """The prompt's token and two from rounds, of three of which some texts need all."""
    target = dist_target()
    results = dist_results(target, dist_dspark(target), tree=shape)
    assert misfit(target, results) < 1
    assert {length for result in results for length in result.acceptance_lengths} >= {1, 2, 3}


def test_distribution_test_detects_a_tree_that_is_not_the_drawn_one():
    """Best tokens that are said to be independent draws from their distribution."""

    def draft_tree(*arguments, method, sampling, **options):
        drawn = REFERENCE_OPS.draft_tree(*arguments, method="iid", sampling=sampling, **options)
        best = REFERENCE_OPS.draft_tree(*arguments, method="top_k", **options)
        return dataclasses.replace(best, proposal=DenseProposal(drawn.proposal.logits), drawn="iid")

    target = dist_target()
    ops = watching([], draft_tree=draft_tree)
    results = dist_results(target, dist_dspark(target), tree=TreeShape(3, "iid", (1, 1), rule="recursive"), ops=ops)
    assert misfit(target, results) > 1


# --- kernels ---


@pytest.mark.parametrize(
    "make, shape",
    [
        (make_dspark, TreeShape(6, candidates=8)),
        (make_mtp, TreeShape(6, "without_replacement", (2, 1), rule="traversal")),
    ],
    ids=["DSpark", "MTP, drawn"],
)
def test_kernels_decode_the_same(make, shape):
    """draft_tree, expand_tree, tree_layout, tree_attention, accept_tree and compact_kv in rounds of two requests."""
    pytest.importorskip("triton")
    from bench.decode.systems import kernel_ops

    requests = [Request([3, 1, 4, 1, 5], 3, 0.0), Request([2, 7], 3, 1.0, seed=5)]
    want = decode(TARGET, make(TARGET), requests, tree=shape)
    have = decode(TARGET, make(TARGET), requests, tree=shape, ops=kernel_ops("cpu"))
    assert [r.output_ids for r in have] == [r.output_ids for r in want]
    assert [r.acceptance_lengths for r in have] == [r.acceptance_lengths for r in want]


# --- bad input ---


@pytest.mark.parametrize(
    "make, options, message",
    [
        (make_dspark, dict(tree=TreeShape(4, rule="token")), "tree.rule: expected one of 'walk', 'recursive', 'traversal'"),
        (make_dspark, dict(tree=TreeShape(4), confidence_threshold=0.5), "tree: expected None together with"),
        (make_dspark, dict(tree=TreeShape(4), max_drafts=2), "tree: expected None together with"),
        (make_draft_model, dict(tree=TreeShape(4)), "tree: expected a drafter that drafts trees, got DraftModel"),
        (make_dspark, dict(tree=TreeShape(65)), "at most 64 nodes, got 65"),
    ],
)
def test_bad_arguments(make, options, message):
    with pytest.raises(ValueError, match=message):
        decode(TARGET, make(TARGET), requests_of(1), **options)
