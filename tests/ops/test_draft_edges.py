"""Edges of the vocabulary in draft_block: reduced vocabularies with a map of ids, padded rows, widths that differ."""

import dataclasses

import pytest
import torch

import dspark_kernels as dk
from reference import (
    accept as reference_accept,
    cases,
    draft as reference_draft,
    tree as reference_tree,
    tree_draft as reference_tree_draft,
)
from tests.ops.draft_checks import arguments_of, check


def test_tokens_of_a_reduced_vocabulary_are_target_ids():
    case = cases.draft_case(seed=3, vocab=300, target_vocab=2000, sampled=False)
    block = check(case)
    column = block.proposal.logits.argmax(-1)
    assert torch.equal(case.draft_to_target[column], block.tokens) and (block.tokens >= 300).any()
    assert block.proposal.draft_to_target is case.draft_to_target
    unused = case.draft_to_target < 0
    assert (block.proposal.logits[:, :, unused] == -torch.inf).all() and unused.any()


def test_noise_of_a_reduced_vocabulary_is_the_targets():
    """Ids 0 .. V-1 as a map change no bit, and coupled noise of a subset is that of the whole."""
    case = cases.draft_case(seed=4, vocab=300, noise="coupled")
    want = dk.draft_block(**case.arguments())
    case.draft_to_target = torch.arange(300)
    have = dk.draft_block(**case.arguments())
    for name in ("tokens", "confidence", "flags"):
        assert torch.equal(getattr(have, name), getattr(want, name)), name
    assert torch.equal(have.proposal.logits, want.proposal.logits) and torch.equal(have.proposal.lse, want.proposal.lse)
    # All ids but three, in another order: the same drafts, as long as none of the three was one.
    lost = [int(i) for i in range(300) if i not in want.tokens][:3]
    order = torch.tensor([i for i in reversed(range(300)) if i not in lost])
    part = case.arguments() | dict(
        base_logits=case.base_logits[:, :, order].contiguous(),
        head=dk.MarkovHead(case.head.w1, case.head.w2[order].contiguous()),
        draft_to_target=order,
    )
    assert torch.equal(dk.draft_block(**part).tokens, want.tokens)


def test_ties_of_a_reduced_vocabulary_go_to_the_lowest_target_id():
    ids = torch.tensor([7, 5, -1, 9, 2**40])
    block = dk.draft_block(
        torch.tensor([[[1.0, 1.0, 9.0, 1.0, 9.0]]]), torch.tensor([0]), anchor_positions=torch.tensor([3]), draft_to_target=ids
    )
    assert block.tokens.tolist() == [[5]] and block.flags.tolist() == [0]


@pytest.mark.parametrize("sampled", [True, False])
def test_a_map_without_any_token_drafts_0_and_says_so(sampled):
    case = cases.draft_case(seed=4, vocab=40, drafts=2, confidence=None, sampled=sampled)
    case.draft_to_target = torch.full((40,), -1)
    block = dk.draft_block(**case.arguments())
    assert (block.tokens == 0).all() and (block.flags == dk.Flag.NONFINITE_ROW).all()


def test_a_map_beyond_the_target_is_never_drafted():
    """Ids that W1, bias or mask do not know stand for no token: nothing is read outside those tables."""
    case = cases.draft_case(seed=5, vocab=300, drafts=2, target_vocab=400, adjust={"bias", "mask"}, filters={"top_p"})
    case.draft_to_target[::5] = torch.arange(1000, 1060)
    block = check(case)
    assert (block.tokens < 400).all() and (block.proposal.logits[:, :, ::5] == -torch.inf).all()


def test_infinite_logits_of_unused_ids_do_not_count():
    case = cases.draft_case(seed=6, vocab=70, drafts=1, confidence=None, rank=0, sampled=False)
    case.draft_to_target = torch.arange(70)
    case.draft_to_target[:10] = -1
    case.base_logits[0, 0, 10:] = -torch.inf
    case.base_logits[0, 0, 30] = torch.inf  # finite logits are there, but of no token
    case.base_logits[1, 0, :10] = torch.nan
    block = check(case)
    assert block.flags.tolist() == [int(dk.Flag.NONFINITE_ROW), 0, 0] and int(block.tokens[0, 0]) == 30


