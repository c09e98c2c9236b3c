"""Sequential heads of draft_block: gated, rnn, quantised W2, any rank, in every combination with the rest."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from dspark_kernels.launch.draft import dense as launch
from reference import cases
from tests.ops.draft_checks import arguments_of, check

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
W2_DTYPES = [*DTYPES, torch.int8, torch.float8_e4m3fn]


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_equals_reference(data):
    draw = data.draw
    check(
        cases.draft_case(
            seed=draw(st.integers(0, 10**6)),
            kind=draw(st.sampled_from(["vanilla", "gated", "rnn"])),
            rank=draw(st.sampled_from([1, 7, 16, 48, 65])),
            w2_dtype=draw(st.sampled_from(W2_DTYPES)),
            weight_dtype=draw(st.sampled_from(DTYPES)),
            dtype=draw(st.sampled_from(DTYPES)),
            requests=draw(st.sampled_from([1, 2, 7, 17])),
            drafts=draw(st.sampled_from([1, 2, 5])),
            vocab=draw(st.sampled_from([33, 300, 1031])),
            hidden_size=draw(st.sampled_from([1, 24, 130])),
            sampled=draw(st.booleans()),
            confidence=draw(st.sampled_from([None, "plain", "markov"])),
            scattered=draw(st.booleans()),
            first_draft=draw(st.sampled_from([0, 3])),
            noise=draw(st.sampled_from(["draft", "coupled"])),
            target_vocab=draw(st.sampled_from([None, 2000])),
            padded=draw(st.booleans()),
            extra_columns=draw(st.sampled_from([0, 5])),
        )
    )


def test_ranks_beyond_one_dot_and_pieces_of_latents(monkeypatch):
    """W2 and the mixing weights summed in pieces, latents and precomputed products made by several tiles."""
    pick = launch.pick
    small = dict(block_r=32, block_j=16, block_n=32, block_s=16, block_v=64)
    monkeypatch.setattr(launch, "pick", lambda *a: dataclasses.replace(pick(*a), **small))
    for kind in ("vanilla", "gated", "rnn"):
        check(cases.draft_case(seed=4, rank=75, vocab=130, requests=2, drafts=2, kind=kind, w2_dtype=torch.int8))


@pytest.mark.parametrize("rank, kind", [(1000, "gated"), (1024, "vanilla")])
def test_large_ranks(rank, kind):
    check(cases.draft_case(seed=3, rank=rank, vocab=70, requests=2, drafts=2, kind=kind, weight_dtype=torch.bfloat16))


def test_many_requests_and_positions():
    check(cases.draft_case(seed=2, requests=35, drafts=2, vocab=70, rank=8, kind="gated", confidence=None))
    check(cases.draft_case(seed=2, requests=1, drafts=16, vocab=40, rank=8, kind="rnn", confidence=None))
    # All phases in one program: nobody to wait for but its own warps, each of which has a part of what another one reads.
    check(cases.draft_case(seed=2, requests=9, drafts=16, vocab=50, rank=8, kind="rnn", confidence=None))


def _block(slots, drafts, vocab, rows):
    return dk.DraftBlock(
        tokens=torch.full((slots, drafts), -77),
        proposal=dk.DenseProposal(torch.full((slots, drafts, vocab), -77.0), lse=torch.full((slots, drafts), -77.0)),
        flags=torch.zeros(rows, dtype=torch.int32),
    )


def test_rnn_goes_on_from_its_state():
    """K calls of one position with the state carried have the bits of one call; a call that starts anew does not read it."""
    case = cases.draft_case(seed=12, requests=3, drafts=4, vocab=200, kind="rnn", confidence=None, scattered=True, padding=1)
    slots = case.anchors.shape[0]
    whole_state = torch.full_like(case.head_state, float("nan"))
    whole = dk.draft_block(**case.arguments() | dict(head_state=whole_state))
    out, state = _block(slots, 4, 200, 3), torch.full_like(case.head_state, float("nan"))
    used = case.state_indices[case.state_indices >= 0].long()
    for k in range(4):
        previous = case.anchors if k == 0 else out.tokens[:, k - 1].clone()
        part = dict(base_logits=case.base_logits[:, k : k + 1], hidden=case.hidden[:, k : k + 1], first_draft=k)
        dk.draft_block(**case.arguments() | part | dict(anchors=previous, head_state=state), out=out)
    assert torch.equal(out.tokens[used], whole.tokens[used])
    assert torch.equal(out.proposal.logits[used], whole.proposal.logits[used])
    assert torch.equal(state[used], whole_state[used])
    unused = [slot for slot in range(slots) if slot not in used.tolist()]
    assert state[unused].isnan().all() and whole_state[unused].isnan().all()


@pytest.mark.parametrize("kind", ["gated", "rnn"])
def test_unknown_anchor(kind):
    """W1 has no row for it: zeros go in, so that a gated head adds nothing and an rnn what its state and h give."""
    case = cases.draft_case(seed=2, vocab=300, kind=kind)
    case.anchors[1] = 300
    block = check(case)
    assert block.flags.tolist() == [0, int(dk.Flag.BAD_TOKEN_ID), 0]
    assert torch.equal(block.proposal.logits[1, 0], case.base_logits[1, 0]) == (kind == "gated")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_heads(dtype):
    """quantise_head keeps the kind of a head, and its weights to half a step of what each row's largest allows."""
    g = torch.Generator().manual_seed(5)
    case = cases.draft_case(seed=8, vocab=200, rank=24, kind="gated", weight_dtype=torch.bfloat16)
    case.head.w2[3] = 0
    case.head.w2[4] = torch.randn(24, generator=g).bfloat16() * 1e-30
    head = dk.quantise_head(case.head, dtype)
    assert isinstance(head, dk.GatedMarkovHead) and head.w2.dtype == dtype and head.gate_weight is case.head.gate_weight
    error = (head.w2.double() * head.w2_scale.double()[:, None] - case.head.w2.double()).abs()
    largest = case.head.w2.double().abs().amax(1, keepdim=True)
    # int8: half of 1/127 of the largest. e4m3: 2^-4 of the number itself, and of the smallest steps half of 2^-9 / 448.
    bound = largest / 254 if dtype == torch.int8 else case.head.w2.double().abs() / 16 + largest / 448 * 2.0**-10
    assert (error <= bound * 1.001 + 1e-37).all() and (head.w2[3].double() == 0).all()
    check(dataclasses.replace(case, head=head))
    with pytest.raises(ValueError, match="head.w2: expected weights that are not quantised"):
        dk.quantise_head(head, dtype)
    with pytest.raises(ValueError, match="dtype: expected torch.int8"):
        dk.quantise_head(case.head, torch.float16)


