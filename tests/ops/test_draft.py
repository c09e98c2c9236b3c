"""draft_block against reference/draft.py: tokens draw by draw, stored logits, log-sum-exp, confidence, flags, outputs."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from reference import cases, draft as reference
from reference.equality import assert_equal_or_tied
from tests.ops.draft_checks import check
from tests.ops.far import far_apart

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=14, deadline=None)
@given(st.data())
def test_equals_reference(data):
    draw = data.draw
    check(
        cases.draft_case(
            seed=draw(st.integers(0, 10**6)),
            requests=draw(st.sampled_from([1, 2, 3, 7, 13, 17])),
            drafts=draw(st.sampled_from([1, 2, 5])),
            vocab=draw(st.sampled_from([1, 33, 300, 1031, 2500])),
            rank=draw(st.sampled_from([0, 1, 7, 16, 48])),
            hidden_size=draw(st.sampled_from([1, 24, 1030])),
            dtype=draw(st.sampled_from(DTYPES)),
            weight_dtype=draw(st.sampled_from(DTYPES)),
            sampled=draw(st.booleans()),
            confidence=draw(st.sampled_from([None, "plain", "markov"])),
            scattered=draw(st.booleans()),
            extra_columns=draw(st.sampled_from([0, 5])),
            position_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
            first_draft=draw(st.sampled_from([0, 3])),
            noise=draw(st.sampled_from(["draft", "coupled"])),
        )
    )


@pytest.mark.parametrize("sampled", [False, True])
def test_rank_beyond_one_dot(monkeypatch, sampled):
    """Ranks that do not fit one dot are summed in pieces."""
    import dspark_kernels.launch.draft.dense as launch

    pick = launch.pick
    monkeypatch.setattr(launch, "pick", lambda *a: dataclasses.replace(pick(*a), block_r=32))
    check(cases.draft_case(seed=4, rank=75, vocab=200, sampled=sampled))


@pytest.mark.parametrize("seed", range(3))
def test_dyadic_inputs_get_no_exemption(seed):
    """On a dyadic grid sums are exact and logits tie often: greedy tokens must agree without any allowance."""
    case = cases.draft_case(seed=seed, sampled=False, vocab=1500, requests=5, rank=8, grid=0.5, dtype=torch.float32)
    block = check(case, exempt=False)
    ties = (block.proposal.logits == block.proposal.logits.max(-1, keepdim=True).values).sum(-1)
    assert (ties > 1).any(), "the case has no tie, so it shows nothing"


def test_padding_rows_touch_nothing():
    case = cases.draft_case(seed=6, requests=6, scattered=True, padding=2, vocab=400)
    slots = case.anchors.shape[0]
    out = dk.DraftBlock(
        tokens=torch.full((slots, 4), -77),
        proposal=dk.DenseProposal(torch.full((slots, 4, 400), -77.0), lse=torch.full((slots, 4), -77.0)),
        flags=torch.full((6,), -77, dtype=torch.int32),
        confidence=torch.full((slots, 4), -77.0),
        confidence_logits=torch.full((slots, 4), -77.0),
    )
    assert dk.draft_block(**case.arguments(), out=out) is out
    check(case, out)
    used = set(case.state_indices.tolist())
    for slot in set(range(slots)) - used:
        for tensor in (out.tokens, out.proposal.logits, out.proposal.lse, out.confidence, out.confidence_logits):
            assert (tensor[slot] == -77).all()
    assert out.flags.tolist()[-2:] == [0, 0] and (out.flags != -77).all()


def test_fresh_outputs_are_defined_outside_the_batch():
    case = cases.draft_case(seed=6, requests=3, scattered=True, vocab=100)
    block = dk.draft_block(**case.arguments())
    unused = sorted(set(range(6)) - set(case.state_indices.tolist()))
    assert (block.tokens[unused] == -1).all()
    for tensor in (block.proposal.logits, block.proposal.lse, block.confidence, block.confidence_logits):
        assert (tensor[unused] == 0).all()


def test_strided_inputs_and_a_cache_with_real_strides():
    """Anchors taken from input ids, logits inside a wider buffer, a proposal cache with room around it."""
    case = cases.draft_case(seed=9, requests=3, vocab=257, confidence=None)
    ids = torch.full((3, 5), -5)
    ids[:, 0] = case.anchors
    case.anchors = ids.view(-1)[::5]
    wide = torch.full((3, 4, 2, 300), float("nan"))
    wide[:, :, 0, :257] = case.base_logits
    case.base_logits = wide[:, :, 0, :257]
    cache = torch.full((4, 6, 320), float("nan"))
    out = dk.DraftBlock(
        tokens=torch.full((3, 9), -77)[:, :4],
        proposal=dk.DenseProposal(cache[:3, :4, :257], lse=torch.full((3, 8), -77.0)[:, :4]),
        flags=torch.full((3,), -77, dtype=torch.int32),
    )
    dk.draft_block(**case.arguments(), out=out)
    check(case, out)
    cache[:3, :4, :257] = 0
    assert torch.isnan(cache).sum() == cache.numel() - 3 * 4 * 257


def test_rows_further_apart_than_32_bits_count():
    """Position 2 starts more than 2^31 elements after position 0, in every tensor that has positions."""
    case = cases.draft_case(seed=10, requests=2, drafts=3, vocab=70, dtype=torch.bfloat16)
    case.base_logits[1, 2] = float("-inf")
    case.base_logits[1, 2, 7] = float("inf")  # then that row is read once more, for its flag
    want = dk.draft_block(**case.arguments())
    case.base_logits, case.hidden = far_apart(case.base_logits), far_apart(case.hidden)
    out = dk.DraftBlock(
        tokens=torch.full_like(want.tokens, -77),
        proposal=dk.DenseProposal(far_apart(torch.zeros_like(want.proposal.logits)), lse=torch.zeros_like(want.proposal.lse)),
        flags=torch.full_like(want.flags, -77),
        confidence=torch.zeros_like(want.confidence),
        confidence_logits=torch.zeros_like(want.confidence_logits),
    )
    dk.draft_block(**case.arguments(), out=out)
    for name in ("tokens", "confidence", "confidence_logits", "flags"):
        assert torch.equal(getattr(out, name), getattr(want, name)), name
    assert torch.equal(out.proposal.logits, want.proposal.logits) and torch.equal(out.proposal.lse, want.proposal.lse)


def test_step_by_step_equals_the_block():
    """K calls with K' = 1 and first_draft draw what one call draws: the address is the position, not the call."""
    case = cases.draft_case(seed=12, requests=3, drafts=4, vocab=500, confidence=None)
    whole = dk.draft_block(**case.arguments())
    out = dk.DraftBlock(
        tokens=torch.full((3, 4), -77),
        proposal=dk.DenseProposal(torch.full((3, 4, 500), -77.0), lse=torch.full((3, 4), -77.0)),
        flags=torch.zeros(3, dtype=torch.int32),
    )
    arguments = case.arguments()
    for k in range(4):
        # The head follows the previous draft, which a step-wise drafter passes as the anchor token.
        previous = case.anchors if k == 0 else out.tokens[:, k - 1].clone()
        arguments |= dict(base_logits=case.base_logits[:, k : k + 1], anchors=previous, first_draft=k)
        dk.draft_block(**arguments, out=out)
    assert torch.equal(out.tokens, whole.tokens)
    assert torch.equal(out.proposal.logits, whole.proposal.logits) and torch.equal(out.proposal.lse, whole.proposal.lse)


