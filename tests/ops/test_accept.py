"""accept_chain against reference/accept.py: tokens draw by draw, counts, rows, commit mask, flags, anchors in place."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from dspark_kernels.kernels.accept import chain as kernels
from dspark_kernels.launch.accept import chain as launch
from dspark_kernels.testing import interpreter
from reference import cases
from tests.ops.accept_checks import DTYPES, check, with_lse
from tests.ops.far import far_apart
from tests.ops.fields import assert_same, poisoned

RULES = ("token", "block", "coupled")
PROPOSALS = ("dense", "sparse", "one_hot", "none")


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_equals_reference(data):
    draw = data.draw
    scattered = draw(st.booleans())
    requests = draw(st.sampled_from([1, 2, 5, 7]))
    case = cases.accept_case(
        seed=draw(st.integers(0, 10**6)),
        requests=requests,
        drafts=draw(st.sampled_from([1, 2, 4, 7])),
        vocab=draw(st.sampled_from([2, 33, 1024, 1500, 5000])),
        dtype=draw(st.sampled_from(DTYPES)),
        proposal=draw(st.sampled_from(PROPOSALS)),
        rule=draw(st.sampled_from(RULES)),
        candidates=draw(st.sampled_from([1, 3, 16, 37])),
        odd_lists=draw(st.booleans()),
        logprobs=draw(st.sampled_from([None, None, "raw", "processed"])),
        sampled=draw(st.sampled_from([True, True, True, False])),
        scattered=scattered,
        padding=draw(st.integers(0, requests - 1)) if scattered else 0,
        closeness=draw(st.sampled_from([0.3, 0.8, 1.0])),
        draft_temperature=draw(st.booleans()),
        exact_rows=draw(st.booleans()),
    )
    if case.sampling is not None and draw(st.integers(0, 4)) == 0:
        case.synthetic_rates = torch.rand(case.layout.max_drafts)
    compare_in_place(case)


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_sampling_settings_act_inside(data):
    """Penalties along the request's own path, bias, masks and filters, under every rule and proposal."""
    draw = data.draw
    rule = draw(st.sampled_from(RULES))
    proposal = draw(st.sampled_from(PROPOSALS))
    case = cases.accept_case(
        seed=draw(st.integers(0, 10**6)),
        requests=draw(st.sampled_from([1, 3, 5])),
        drafts=draw(st.sampled_from([1, 3, 5])),
        vocab=draw(st.sampled_from([5, 90, 640, 1100])),
        dtype=draw(st.sampled_from(DTYPES)),
        proposal=proposal,
        rule=rule,
        scattered=draw(st.booleans()),
        closeness=draw(st.sampled_from([0.8, 0.95])),
        adjust=draw(st.sampled_from([(), ("bias",), ("mask",), ("repetition", "presence", "frequency"), cases.ADJUSTMENTS])),
        filters=draw(st.sampled_from([(), ("top_k",), ("top_p",), ("min_p",), cases.FILTERS])),
        filter_order=draw(st.sampled_from(["top_k_first", "joint"])),
        mapped=proposal == "dense" and draw(st.booleans()),
        draft_vocab=draw(st.sampled_from([None, 70])) if proposal == "dense" else None,
        logprobs=draw(st.sampled_from([None, "raw", "processed"])),
    )
    compare_in_place(case)


def compare_in_place(case):
    """The case against the reference, and the same bits into outputs that held something else."""
    acceptance = check(case)
    out = poisoned(acceptance)
    assert dk.accept_chain(**case.arguments(), out=out) is out
    assert_same(out, acceptance)


def test_many_uniforms():
    """About 500 acceptance tests at once, interpreted 200: comparisons that are off by one part in a hundred come out differently."""
    requests, least = (40, 140) if interpreter.interpreting() else (110, 440)
    acceptance = check(cases.accept_case(seed=1, requests=requests, drafts=7, vocab=40, closeness=0.97))
    assert acceptance.num_emitted.sum() > least


