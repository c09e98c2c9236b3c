"""draft_block with penalties, bias, mask and filters: the stored logits are the filtered ones, and drafts come from them."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from reference import cases
from tests.ops.draft_checks import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_equals_reference(data):
    draw = data.draw
    check(
        cases.draft_case(
            seed=draw(st.integers(0, 10**6)),
            adjust=draw(st.sets(st.sampled_from(cases.ADJUSTMENTS))),
            filters=draw(st.sets(st.sampled_from(cases.FILTERS))),
            filter_order=draw(st.sampled_from(["top_k_first", "joint"])),
            kind=draw(st.sampled_from(["vanilla", "gated", "rnn"])),
            rank=draw(st.sampled_from([7, 16])),
            dtype=draw(st.sampled_from(DTYPES)),
            requests=draw(st.sampled_from([1, 3, 10])),
            drafts=draw(st.sampled_from([1, 3])),
            vocab=draw(st.sampled_from([33, 300, 1031])),
            confidence=draw(st.sampled_from([None, "markov"])),
            scattered=draw(st.booleans()),
            first_draft=draw(st.sampled_from([0, 3])),
            noise=draw(st.sampled_from(["draft", "coupled"])),
            target_vocab=draw(st.sampled_from([None, 2000])),
        )
    )


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
def test_filters_leave_their_support_and_draws_from_it(order):
    filters = dict(filters=cases.FILTERS, filter_order=order, temperatures=(1.0, 1.7))
    case = cases.draft_case(seed=31, requests=3, drafts=2, vocab=300, confidence=None, **filters)
    free = dk.draft_block(**case.arguments() | dict(sampling=dk.SamplingTensors(case.sampling.temperature, case.sampling.seed)))
    block = check(case)
    assert (free.tokens[:, 0] != block.tokens[:, 0]).any(), "no draft of the whole row was outside the support"
    assert block.proposal.logits.gather(2, block.tokens[:, :, None]).isfinite().all()


def test_penalties_follow_the_drafts_of_the_round():
    """The same logits at every position: without penalties one token is drafted again and again."""
    case = cases.draft_case(seed=32, requests=2, drafts=4, vocab=70, rank=0, confidence=None, temperatures=(0.0,))
    case.base_logits[:] = case.base_logits[:, :1].abs()
    nothing = torch.full((2, 1), -1), torch.zeros(2, 1, dtype=torch.int32)
    penalties = dk.Penalties(*nothing, frequency=torch.full((2,), 100.0))
    case.sampling = dk.SamplingTensors(case.sampling.temperature, case.sampling.seed, penalties=penalties)
    block = check(case)
    best = case.base_logits[:, 0].topk(4).indices
    assert torch.equal(block.tokens, best)
    # Position by position into one block: what lies in the earlier columns counts.
    out = dk.DraftBlock(
        tokens=torch.full((2, 4), -1), proposal=dk.DenseProposal(torch.zeros(2, 4, 70)), flags=torch.zeros(2, dtype=torch.int32)
    )
    for k in range(4):
        part = dict(base_logits=case.base_logits[:, k : k + 1], first_draft=k)
        dk.draft_block(**case.arguments() | part, out=out)
    assert torch.equal(out.tokens, best) and torch.equal(out.proposal.logits, block.proposal.logits)


def test_a_mask_has_a_row_for_every_position():
    case = cases.draft_case(seed=33, requests=3, drafts=2, vocab=70, scattered=True, confidence=None, adjust={"mask"})
    allowed = torch.tensor([3, 40])
    words = torch.zeros_like(case.sampling.token_bitmask)
    for k, token in enumerate(allowed.tolist()):
        words[:, k, token // 32] = 1 << token % 32
    case.sampling = dataclasses.replace(case.sampling, token_bitmask=words)
    assert torch.equal(check(case).tokens[case.state_indices.long()], allowed.expand(3, 2))