def test_fp8_bits_are_decoded_where_there_is_no_cast(monkeypatch):
    case = cases.draft_case(seed=8, vocab=300, w2_dtype=torch.float8_e4m3fn, weight_dtype=torch.bfloat16)
    want = dk.draft_block(**arguments_of(case))
    pick = launch.pick
    monkeypatch.setattr(launch, "pick", lambda *a: dataclasses.replace(pick(*a), native_fp8=False))
    assert torch.equal(check(case).proposal.logits, want.proposal.logits)


RNN = cases.draft_case(kind="rnn", requests=3, drafts=4, vocab=300)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(hidden=None), ValueError, "hidden: expected [R, K, H] because a RnnMarkovHead is given, got None"),
        (dict(head_state=None, first_draft=1), ValueError, "head_state: expected fp32 [S, r] because an RnnMarkovHead goes on"),
        (dict(head_state=torch.zeros(3, 15)), ValueError, "head_state: expected shape [3, 16]"),
        (dict(head_state=torch.zeros(3, 16).double()), TypeError, "head_state: expected dtype float32"),
        (
            dict(head=dataclasses.replace(RNN.head, joint_weight=torch.zeros(48, 55))),
            ValueError,
            "head.joint_weight: expected shape [48, 56]",
        ),
        (dict(head=cases.draft_case(vocab=300).head), ValueError, "head_state: expected None because MarkovHead has no state"),
        (dict(workspace=dk.Workspace(1, 1, 30, "cpu")), ValueError, "workspace: expected room for 3 requests x 4 drafts over 300"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error) as caught:
        dk.draft_block(**arguments_of(RNN) | change)
    assert str(caught.value).startswith(message)


def test_a_workspace_for_the_rank_is_enough():
    workspace = dk.Workspace(3, 4, 300, "cpu", markov_rank=16)
    workspace.scratch.fill_(-1)
    block = dk.draft_block(**arguments_of(RNN), workspace=workspace)
    assert torch.equal(block.tokens, dk.draft_block(**arguments_of(RNN)).tokens)
    assert (workspace.counters[2:] == 0).all()  # of the first two, the grid barrier's, a sign bit may stay


@pytest.mark.parametrize("kind", ["vanilla", "gated"])
def test_confidence_has_the_same_bits_whatever_the_launch(monkeypatch, kind):
    """Warps share a sum out among themselves: its order must not follow their number, or batches of other sizes would differ."""
    case = cases.draft_case(seed=8, requests=3, drafts=3, vocab=130, rank=40, hidden_size=300, kind=kind, confidence="markov")
    pick, found = launch.pick, []
    for warps in (2, 4, 8):
        monkeypatch.setattr(launch, "pick", lambda *a, warps=warps: dataclasses.replace(pick(*a), num_warps=warps))
        found.append(dk.draft_block(**arguments_of(case)).confidence_logits)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