@pytest.mark.parametrize("proposal", ["dense", "sparse", "one_hot"])
def test_many_uniforms_of_the_block_rule(proposal):
    """A rule that stops at the first draft that fails, or sums another row's residual, comes out differently."""
    closeness = 0.8 if proposal == "dense" else 0.97
    if interpreter.interpreting() and proposal != "dense":
        pytest.skip("takes 10 s interpreted: test_compiled.py runs it compiled")
    case = cases.accept_case(seed=2, requests=30, drafts=6, vocab=40, proposal=proposal, closeness=closeness, rule="block",
                             candidates=30, sharpness=1.5, temperatures=(1.0,))  # fmt: skip
    acceptance = check(case)
    token = dk.accept_chain(**case.arguments() | dict(rule="token"))
    assert (acceptance.num_accepted > token.num_accepted).any()


@pytest.mark.parametrize("rule", RULES)
def test_one_launch(monkeypatch, rule):
    launched = []
    launch_kernel = kernels.launch_accept_chain
    monkeypatch.setattr(kernels, "launch_accept_chain", lambda *a, **k: (launched.append(a), launch_kernel(*a, **k)))
    for proposal in PROPOSALS:
        case = cases.accept_case(requests=2, drafts=2, vocab=50, proposal=proposal, rule=rule, logprobs="raw")
        dk.accept_chain(**case.arguments())
    assert len(launched) == len(PROPOSALS)


VARIANTS = [("token", "dense"), ("token", "sparse"), ("token", "one_hot")]
VARIANTS += [("block", "dense"), ("block", "sparse"), ("coupled", "none")]
ODD = [(*variant, True) for variant in VARIANTS] + [("token", "dense", False)]


@pytest.mark.parametrize("rule, proposal", VARIANTS)
@pytest.mark.parametrize("pairs", [1, 32])
def test_any_chunk_size_gives_the_same_bits(monkeypatch, pairs, rule, proposal):
    case = cases.accept_case(seed=31, requests=2, drafts=3, vocab=6000, proposal=proposal, sharpness=1.0, rule=rule)
    want = check(case)

    def pick(arch, num_requests, num_blocks, num_drafts, residual_rows, work):
        chunk = min(pairs, 16)
        group = 2 if chunk >= num_blocks else 1
        return launch.AcceptConfig(group, chunk, lag=1, num_warps=1, max_registers=None)

    monkeypatch.setattr(launch, "pick", pick)
    have = dk.accept_chain(**case.arguments())
    assert torch.equal(have.tokens, want.tokens) and torch.equal(have.flags, want.flags)


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("lag", [0, 1, 2, 100])
def test_any_lag_between_the_phases(monkeypatch, lag, rule):
    case = cases.accept_case(seed=32, requests=5, drafts=3, vocab=5000, closeness=0.3, rule=rule)
    pick = launch.pick
    monkeypatch.setattr(launch, "pick", lambda *a: dataclasses.replace(pick(*a), lag=lag))
    check(case)


def test_stored_lse_gives_the_same_tokens_as_sweeping_the_proposal():
    case = cases.accept_case(seed=5, requests=7, drafts=4, vocab=3000, dtype=torch.float32)
    stored = with_lse(case)
    want = check(case)
    have = dk.accept_chain(**case.arguments() | dict(proposal=stored))
    assert torch.equal(have.tokens, want.tokens)
    check(dataclasses.replace(case, proposal=stored))


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("draft_vocab", [700, 1024, 5000])
def test_draft_and_target_widths_differ(draft_vocab, mapped, rule):
    case = cases.accept_case(seed=1, vocab=1500, draft_vocab=draft_vocab, closeness=0.95, mapped=mapped, rule=rule, requests=5)
    want = check(case)
    if draft_vocab == 700:
        stored = dataclasses.replace(with_lse(case), draft_to_target=case.proposal.draft_to_target)
        check(dataclasses.replace(case, proposal=stored))
    assert want.num_accepted.any(), "no draft was accepted, so the map shows nothing"


