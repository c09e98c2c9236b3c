"""The cases of draft trees in bench.kernels: costs by hand and from the tensors, gates that turn red, calls that repeat."""

import dataclasses

import pytest
import torch

import dspark_kernels as dk
from bench.shared import measure
from bench.shared.baselines import BASELINES
from bench.shared.cases import trees as tc
from bench.shared.cases.accept import Accept
from bench.shared.cases.tensors import nbytes, same, tensors
from tests.bench.test_kernels import CASES, CPU, FakeClock, assert_red, bench_of

pytest.importorskip("triton")


def test_costs_by_hand():
    draft = tc.DraftTrees(2, nodes=5, candidates=3, drafts=2, vocab=10, rank=4)
    read = 2 * 4 * 10 + 2 * 4 * 3 * 4 + 2 * 10 * 4 + 2 * 28  # base logits, rows of W2 and of W1, per request
    assert draft.bytes == read + 10 * 36 + 2 * 8 and draft.flops == 2 * (20 + 5 * 3 * 13)
    accept = tc.AcceptTrees(2, nodes=3, vocab=10)
    assert accept.parents == [-1, 0, 1] and accept.rows == 6
    assert accept.bytes == 2 * 60 + 6 * 33 + 2 * 12 + 2 * 52 + 2 * 12
    drawn = dataclasses.replace(accept, drawn="without_replacement", rule="traversal")
    assert drawn.bytes == accept.bytes + 2 * 10 * 2 * 2  # the logits of two nodes
    assert accept.flops == 4 * 60 and accept.instructions == 10 * 60
    move = tc.Compact(2, nodes=6, accepted=2, layers=3, kv_heads=2, head_dim=5)
    assert move.bytes == 2 * 4 * 3 * 2 * 10 * 2 + 48 * 6 + 8 + 4 * 6 + 64


def test_trees_of_eight_nodes_have_the_rows_of_chains():
    chain, walk = Accept(64, "one_hot"), tc.AcceptTrees(64, 8)
    assert walk.rows == chain.rows and walk.bytes == pytest.approx(chain.bytes, rel=1e-4)
    assert tc.comb_parents(8) == [-1, 0, 0, 1, 2, 3, 4, 0] and len(tc.comb_parents(32)) == 32


def test_the_tensors_of_acceptance_have_the_counted_bytes():
    spec = tc.AcceptTrees(3).small()
    inputs, result = measure.check(spec, CPU)
    layout, tree = inputs["layout"], inputs["tree"]
    unread = [layout.batch_indices, layout.draft_lens, layout.flags, layout.num_rows, layout.positions]
    unread += [t for t in tensors(tree) if t is not tree.parents]
    assert spec.bytes == nbytes(inputs) + nbytes(result) - sum(t.nbytes for t in unread) + 3 * 8  # a position a request


@pytest.mark.parametrize("what", ["tokens", "num_accepted", "path", "kv_source", "commit_mask", "next_token"])
def test_a_wrong_acceptance_turns_the_gate_red(monkeypatch, what):
    right = dk.accept_tree

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        column = getattr(result, what).view(-1)
        column[0] = ~column[0] if column.dtype == torch.bool else column[0] + 1
        return result

    monkeypatch.setattr(dk, "accept_tree", wrong)
    assert_red("accept_tree walk_m32_r1")


@pytest.mark.parametrize("what", ["tokens", "parents", "ancestors", "num_nodes"])
def test_a_wrong_tree_turns_the_gate_red(monkeypatch, what):
    right = dk.draft_tree

    def wrong(*arguments, **options):
        tree = right(*arguments, **options)
        getattr(tree, what).view(-1)[-1] += 1
        return tree

    monkeypatch.setattr(dk, "draft_tree", wrong)
    assert_red("draft_tree c64_r1")


def test_a_slot_too_many_turns_the_gate_red(monkeypatch):
    right = dk.compact_kv

    def wrong(layers, acceptance, layout):
        right(layers, acceptance, layout)
        layers.caches[-1][0, 0, 0, 0] += 1.0

    monkeypatch.setattr(dk, "compact_kv", wrong)
    assert_red("compact_kv r64")


def test_compaction_repeats_and_its_baseline_moves_the_same():
    spec = tc.Compact(3).small()
    inputs, untouched = measure.inputs_of(spec, 1, CPU), measure.inputs_of(spec, 1, CPU)
    function, arguments = BASELINES["compact_kv"].function, BASELINES["compact_kv"].arguments
    function(*arguments(untouched))
    seen = [cache.clone() for cache in inputs["layers"].caches]
    for _ in range(2):
        spec.call(inputs)
        assert same(inputs["layers"].caches, untouched["layers"].caches) and not same(inputs["layers"].caches, tuple(seen))


@pytest.mark.parametrize("name", ["compact_kv r64", "accept_tree walk_m32_r1"])
def test_cases_are_timed(name):
    rows = measure.run(CASES[name], bench_of(clock=FakeClock(), baselines=("eager", "engines")))
    assert [row.status for row in rows] == ["ok"] * len(rows)
    contenders = {row.contender for row in rows}
    assert contenders == ({"kernel", "eager"} if name.startswith("compact") else {"kernel"})
