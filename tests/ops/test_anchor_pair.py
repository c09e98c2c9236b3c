"""`anchors` and `anchor_positions` of every op that advances them: both or neither, by every way that leads to the op."""

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels.ops.accept import chain, shards as accept_shards, tree
from reference import accept as reference_chain, cases, tree as reference_tree
from reference.cases import accept_tree_case
from tests.ops import shards

ZEROS = torch.zeros(2, dtype=torch.int64)
PAIR = dict(anchors=ZEROS, anchor_positions=ZEROS)
LONE = [dict(anchors=ZEROS), dict(anchor_positions=ZEROS), dict(anchors=ZEROS.int(), anchor_positions=None)]


def _chain(**given):
    return dk.accept_chain(**cases.accept_case(requests=2, drafts=1, vocab=40, sampled=False).arguments(), **given)


def _tree(**given):
    return dk.accept_tree(**accept_tree_case(1, 2, 3, 40, "one_hot", "walk").arguments(), **given)


def _finish(**given):
    return shards.accept(cases.accept_case(requests=2, drafts=1, vocab=40, sampled=False), 1, 40, **given)


OPS = {
    "chain": (_chain, chain, "_accept_chain"),
    "tree": (_tree, tree, "_accept_tree"),
    "finish": (_finish, accept_shards, "_accept_finish"),
}


def refused(lone):
    """The message names the argument that is missing, then the one that is there."""
    given = next(name for name, value in lone.items() if value is not None)
    (missing,) = PAIR.keys() - {given}
    return pytest.raises(ValueError, match=f"^{missing}: expected a tensor because {given} is given, got None")


@pytest.mark.parametrize("lone", LONE, ids=["positions missing", "anchors missing", "positions None"])
@pytest.mark.parametrize("op", OPS)
def test_one_without_the_other_is_refused(op, lone):
    with refused(lone):
        OPS[op][0](**{name: value for name, value in lone.items() if value is not None})


@pytest.mark.parametrize("op", OPS)
def test_torchs_op_refuses_too(monkeypatch, op):
    call, module, name = OPS[op]
    registered, seen = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda arguments: (seen.append(arguments), registered(arguments)))
    call(**PAIR)
    for missing in PAIR:
        with refused({other: ZEROS for other in PAIR if other != missing}):
            registered.op(*registered.values(seen[0]._replace(**{missing: None})))


def test_a_prepared_call_refuses_too():
    case = cases.accept_case(requests=2, drafts=1, vocab=40, sampled=False).arguments()
    with refused(LONE[0]):
        dk.prepare(dk.accept_chain, **case, **LONE[0])
    prepared = dk.prepare(dk.accept_chain, **case, **PAIR)
    with pytest.raises(TypeError, match="^anchor_positions: expected Tensor, as in the example, got NoneType"):
        prepared(anchor_positions=None)


def test_a_batch_without_requests_is_no_exception():
    """Nothing is launched, and the next batch would be wrong."""
    none, block = ZEROS[:0], dk.DraftBlock(torch.zeros(0, 1).long(), dk.OneHotProposal(), torch.zeros(0).int())
    layout = dk.fixed_layout(block, none, anchors=none, anchor_positions=none)
    with refused(LONE[0]):
        dk.accept_chain(torch.zeros(0, 9), layout, anchors=none)


@pytest.mark.parametrize("lone", LONE)
def test_the_reference_refuses_too(lone):
    given = {name: value for name, value in lone.items() if value is not None}
    with pytest.raises(ValueError, match="^anchors, anchor_positions: expected both or neither"):
        reference_chain.accept_chain(**cases.accept_case(requests=2, drafts=1, vocab=40).arguments(), **given)
    with pytest.raises(ValueError, match="^anchors, anchor_positions: expected both or neither"):
        reference_tree.accept_tree(**accept_tree_case(1, 2, 3, 40, "one_hot", "walk").arguments(), **given)