def test_map_of_a_batch_without_a_live_request():
    """The counters of the inverted map come back to zero whoever is there; what its scratch held does not matter."""
    case = cases.accept_case(seed=2, vocab=900, draft_vocab=300, mapped=True, scattered=True, requests=20, drafts=1)
    case.proposal.logits[..., 0] += 12  # column 0, to which a scratch of zeros leads, holds nearly all of the probability
    workspace = dk.Workspace(20, 1, 900, "cpu")
    want = check(case)
    for indices in (torch.full((20,), -1, dtype=torch.int32), case.state_indices):
        workspace.scratch.fill_(0)
        have = dk.accept_chain(**case.arguments() | dict(state_indices=indices), workspace=workspace)
        assert (workspace.counters == 0).all()
    assert torch.equal(have.tokens, want.tokens)


@pytest.mark.parametrize("seed", range(3))
def test_dyadic_greedy_rows_get_no_exemption(seed):
    case = cases.accept_case(seed=seed, requests=6, vocab=2500, grid=1.0, sampled=False, dtype=torch.float32, exact_rows=True)
    check(case, exempt=False)
    ties = (case.target_logits == case.target_logits.max(-1, keepdim=True).values).sum(-1)
    assert (ties > 1).any(), "the case has no tie, so it shows nothing"


@pytest.mark.parametrize("stored_lse", [True, False])
def test_rows_further_apart_than_32_bits_count(stored_lse):
    """Row 2 starts more than 2^31 elements after row 0, in the target's logits and in the proposal."""
    accepted = set()
    for seed in range(8):
        case = cases.accept_case(seed=seed, requests=1, drafts=3, vocab=1100, closeness=0.9, lengths=torch.tensor([3]))
        if stored_lse:
            case.proposal = with_lse(case)
        want = dk.accept_chain(**case.arguments())
        case.target_logits = far_apart(case.target_logits[None])[0]
        case.proposal = dataclasses.replace(case.proposal, logits=far_apart(case.proposal.logits))
        have = check(case)
        assert torch.equal(have.tokens, want.tokens)
        accepted.add(int(have.num_accepted))
    assert {2, 3} <= accepted  # the far rows were drawn from, as residual and as bonus


def test_anchors_advance_in_place():
    case = cases.accept_case(seed=3, requests=5, scattered=True, padding=1)
    slots = case.sampling.temperature.shape[0]
    for dtype in (torch.int32, torch.int64):
        anchors = torch.full((slots,), -5, dtype=dtype)
        positions = torch.full((2 * slots,), -5, dtype=dtype)[::2]
        acceptance = dk.accept_chain(**case.arguments(), anchors=anchors, anchor_positions=positions)
        live = [(r, int(s)) for r, s in enumerate(case.state_indices) if s >= 0]
        for r, slot in live:
            first = case.layout.positions[case.layout.logits_indices[case.layout.cu_num_logits[r]]]
            assert anchors[slot] == acceptance.next_token[r]
            assert positions[slot] == first + acceptance.num_accepted[r] + 1
        unused = sorted(set(range(slots)) - {slot for _, slot in live})
        assert (anchors[unused] == -5).all() and (positions[unused] == -5).all()


def test_prefill_rows_and_requests_that_do_not_emit():
    block = dk.DraftBlock(torch.tensor([[3, 4], [5, 6], [7, 8]]), dk.OneHotProposal(), torch.zeros(3, dtype=torch.int32))
    layout = dk.fixed_layout(
        block,
        torch.tensor([2, 0, 0]),
        anchors=torch.tensor([1, 2, 3]),
        anchor_positions=torch.tensor([10, 0, 40]),
        num_prefill_tokens=torch.tensor([0, 5, 3], dtype=torch.int32),
        emits=torch.tensor([True, True, False]),
        max_rows=16,
    )
    logits = torch.zeros(16, 50)
    logits[torch.arange(4), torch.tensor([3, 9, 9, 20])] = 5.0
    anchors, positions = torch.tensor([1, 2, 3]), torch.tensor([10, 0, 40])
    acceptance = dk.accept_chain(logits, layout, anchors=anchors, anchor_positions=positions)
    assert acceptance.tokens.tolist() == [[3, 9, -1], [20, -1, -1], [-1, -1, -1]]
    assert acceptance.last_row.tolist() == [1, 7, 0] and acceptance.next_token.tolist() == [9, 20, -1]
    assert acceptance.commit_mask.int().tolist() == [1, 1, 0] + [1] * 5 + [1] * 3 + [0] * 5
    assert anchors.tolist() == [9, 20, 3] and positions.tolist() == [12, 5, 40]