@pytest.mark.parametrize("sampled", [True, False])
def test_padded_rows_never_win(sampled):
    """Columns of logits and rows of W2 behind the vocabulary hold +100 and NaN; the stored logits have the vocabulary's width."""
    case = cases.draft_case(seed=6, vocab=257, padded=True, extra_columns=15, sampled=sampled)
    block = check(case)
    assert (block.tokens < 257).all() and block.proposal.logits.shape[2] == 257 and (block.flags == 0).all()
    case.vocab_size = None
    with pytest.raises(ValueError, match="head.w2: expected shape"):
        dk.draft_block(**case.arguments())


def test_offsets_become_ids_once():
    assert dk.ids_from_offsets(torch.tensor([0, 4, 4, 10])).tolist() == [0, 5, 6, 13]
    assert dk.ids_from_offsets(torch.tensor([3], dtype=torch.int32)).dtype == torch.int64
    assert dk.ids_from_offsets(torch.tensor([13, 11, -2, -2]), 14).tolist() == [13, 12, 0, 1]  # in any order, up to V - 1
    assert dk.ids_from_offsets(torch.tensor([], dtype=torch.int64), 1).tolist() == []


TOP = 2**63 - 1


@pytest.mark.parametrize(
    "offsets, vocab_size, message",
    [
        ([0, -2], None, "offsets: expected target ids from 0 to 2147483646, got -1 for draft id 1"),
        ([0, 4, 4, 10], 13, "offsets: expected target ids from 0 to 12, got 13 for draft id 3"),
        ([0, 2**31], None, "offsets: expected target ids from 0 to 2147483646, got 2147483649 for draft id 1"),
        ([0, TOP], None, f"offsets: expected target ids from 0 to 2147483646, got {-TOP - 1} for draft id 1"),  # wrapped around
        ([4, 5, 2, 1], 9, "offsets: expected each target id once, got 4 for draft ids 0 and 2"),
        ([0, 1, 0], None, "offsets: expected each target id once, got 2 for draft ids 1 and 2"),
        ([0], 0, "vocab_size: expected in [1, 2147483647], got 0"),
    ],
)
def test_offsets_of_ids_that_are_no_map_are_refused(offsets, vocab_size, message):
    with pytest.raises(ValueError) as caught:
        dk.ids_from_offsets(torch.tensor(offsets), vocab_size)
    assert str(caught.value) == message


def _shard(base, ids, **given):
    return dk.draft_block_partial(base, ZEROS, anchor_positions=ZEROS, vocab_start=0, vocab_shards=1, draft_to_target=ids, **given)


def _tree(ids, **given):
    call = dict(anchors=ZEROS, anchor_positions=ZEROS, num_nodes=3, method="top_k", branching=(2,), draft_to_target=ids)
    return dk.draft_tree(torch.zeros(2, 1, 4), **call | given)


def _expand(ids):
    common = dict(anchor_positions=ZEROS, method="top_k", draft_to_target=ids)
    return dk.expand_tree(_tree(torch.arange(4)), torch.zeros(2, 2, 4), depth=1, branching=1, **common)


def _accept(ids, function=dk.accept_chain, vocab=9):
    case = cases.accept_case(requests=2, drafts=1, vocab=vocab, draft_vocab=4, mapped=True)
    return function(**case.arguments() | dict(proposal=dataclasses.replace(case.proposal, draft_to_target=ids)))


def _accept_tree(ids, function=dk.accept_tree):
    case = cases.accept_tree_case(1, 2, 3, 9, "without_replacement", "recursive", proposal="mapped", draft_vocab=4)
    proposal = dataclasses.replace(case.tree.proposal, draft_to_target=ids)
    return function(**case.arguments() | dict(tree=dataclasses.replace(case.tree, proposal=proposal)))


ZEROS = torch.zeros(2, dtype=torch.int64)
FOUR = torch.zeros(2, 1, 4)
DRAFT = dict(base_logits=FOUR, anchors=ZEROS, anchor_positions=ZEROS)
MAPS = {
    "draft_block": ("", lambda ids: dk.draft_block(**DRAFT, draft_to_target=ids)),
    "candidates": ("", lambda ids: dk.draft_block(**DRAFT, draft_to_target=ids, candidates=2)),
    "shard": ("", lambda ids: _shard(FOUR, ids, position=0)),
    "candidates of a shard": ("", lambda ids: _shard(FOUR, ids, candidates=2)),
    "draft_tree": ("", _tree),
    "expand_tree": ("", _expand),
    "accept_chain": ("proposal.", _accept),
    "accept_tree": ("tree.proposal.", _accept_tree),
}