def test_coupled_noise_is_the_same_for_any_anchor():
    case = cases.draft_case(seed=3, drafts=3, confidence=None, rank=0, noise="coupled")
    first = dk.draft_block(**case.arguments())
    later = case.arguments() | dict(base_logits=case.base_logits[:, 1:], anchor_positions=case.anchor_positions + 1)
    assert torch.equal(dk.draft_block(**later).tokens, first.tokens[:, 1:])
    redrawn = later | dict(noise="draft")
    assert not torch.equal(dk.draft_block(**redrawn).tokens, first.tokens[:, 1:])


def test_proposal_of_a_greedy_block_is_one_hot():
    case = cases.draft_case(seed=1, sampled=False)
    assert isinstance(dk.draft_block(**case.arguments()).proposal, dk.OneHotProposal)
    kept = dk.draft_block(**case.arguments(), keep_logits=True).proposal
    assert isinstance(kept, dk.DenseProposal) and (kept.temperature == 0).all()


# --- values that only the device sees ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("value", ["nan", "all_minus_inf", "all_nan", "two_inf", "only_inf", "minus_inf_mask"])
def test_odd_logits(value, sampled):
    case = cases.draft_case(seed=21, requests=4, vocab=1200, sampled=sampled, confidence=None, dtype=torch.bfloat16)
    row = case.base_logits[1, 2]
    inf = float("inf")
    expected = 0
    if value == "nan":
        row[5::7] = float("nan")
        expected = dk.Flag.NAN
    elif value == "all_minus_inf":
        row[:] = -inf
        expected = dk.Flag.NONFINITE_ROW
    elif value == "all_nan":
        row[:] = float("nan")
        expected = dk.Flag.NONFINITE_ROW | dk.Flag.NAN
    elif value == "two_inf":
        row[[700, 1100]] = inf
    elif value == "only_inf":
        row[:] = -inf
        row[[700, 1100]] = inf
        expected = dk.Flag.NONFINITE_ROW
    else:
        row[: row.shape[0] // 2] = -inf
    arguments = case.arguments()
    block = dk.draft_block(**arguments, keep_logits=True)
    assert block.flags.tolist() == [0, int(expected), 0, 0]
    if value in ("two_inf", "only_inf"):
        assert int(block.tokens[1, 2]) == 700
    if value in ("all_minus_inf", "all_nan"):
        assert int(block.tokens[1, 2]) == 0

    def run(decisions):
        want = reference.draft_block(**arguments, keep_logits=True, stored_logits=block.proposal.logits, decisions=decisions)
        return {r: (want.tokens[r].tolist(), int(want.flags[r])) for r in range(4)}

    assert_equal_or_tied(run, {r: (block.tokens[r].tolist(), int(block.flags[r])) for r in range(4)})


@pytest.mark.parametrize("anchor", [-1, 300, 2**40])
def test_anchor_outside_the_vocabulary(anchor):
    case = cases.draft_case(seed=2, vocab=300)
    case.anchors[1] = anchor
    block = dk.draft_block(**case.arguments())
    assert block.flags.tolist() == [0, int(dk.Flag.BAD_TOKEN_ID), 0]
    assert torch.equal(block.proposal.logits[1, 0], case.base_logits[1, 0]), "an unknown anchor adds no transition"
    assert ((block.tokens >= 0) & (block.tokens < 300)).all()


@pytest.mark.parametrize("temperature", [1e-6, 1e6, -1.0, float("nan")])
def test_extreme_temperatures(temperature):
    case = cases.draft_case(seed=8, vocab=700, confidence=None)
    case.sampling.temperature[1] = temperature
    case.sampling.temperature[2] = temperature
    check(case)


# --- arguments --------------------------------------------------------------------------------------------------------

BASE = torch.zeros(3, 4, 300)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(base_logits=BASE.double()), TypeError, "base_logits: expected dtype float32 or bfloat16 or float16, got float64"),
        (dict(base_logits=BASE[0]), ValueError, "base_logits: expected shape"),
        (dict(base_logits=torch.zeros(3, 300, 4).transpose(1, 2)), ValueError, "base_logits: expected the last dimension"),
        (dict(base_logits=BASE[:, :0]), ValueError, "base_logits: expected K >= 1"),
        (dict(base_logits=[1]), TypeError, "base_logits: expected a torch.Tensor, got list"),
        (dict(anchors=torch.zeros(3)), TypeError, "anchors: expected dtype int32 or int64"),
        (dict(anchors=torch.zeros(2, dtype=torch.int64)), ValueError, "anchors: expected shape"),
        (dict(anchors=torch.zeros(3, dtype=torch.int64, device="meta")), ValueError, "anchors: expected a tensor on cpu"),
        (dict(anchor_positions=torch.zeros(4, dtype=torch.int64)), ValueError, "anchor_positions: expected shape"),
        (dict(state_indices=torch.zeros(3)), TypeError, "state_indices: expected dtype int32 or int64"),
        (dict(head=3), TypeError, "head: expected MarkovHead, got int"),
        (dict(head=dk.MarkovHead(torch.zeros(300, 8), torch.zeros(299, 8))), ValueError, "head.w2: expected shape"),
        (dict(hidden=None), ValueError, "hidden: expected"),
        (dict(hidden=torch.zeros(3, 5, 24)), ValueError, "hidden: expected shape"),
        (dict(confidence=dk.ConfidenceHead(torch.zeros(9))), ValueError, "confidence.weight: expected shape"),
        (
            dict(confidence=dk.ConfidenceHead(torch.zeros(24), sts_temperatures=torch.ones(3))),
            ValueError,
            "confidence.sts_temperatures: expected at least 4",
        ),
        (dict(sampling=1), TypeError, "sampling: expected SamplingTensors"),
        (dict(noise="gumbel"), ValueError, "noise: expected one of"),
        (dict(first_draft=-1), ValueError, "first_draft: expected"),
        (dict(workspace=7), TypeError, "workspace: expected Workspace"),
        (dict(out=7), TypeError, "out: expected DraftBlock"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = cases.draft_case(seed=0, requests=3, drafts=4, vocab=300).arguments() | change
    with pytest.raises(error) as caught:
        dk.draft_block(**arguments)
    assert str(caught.value).startswith(message)


def test_workspace_too_small_says_what_is_needed():
    case = cases.draft_case(seed=0, requests=5, drafts=4, vocab=900)
    with pytest.raises(ValueError, match="workspace: expected room for 5 requests x 4 drafts over 900 ids, got one made for 1 x 1"):
        dk.draft_block(**case.arguments(), workspace=dk.Workspace(1, 1, 30, "cpu"))


def test_empty_batch():
    case = cases.draft_case(seed=0, requests=1, vocab=50, sampled=True)
    arguments = case.arguments()
    for name in ("base_logits", "anchors", "anchor_positions", "hidden"):
        arguments[name] = arguments[name][:0]
    arguments["sampling"] = dk.SamplingTensors(torch.empty(0), torch.empty(0, dtype=torch.int64))
    block = dk.draft_block(**arguments)
    assert block.tokens.shape == (0, 4) and block.flags.shape == (0,) and block.proposal.logits.shape == (0, 4, 50)