# --- values that only the device sees ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule, proposal, sampled", ODD)
@pytest.mark.parametrize("value", ["nan", "all_minus_inf", "all_nan", "two_inf", "only_inf", "mask", "draft_inf", "draft_nan"])
def test_odd_logits(value, sampled, rule, proposal):
    if value.startswith("draft") and (proposal not in ("dense", "sparse") or not sampled):
        pytest.skip("no logits of drafts are read")
    case = cases.accept_case(
        seed=41, requests=6, drafts=3, vocab=2100, proposal=proposal, sampled=sampled, closeness=1.0,
        lengths=torch.full((6,), 3), dtype=torch.float32, rule=rule, logprobs="raw" if value == "two_inf" else "processed",
    )  # fmt: skip
    inf = float("inf")
    for r, i in ((0, 0), (1, 1), (2, 3), (4, 2)):
        row = case.target_logits[int(case.layout.cu_num_logits[r]) + i]
        draft = case.proposal.logits[r, min(i, 2)] if proposal in ("dense", "sparse") else torch.zeros(2100)
        if value == "nan":
            row[::5] = float("nan")
        elif value == "all_minus_inf":
            row[:] = -inf
        elif value == "all_nan":
            row[:] = float("nan")
        elif value == "two_inf":
            row[[1500, 1900]] = inf
        elif value == "only_inf":
            row[:] = -inf
            row[[1500, 1900]] = inf
        elif value == "mask":
            row[: row.shape[0] // 2] = -inf
        elif value == "draft_inf":
            draft[[-4, -2]] = inf
        else:
            draft[::3] = float("nan")
    acceptance = check(case)
    assert ((acceptance.next_token >= 0) & (acceptance.next_token < 2100)).all()
    if value in ("all_minus_inf", "all_nan", "only_inf"):
        assert acceptance.flags[0] & dk.Flag.NONFINITE_ROW and acceptance.num_accepted[0] == 0
        assert acceptance.next_token[0] == (1500 if value == "only_inf" else 0)


@pytest.mark.parametrize("rule, proposal, sampled", ODD)
@pytest.mark.parametrize("bad", [-1, -2, 1500, 2**40])
def test_draft_ids_out_of_range(bad, sampled, rule, proposal):
    case = cases.accept_case(seed=13, requests=6, drafts=3, proposal=proposal, sampled=sampled, closeness=1.0, rule=rule,
                             lengths=torch.full((6,), 3))  # fmt: skip
    for r, i in ((0, 1), (1, 2), (3, 3)):
        case.layout.token_ids[int(case.layout.query_start_loc[r]) + i] = bad
    acceptance = check(case)
    stopped = acceptance.num_accepted[[0, 1, 3]] == torch.tensor([0, 1, 2])
    assert stopped.any(), "no request reached its bad draft, so the test shows nothing"
    flag = dk.Flag.MISSING_DRAFT if bad == -1 else dk.Flag.BAD_TOKEN_ID
    for r, reached in zip((0, 1, 3), stopped, strict=True):
        assert bool(acceptance.flags[r] & flag) == bool(reached)


def test_draft_outside_the_support_of_its_distribution():
    case = cases.accept_case(seed=17, requests=4, drafts=3, sampled=True, closeness=1.0, lengths=torch.full((4,), 3))
    case.sampling.temperature[:] = 1.0
    for r in range(4):
        token = int(case.layout.token_ids[int(case.layout.query_start_loc[r]) + 1])
        case.proposal.logits[r, 0, token] = float("-inf")
    acceptance = check(case)
    assert (acceptance.num_accepted == 0).all()
    assert all(f & dk.Flag.BAD_TOKEN_ID for f in acceptance.flags.tolist())


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("content", ["one id", "nowhere", "no probability", "infinite", "octet"])
def test_odd_lists(content, rule):
    """Lists of one id repeated, of ids outside the vocabulary, of probability 0, with a +inf, and with whole octets of ids."""
    case = cases.accept_case(seed=29, requests=5, drafts=2, vocab=1300, proposal="sparse", candidates=16, closeness=0.9, rule=rule,
                             lengths=torch.full((5,), 2), temperatures=(1.0, 0.0), dtype=torch.float32)  # fmt: skip
    ids, logits = case.proposal.ids, case.proposal.logits
    if content == "one id":
        ids[:] = ids[..., :1].clone()
    elif content == "nowhere":
        ids[..., ::2] = torch.tensor([-1, 1300, 2**31, 2**40, -(2**40), 2**62, -7, 1301])
    elif content == "no probability":
        logits[:, 0] = float("-inf")
    elif content == "infinite":
        logits[..., [3, 5]] = float("inf")
    else:
        ids[:] = torch.arange(1290, 1306) - 6
    check(case)


def test_entries_that_share_ids_and_octets():
    """Most of the target's probability lies in the octets of the lists, and two entries make an id's probability."""
    case = cases.accept_case(seed=7, requests=40, drafts=1, vocab=1100, proposal="sparse", candidates=16, closeness=0.9,
                             lengths=torch.ones(40), temperatures=(1.0,), dtype=torch.float32, sharpness=1.0)  # fmt: skip
    g = torch.Generator().manual_seed(7)
    case.target_logits[:, 1024:1048] += 6
    case.proposal.ids[:] = (1024 + torch.randperm(24, generator=g)[:8]).repeat(2)
    case.proposal.logits[:] = torch.randn(40, 1, 16, generator=g)
    drawn = case.proposal.ids[:, 0, 0]
    case.layout.token_ids[case.layout.query_start_loc[:-1].long() + 1] = drawn
    acceptance = check(case)
    assert (acceptance.num_rejected > 0).sum() > 10 and (acceptance.num_accepted > 0).sum() > 5


@pytest.mark.parametrize("rule", RULES)
def test_forced_rates(rule):
    """Rate 1 accepts all that can be, rate 0 nothing, whatever the probabilities."""
    for rate in (0.0, 1.0):
        case = cases.accept_case(seed=37, requests=6, drafts=3, vocab=600, closeness=0.0, rule=rule)
        case.synthetic_rates = torch.full((3,), rate)
        case.layout.token_ids[int(case.layout.query_start_loc[0]) + 2] = -1
        acceptance = check(case)
        lens = case.layout.draft_lens.clone()
        lens[0] = 1
        assert torch.equal(acceptance.num_accepted, lens if rate else lens * 0)


def test_empty_residual_draws_from_the_target():
    """Equal distributions, and a draft outside their support: nothing is left of [target - draft]+."""
    case = cases.accept_case(seed=19, requests=3, drafts=1, vocab=1100, lengths=torch.ones(3), dtype=torch.float32)
    case.sampling.temperature[:] = 1.0
    for r in range(3):
        first = int(case.layout.cu_num_logits[r])
        row = torch.full((1100,), float("-inf"))
        row[[10 + r, 1050]] = 0.0
        case.target_logits[first] = row
        case.proposal.logits[r, 0] = row
        case.layout.token_ids[int(case.layout.query_start_loc[r]) + 1] = 7
    acceptance = check(case)
    wanted = int(dk.Flag.BAD_TOKEN_ID | dk.Flag.EMPTY_RESIDUAL)
    assert acceptance.flags.tolist() == [wanted] * 3
    assert all(int(t) in (10 + r, 1050) for r, t in enumerate(acceptance.next_token))


@pytest.mark.parametrize("rule, proposal", VARIANTS)
@pytest.mark.parametrize("temperature", [1e-6, 1e6, -1.0, float("nan")])
def test_extreme_temperatures(temperature, rule, proposal):
    for dtype in (torch.float16,) if temperature > 0 else (torch.float32,):
        case = cases.accept_case(seed=23, requests=5, drafts=3, dtype=dtype, closeness=0.9, rule=rule, proposal=proposal,
                                 vocab=900)  # fmt: skip
        case.sampling.temperature[1:4] = temperature
        check(case)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(target_logits=torch.zeros(25, 9).double()), TypeError, "target_logits: expected dtype"),
        (dict(target_logits=torch.zeros(25)), ValueError, "target_logits: expected shape"),
        (dict(target_logits=torch.zeros(9, 25).T), ValueError, "target_logits: expected the last dimension"),
        (dict(target_logits=torch.zeros(26, 9)), ValueError, "layout.logits_indices: expected an entry for each"),
        (dict(target_logits=torch.zeros(25, 0)), ValueError, "target_logits: expected L >= 1"),
        (dict(layout=None), TypeError, "layout: expected VerifyLayout"),
        (dict(rule="fair"), ValueError, "rule: expected one of"),
        (dict(logprobs="all"), ValueError, "logprobs: expected one of"),
        (dict(sampling=1.0), TypeError, "sampling: expected SamplingTensors"),
        (dict(proposal=3), TypeError, "proposal: expected DenseProposal or SparseProposal"),
        (dict(proposal=dk.DenseProposal(torch.zeros(4, 4, 9))), ValueError, "proposal.logits: expected shape"),
        (dict(proposal=dk.DenseProposal(torch.zeros(5, 3, 9))), ValueError, "proposal.logits: expected K >="),
        (dict(anchors=torch.zeros(4, dtype=torch.int64)), ValueError, "anchors: expected shape"),
        (dict(anchor_positions=torch.zeros(5)), TypeError, "anchor_positions: expected dtype"),
        (dict(anchors=torch.zeros(5, dtype=torch.int64, device="meta")), ValueError, "anchors: expected a tensor on cpu"),
        (dict(target_logits=torch.zeros(25, 9, device="meta")), ValueError, "layout.draft_lens: expected a tensor on meta"),
        (dict(proposal=dk.DenseProposal(torch.zeros(5, 4, 9, device="meta"))), ValueError, "proposal.logits: expected a tensor on"),
        (dict(state_indices=torch.zeros(5)), TypeError, "state_indices: expected dtype int32 or int64"),
        (dict(out=7), TypeError, "out: expected Acceptance"),
        (dict(workspace=7), TypeError, "workspace: expected Workspace"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = cases.accept_case(seed=0, requests=5, drafts=4, vocab=9).arguments() | change
    with pytest.raises(error) as caught:
        dk.accept_chain(**arguments)
    assert str(caught.value).startswith(message)


def test_workspace_too_small_says_what_is_needed():
    case = cases.accept_case(seed=0, requests=5, drafts=4, vocab=5000)
    with pytest.raises(ValueError, match="workspace: expected room for 5 requests x 4 drafts"):
        dk.accept_chain(**case.arguments(), workspace=dk.Workspace(2, 4, 5000, "cpu"))


def test_empty_batch():
    empty = torch.empty(0, dtype=torch.int64)
    block = dk.DraftBlock(empty.view(0, 3), dk.OneHotProposal(), empty.int())
    layout = dk.fixed_layout(block, empty, anchors=empty, anchor_positions=empty)
    acceptance = dk.accept_chain(torch.empty(0, 50), layout)
    assert acceptance.tokens.shape == (0, 4) and acceptance.commit_mask.shape == (0,)
