"""Acceptance on vocabulary shards: the bits of the whole op where no vocabulary block is cut, the reference's draws for any cut."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

import dspark_kernels as dk
from dspark_kernels.ops.accept import shards as accept_shards
from dspark_kernels.testing import interpreter
from reference import cases
from tests.ops import shards
from tests.ops.accept_checks import check, with_lse
from tests.ops.fields import assert_same

INF = float("inf")


def equal_on_all_ranks(case, count, width, exact=True, **options):
    """The ranks' common result. exact: it is accept_chain's, to the bit; otherwise the reference's, up to near ties."""
    results = shards.accept(case, count, width, **options)
    for result in results[1:]:
        assert_same(result, results[0], "ranks disagree")
    if exact:
        assert_same(results[0], dk.accept_chain(**case.arguments()))
    else:
        check(case, results[0])
    return results[0]


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_whole_blocks_give_the_bits_of_the_whole_op(data):
    draw = data.draw
    vocab, count, width = draw(st.sampled_from([
        (1500, 1, 1500), (1500, 2, 1024), (5000, 2, 3072), (5000, 3, 2048), (2100, 4, 1024), (3000, 8, 1024),
    ]))  # fmt: skip
    requests = draw(st.integers(1, 2 if count < 8 else 1))
    scattered = draw(st.booleans())
    case = cases.accept_case(
        seed=draw(st.integers(0, 10**6)),
        requests=requests,
        drafts=draw(st.integers(1, 3)),
        vocab=vocab,
        rule=draw(st.sampled_from(["token", "block"])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        proposal=draw(st.sampled_from(["dense", "dense", "sparse", "sparse", "one_hot", "none"])),
        candidates=draw(st.sampled_from([1, 5, 37, 70])),
        odd_lists=draw(st.booleans()),
        adjust=draw(st.sampled_from([(), (), ("bias",), ("mask",), cases.ADJUSTMENTS])),
        sampled=draw(st.sampled_from([True, True, True, False])),
        scattered=scattered,
        padding=draw(st.integers(0, requests - 1)) if scattered else 0,
        closeness=draw(st.sampled_from([0.3, 0.8, 1.0])),
        draft_temperature=draw(st.booleans()),
        exact_rows=draw(st.booleans()),
    )
    if draw(st.booleans()) and isinstance(case.proposal, dk.DenseProposal) and case.proposal.temperature is None:
        case = dataclasses.replace(case, proposal=with_lse(case))
    equal_on_all_ranks(case, count, width, poison=draw(st.booleans()))


@pytest.mark.parametrize(
    "vocab, count, width, proposal, lse, rule, adjust",
    [
        (1500, 2, 750, "one_hot", False, "token", ()),
        (1100, 3, 401, "dense", False, "token", cases.ADJUSTMENTS),
        (33, 4, 9, "one_hot", False, "block", ("mask",)),
        (2500, 2, 1300, "dense", True, "block", ()),
        (1100, 3, 401, "sparse", False, "block", ("bias",)),
        (33, 5, 7, "sparse", False, "token", cases.ADJUSTMENTS),
    ],
)
def test_any_cut_draws_what_the_reference_draws(vocab, count, width, proposal, lse, rule, adjust):
    case = cases.accept_case(
        seed=width, requests=2, drafts=2, vocab=vocab, proposal=proposal, closeness=0.8, rule=rule, adjust=adjust, candidates=9
    )  # fmt: skip
    equal_on_all_ranks(dataclasses.replace(case, proposal=with_lse(case)) if lse else case, count, width, exact=False)


@pytest.mark.parametrize("vocab, count, width", [(1100, 3, 401)])
def test_coupled_and_greedy_rows_need_one_gather(vocab, count, width):
    """The drafts of a greedy proposal agree with the target's noise now and then: accepted and rejected ones."""
    case = cases.accept_case(
        seed=1, requests=6, drafts=3, vocab=vocab, sharpness=3.0, closeness=0.3, rule="coupled", adjust=("repetition", "presence")
    )  # fmt: skip
    assert dk.accept_phases(case.proposal, sampling=case.sampling, rule="coupled") == ("normalise",)
    acceptance = equal_on_all_ranks(case, count, width)
    assert 0 < int(acceptance.num_accepted.sum()) and int(acceptance.num_rejected.sum()) > 0


@pytest.mark.parametrize(
    "value, proposal, width",
    [
        ("nan", "one_hot", 1024),
        ("all_minus_inf", "dense", 700),
        ("two_inf", "one_hot", 700),
        ("only_inf", "dense", 1024),
        ("shard", "dense", 700),
        ("draft_inf", "dense", 1024),
        ("draft_inf", "sparse", 700),
        ("two_inf", "sparse", 1024),
    ],
)
def test_odd_logits(value, proposal, width):
    case = cases.accept_case(
        seed=41, requests=2, drafts=2, vocab=2100, proposal=proposal, closeness=1.0, lengths=torch.full((2,), 2),
        dtype=torch.float32,
    )  # fmt: skip
    for r, i in ((0, 0), (1, 1)):
        row = case.target_logits[int(case.layout.cu_num_logits[r]) + i]
        draft = case.proposal.logits[r, min(i, 1)] if proposal != "one_hot" else torch.zeros(2100)
        if value == "nan":
            row[::5] = float("nan")
        elif value in ("all_minus_inf", "only_inf"):
            row[:] = -INF
        elif value == "all_nan":
            row[:] = float("nan")
        elif value == "shard":
            row[width : 2 * width] = -INF  # a rank without any finite logit
        elif value == "draft_inf":
            draft[[900, 2000] if proposal == "dense" else [1, 3]] = INF
        if value in ("two_inf", "only_inf"):
            row[[1500, 1900]] = INF
    acceptance = equal_on_all_ranks(case, 3, width)
    if value in ("all_minus_inf", "all_nan", "only_inf"):
        assert acceptance.flags[0] & dk.Flag.NONFINITE_ROW and acceptance.num_accepted[0] == 0
        assert acceptance.next_token[0] == (1500 if value == "only_inf" else 0)


@pytest.mark.parametrize("proposal", ["dense", "one_hot", "sparse"])
def test_draft_ids_out_of_range(proposal):
    """1600 is a column of the last rank, but no id of the vocabulary."""
    bad = (-1, -2, 1500, 1600, 2**40)
    case = cases.accept_case(seed=13, requests=5, drafts=1, proposal=proposal, closeness=1.0, lengths=torch.ones(5))
    for r, token in enumerate(bad):
        case.layout.token_ids[int(case.layout.query_start_loc[r]) + 1] = token
    acceptance = equal_on_all_ranks(case, 2, 1024)
    for token, flags in zip(bad, acceptance.flags.tolist(), strict=True):
        assert flags & (dk.Flag.MISSING_DRAFT if token == -1 else dk.Flag.BAD_TOKEN_ID)


def test_empty_residual_draws_from_the_target(width=375):
    """Equal distributions, and a draft outside their support: nothing is left of [target - draft]+."""
    case = cases.accept_case(seed=19, requests=2, drafts=1, vocab=1100, lengths=torch.ones(2), dtype=torch.float32)
    case.sampling.temperature[:] = 1.0
    for r in range(2):
        row = torch.full((1100,), -INF)
        row[[10 + r, 1050]] = 0.0
        case.target_logits[int(case.layout.cu_num_logits[r])] = row
        case.proposal.logits[r, 0] = row
        case.layout.token_ids[int(case.layout.query_start_loc[r]) + 1] = 7
    acceptance = equal_on_all_ranks(case, 3, width)
    assert acceptance.flags.tolist() == [int(dk.Flag.BAD_TOKEN_ID | dk.Flag.EMPTY_RESIDUAL)] * 2


def test_a_rejected_draft_leaves_its_block(width=700):
    """The target has half its probability on the draft, half on one id of another block, which every rejection must give."""
    case = cases.accept_case(
        seed=23, requests=8, drafts=1, vocab=1400, proposal="one_hot", lengths=torch.ones(8), temperatures=(1.0,)
    )
    case.target_logits[:] = -INF
    case.target_logits[:, [10, 1300]] = 0.0
    case.layout.token_ids[case.layout.logits_indices[case.layout.cu_num_logits[:-1] + 1]] = 10
    acceptance = equal_on_all_ranks(case, 2, width)
    rejected = acceptance.num_accepted == 0
    assert 1 < int(rejected.sum()) < 8 and (acceptance.next_token[rejected] == 1300).all()


@pytest.mark.parametrize("width, exact", [(1024, True), (1029, False)])
def test_entries_share_octets_with_each_other_and_with_another_rank(width, exact):
    """The entries share one octet, which a cut at 1029 divides, and two of them make an id. The residual lies elsewhere."""
    case = cases.accept_case(seed=7, requests=12, drafts=1, vocab=1100, proposal="sparse", candidates=16,
                             lengths=torch.ones(12), temperatures=(1.0,), dtype=torch.float32, sharpness=1.0)  # fmt: skip
    case.target_logits[:, 1024:1032] += 5
    for r in range(12):
        row, order = int(case.layout.cu_num_logits[r]), torch.randperm(8, generator=torch.Generator().manual_seed(r))
        case.proposal.ids[r] = (1024 + order).repeat(2)
        case.proposal.logits[r] = case.target_logits[row][case.proposal.ids[r]]
        case.layout.token_ids[int(case.layout.query_start_loc[r]) + 1] = 1024 + order[0]
    acceptance = equal_on_all_ranks(case, 2, width, exact=exact)
    rejected = acceptance.num_rejected > 0
    assert 3 < int(rejected.sum()) < 10 and (acceptance.next_token[rejected] < 1024).sum() > 2


def test_a_rank_without_entries_draws_from_the_residual():
    """Half the probability is on the entries, all on rank 0; a rejection must give the one id of rank 1 that has the rest."""
    case = cases.accept_case(seed=24, requests=8, drafts=1, vocab=1400, proposal="sparse", candidates=3,
                             lengths=torch.ones(8), temperatures=(1.0,))  # fmt: skip
    case.target_logits[:] = -INF
    case.target_logits[:, [10, 1300]] = 0.0
    case.proposal.ids[:] = torch.tensor([10, 12, 700])
    case.proposal.logits[:] = torch.tensor([4.0, 0.0, -1.0])
    case.layout.token_ids[case.layout.logits_indices[case.layout.cu_num_logits[:-1] + 1]] = 10
    acceptance = equal_on_all_ranks(case, 2, 704, exact=False)
    rejected = acceptance.num_accepted == 0
    assert 1 < int(rejected.sum()) < 8 and (acceptance.next_token[rejected] == 1300).all()


@pytest.mark.parametrize("proposal", ["dense", "sparse"])
def test_the_block_rule_sums_the_scaled_residual(proposal):
    case = cases.accept_case(seed=2, requests=14, drafts=3, vocab=40, closeness=0.5, rule="block", temperatures=(1.0,),
                             proposal=proposal, candidates=24)  # fmt: skip
    acceptance = equal_on_all_ranks(case, 2, 24, exact=False)
    assert len(set(acceptance.num_accepted.tolist())) > 2


def test_anchors_advance_on_every_rank():
    case = cases.accept_case(seed=3, requests=3, drafts=1, scattered=True, padding=1)
    slots = case.sampling.temperature.shape[0]
    advanced = dict(anchors=torch.full((slots,), -5), anchor_positions=torch.full((2 * slots,), -5, dtype=torch.int32)[::2])
    want = {name: tensor.clone() for name, tensor in advanced.items()}
    dk.accept_chain(**case.arguments(), **want)
    for _, moved in shards.accept(case, 2, 1024, **advanced):
        assert all(torch.equal(moved[name], want[name]) for name in want)


def test_one_workspace_for_all_phases_stays_clean():
    workspace = dk.Workspace(3, 2, 1500, "cpu")
    for proposal in ("dense", "one_hot", "sparse"):
        case = cases.accept_case(seed=2, requests=2, drafts=2, proposal=proposal, rule="block")
        equal_on_all_ranks(case, 2, 1024, workspace=workspace)
        assert not workspace.counters.any()


def test_requests_without_logits_and_an_empty_batch():
    empty = torch.empty(0, dtype=torch.int64)
    block = dk.DraftBlock(empty.view(0, 3), dk.OneHotProposal(), empty.int())
    layout = dk.fixed_layout(block, empty, anchors=empty, anchor_positions=empty)
    common = dict(vocab_start=0, vocab_shards=2)
    part = dk.accept_partial(torch.empty(0, 50), layout, phase="normalise", **common)
    result = dk.accept_finish(torch.empty(0, 50), layout, gathered=(torch.stack([part, part]),), **common)
    assert result.tokens.shape == (0, 4)
    block = dk.DraftBlock(torch.tensor([[3, 4], [7, 8]]), dk.OneHotProposal(), torch.zeros(2, dtype=torch.int32))
    layout = dk.fixed_layout(
        block, torch.tensor([2, 0]), anchors=torch.tensor([1, 3]), anchor_positions=torch.tensor([10, 40]),
        num_prefill_tokens=torch.tensor([0, 3], dtype=torch.int32), emits=torch.tensor([True, False]), max_rows=8,
    )  # fmt: skip
    logits = torch.zeros(8, 50)
    logits[torch.arange(3), torch.tensor([3, 9, 9])] = 5.0
    case = cases.AcceptCase(logits, layout, None, None, None)
    acceptance = equal_on_all_ranks(case, 4, 13)
    assert acceptance.tokens.tolist() == [[3, 9, -1], [-1, -1, -1]]


def test_a_cut_vocabulary_block_keeps_the_distribution():
    """Chi-square of the first emitted token, one-hot drafts, 14 ids cut into 5, 5, 4: 64 requests of different seeds."""
    if interpreter.interpreting():
        pytest.skip("takes 15 s interpreted: test_compiled.py runs it compiled")
    requests, vocab = 64, 14
    case = cases.accept_case(
        seed=1, requests=requests, drafts=1, vocab=vocab, proposal="one_hot", dtype=torch.float32,
        lengths=torch.ones(requests), temperatures=(1.0,),
    )  # fmt: skip
    probs = torch.softmax(torch.linspace(-2.0, 2.0, vocab), 0)
    case.target_logits[:] = probs.log()
    acceptance = shards.accept(case, 3, 5)[0]
    seen = torch.bincount(acceptance.tokens[:, 0], minlength=vocab).double()
    statistic = float(((seen - requests * probs) ** 2 / (requests * probs)).sum())
    assert statistic < 45.0  # 13 degrees of freedom: exceeded once in 50000
    uniform = float(((seen - requests / vocab) ** 2 / (requests / vocab)).sum())
    assert uniform > 60.0, "the test would not tell the distribution from another"


# --- arguments and registration ---------------------------------------------------------------------------------------


def settings_of(**fields):
    return dk.SamplingTensors(torch.ones(3), torch.zeros(3, dtype=torch.int64), **fields)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(vocab_shards=0), ValueError, "vocab_shards: expected >= 1"),
        (dict(vocab_start=700), ValueError, "vocab_start: expected a multiple of the 750 columns"),
        (dict(vocab_start=1500), ValueError, "vocab_start: expected in [0, 750]"),
        (dict(vocab_size=1501), ValueError, "vocab_size: expected at most 2 shards x 750 columns, got 1501"),
        (dict(phase="decide"), ValueError, "phase: expected one of 'normalise', 'residual', 'draw'"),
        (dict(phase="draw"), ValueError, "gathered: expected the parts of 2 phases"),
        (dict(phase="residual", gathered=(torch.zeros(2, 7).long(),)), ValueError, "gathered[0]: expected shape [2, "),
        (dict(out=torch.zeros(5).long()), ValueError, "out: expected shape"),
        (dict(sampling=settings_of(top_p=torch.ones(3))), NotImplementedError, "accept_partial: sampling.top_p: filters"),
        (dict(sampling=settings_of(logit_bias=torch.zeros(3, 750))), ValueError, "sampling.logit_bias: expected shape [3, 1500]"),
        (dict(proposal=dk.SparseProposal(torch.zeros(3, 2, 999).long(), torch.zeros(3, 2, 999))), ValueError,
         "proposal.logits: expected 1 to 512 candidates"),
        (dict(proposal=dk.SparseProposal(torch.zeros(3, 1, 4).long(), torch.zeros(3, 1, 4))), ValueError,
         "proposal.logits: expected K >= layout.max_drafts"),
        (dict(proposal=dk.DenseProposal(torch.zeros(3, 2, 750), draft_to_target=torch.zeros(750).long())), NotImplementedError,
         "accept_partial: proposal.draft_to_target: a reduced"),
        (dict(proposal=dk.DenseProposal(torch.zeros(3, 2, 1500))), ValueError, "proposal.logits: expected shape [3, K, 750]"),
        (dict(target_logits=torch.zeros(9, 0)), ValueError, "target_logits: expected L >= 1 and W >= 1"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    case = cases.accept_case(seed=0, requests=3, drafts=2)
    arguments = dict(layout=case.layout, sampling=case.sampling, state_indices=case.state_indices)
    arguments["target_logits"] = case.target_logits[:, :750]
    arguments["proposal"] = dataclasses.replace(case.proposal, logits=case.proposal.logits[..., :750])
    with pytest.raises(error) as caught:
        dk.accept_partial(**dict(phase="normalise", vocab_start=0, vocab_shards=2) | arguments | change)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("proposal", ["one_hot", "sparse", pytest.param("dense", marks=pytest.mark.slow)])
def test_opcheck(monkeypatch, proposal):
    calls, launches = {}, []
    for owner, name in ((GridExecutor, "__call__"), (JITFunction, "run")):  # interpreted, compiled
        launch = getattr(owner, name)
        counted = lambda self, *args, launch=launch, **kwargs: (launches.append(1), launch(self, *args, **kwargs))[1]  # noqa: E731
        monkeypatch.setattr(owner, name, counted)
    for name in ("_accept_partial", "_accept_finish"):
        registered = getattr(accept_shards, name)
        seen = calls.setdefault(registered.op, [])
        keep = lambda given, do=registered, seen=seen: (seen.append(do.values(given)), do(given))[1]  # noqa: E731
        monkeypatch.setattr(accept_shards, name, keep)
    shards.accept(cases.accept_case(requests=1, drafts=1, vocab=130, proposal=proposal, adjust=cases.ADJUSTMENTS), 1, 130)
    assert len(launches) == sum(len(seen) for seen in calls.values()), "one launch per phase"
    assert sorted(len(seen) for seen in calls.values()) == [1, len(dk.accept_phases(PROPOSALS[proposal], sampling=settings_of()))]
    for op, seen in calls.items():
        for arguments in seen:
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


PROPOSALS = {
    "dense": dk.DenseProposal(torch.zeros(1, 1, 1)),
    "one_hot": dk.OneHotProposal(),
    "sparse": dk.SparseProposal(torch.zeros(1, 1, 1).long(), torch.zeros(1, 1, 1)),
}


def _all_phases(logits, layout, proposal, sampling):
    common = dict(sampling=sampling, vocab_start=0, vocab_shards=1)
    gathered = ()
    for phase in dk.accept_phases(proposal, sampling=sampling):
        gathered += (dk.accept_partial(logits, layout, proposal, phase=phase, gathered=gathered, **common)[None],)
    return dk.accept_finish(logits, layout, proposal, gathered=gathered, **common).tokens


def test_compiles_into_one_graph():
    case = cases.accept_case(seed=4, requests=1, drafts=1, vocab=300)
    arguments = (case.target_logits, case.layout, case.proposal, case.sampling)
    have = torch.compile(_all_phases, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(have, _all_phases(*arguments))