@pytest.mark.parametrize("op", MAPS)
def test_a_map_with_an_id_twice_is_refused(op):
    """Entries that stand for no token may be repeated."""
    place, call = MAPS[op]
    with pytest.raises(ValueError) as caught:
        call(torch.tensor([7, 2, -1, 7]))
    assert str(caught.value) == f"{place}draft_to_target: expected each target id once, got 7 for draft ids 0 and 3"
    call(torch.tensor([7, -1, 2**40, 2**40]))
    call(torch.tensor([7, -1, 2, -1]))


@pytest.mark.parametrize(
    "call",
    [
        lambda ids: reference_draft.draft_block(**DRAFT, draft_to_target=ids),
        lambda ids: reference_tree_draft.draft_tree(**DRAFT, num_nodes=3, method="top_k", branching=(2,), draft_to_target=ids),
        lambda ids: _accept(ids, reference_accept.accept_chain),
        lambda ids: _accept_tree(ids, reference_tree.accept_tree),
    ],
)
def test_the_reference_refuses_a_map_with_an_id_twice(call):
    with pytest.raises(ValueError, match="draft_to_target: expected each target id once"):
        call(torch.tensor([7, 2, -1, 7]))
    call(torch.tensor([7, -1, 2, -1]))


def test_padding_of_a_shards_map_is_not_looked_at():
    _shard(FOUR, torch.tensor([7, 2, 5, 7]), position=0, vocab_size=3)
    with pytest.raises(ValueError, match="draft_to_target: expected each target id once, got 7"):
        _shard(FOUR, torch.tensor([7, 2, 7, 7]), position=0, vocab_size=3)


BASE = torch.zeros(3, 4, 300)
PROPOSAL = dk.DenseProposal(BASE)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(draft_to_target=torch.zeros(299).long()), ValueError, "draft_to_target: expected shape [300]"),
        (dict(draft_to_target=torch.zeros(300).int()), TypeError, "draft_to_target: expected dtype int64"),
        (dict(vocab_size=301), ValueError, "vocab_size: expected in [1, 300], got 301"),
        (dict(vocab_size=0), ValueError, "vocab_size: expected in [1, 300], got 0"),
        (
            dict(vocab_size=300, head=dk.MarkovHead(torch.zeros(300, 2), torch.zeros(299, 2))),
            ValueError,
            "head.w2: expected at least vocab_size = 300 rows, got 299",
        ),
        (
            dict(draft_to_target=torch.arange(300), out=dk.DraftBlock(torch.zeros(3, 4).long(), PROPOSAL, torch.zeros(3).int())),
            ValueError,
            "out.proposal.draft_to_target: expected the map of this call",
        ),
        (
            dict(sampling=dk.SamplingTensors(torch.ones(3), torch.zeros(3).long(), logit_bias=torch.zeros(3, 299))),
            ValueError,
            "sampling: expected logit_bias and token_bitmask for 300 ids, got room for 299",
        ),
        (
            dict(sampling=dk.SamplingTensors(torch.ones(3), torch.zeros(3).long(), token_bitmask=torch.zeros(3, 10).int())),
            ValueError,
            "sampling.token_bitmask: expected shape [3, 4, words]",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = dict(base_logits=BASE, anchors=torch.zeros(3).long(), anchor_positions=torch.zeros(3).long())
    with pytest.raises(error) as caught:
        dk.draft_block(**arguments | change)
    assert str(caught.value).startswith(message)


def test_padding_rows_with_everything_touch_nothing():
    case = cases.draft_case(
        seed=6, requests=4, drafts=2, scattered=True, padding=2, vocab=130, kind="rnn", target_vocab=900, adjust=cases.ADJUSTMENTS,
        filters=cases.FILTERS,
    )  # fmt: skip
    arguments, slots = arguments_of(case), case.anchors.shape[0]
    out = dk.DraftBlock(
        tokens=torch.full((slots, 2), -77),
        proposal=dk.DenseProposal(
            torch.full((slots, 2, 130), -77.0), lse=torch.full((slots, 2), -77.0), draft_to_target=case.draft_to_target
        ),
        flags=torch.full((4,), -77, dtype=torch.int32),
        confidence=torch.full((slots, 2), -77.0),
        confidence_logits=torch.full((slots, 2), -77.0),
    )
    dk.draft_block(**arguments, out=out)
    check(case, out, arguments["head_state"])
    for slot in set(range(slots)) - set(case.state_indices.tolist()):
        for tensor in (out.tokens, out.proposal.logits, out.proposal.lse, out.confidence, out.confidence_logits):
            assert (tensor[slot] == -77).all()
    assert out.flags.tolist()[-2:] == [0, 0] and (out.flags != -77).all()
