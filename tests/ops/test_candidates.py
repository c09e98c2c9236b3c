"""draft_block on candidates against reference/candidates.py: ids exactly, tokens draw by draw, stored logits, confidence, flags."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from dspark_kernels.launch.draft import candidates as launch
from reference import cases, draft as reference
from reference.equality import assert_equal_or_tied
from tests.ops.draft_checks import (
    arguments_of,
    assert_lse,
    candidate_arguments_of,
    check_confidence,
    filters_of,
    logits_of,
    rows_of,
)
from tests.ops.errors import excess_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


def check(case, candidates, successors=0, block=None, exempt=True):
    """A block on candidates against the reference, every output."""
    state = None
    if block is None:
        arguments = candidate_arguments_of(case, candidates, successors)
        block, state = dk.draft_block(**arguments, keep_logits=True), arguments["head_state"]
    rows, (batch, drafts) = rows_of(case), case.base_logits.shape[:2]
    kept = torch.zeros(batch, drafts, candidates + successors, dtype=case.base_logits.dtype, device=case.base_logits.device)
    for r, slot in rows:
        kept[r] = block.proposal.logits[slot]
    stored = kept
    if filters_of(case):
        stored = unfiltered(case, candidates, successors, block)

    def outcome(block, slot, r):
        support = (block.proposal.logits[slot] > -INF).tolist()
        return block.tokens[slot].tolist(), int(block.flags[r]), block.proposal.ids[slot].tolist(), support

    def run(decisions):
        again = candidate_arguments_of(case, candidates, successors)
        want = reference.draft_block(**again, keep_logits=True, stored_logits=stored, decisions=decisions)
        return {r: outcome(want, slot, r) for r, slot in rows}

    assert_equal_or_tied(run, {r: outcome(block, slot, r) for r, slot in rows}, exempt=exempt)
    padding = set(range(batch)) - {r for r, _ in rows}
    assert all(int(block.flags[r]) == 0 for r in padding)
    inside = kept > -INF
    assert torch.equal(kept[inside], stored[inside])
    for r, slot in rows:
        previous = [int(case.anchors[slot]), *block.tokens[slot].tolist()][:drafts]
        assert all(token in ids for token, ids in zip(block.tokens[slot].tolist(), block.proposal.ids[slot].tolist(), strict=True))
        check_logits(case, r, slot, previous, block.proposal.ids[slot], stored[r], state)
        if case.sampling is not None:
            temperature = float(case.sampling.temperature[slot])
            assert_lse(block.proposal.lse[slot], kept[r].double() / (temperature if temperature > 0 else 1.0), f"lse of {r}")
        if case.confidence is not None:
            check_confidence(case, block, r, slot, previous)
    return block


def check_logits(case, r, slot, previous, targets, stored, state):
    """Stored sums [K, W] of request r and its head's state, given its drafts: fp64, beside eager PyTorch."""
    exact, eager, states = logits_of(case, r, slot, previous)
    columns = targets
    if case.draft_to_target is not None:
        of_target = {int(t): v for v, t in enumerate(case.draft_to_target) if t >= 0}
        columns = torch.tensor([[of_target.get(int(t), 0) for t in row] for row in targets])
    inside = stored > -INF
    exact, eager = (torch.where(inside, rows.gather(1, columns), 0.0) for rows in (exact, eager))
    excess_error(torch.where(inside, stored, 0.0), eager.to(stored.dtype), exact, f"logits of request {r}")
    if state is not None:
        excess_error(state[slot], states[1], states[0], f"state of request {r}")


def unfiltered(case, candidates, successors, block):
    """The sums [R, K, W] that the filters of a call were given: the same drafts once more, one position a call, without filters."""
    slots, (batch, drafts) = case.anchors.shape[0], case.base_logits.shape[:2]
    width = max(2, case.first_draft + drafts)
    arguments = candidate_arguments_of(case, candidates, successors) | dict(confidence=None)
    sampling = dataclasses.replace(case.sampling, top_k=None, top_p=None, min_p=None)
    shape, dtype = (slots, width, candidates + successors), case.base_logits.dtype
    out = dk.DraftBlock(
        tokens=torch.full((slots, width), -1),
        proposal=dk.SparseProposal(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=dtype)),
        flags=torch.zeros(batch, dtype=torch.int32),
    )
    rows = torch.zeros(batch, drafts, candidates + successors, dtype=dtype)
    for k in range(drafts):
        now = sampling
        if now.token_bitmask is not None:
            now = dataclasses.replace(now, token_bitmask=now.token_bitmask[:, k : k + 1].contiguous())
        arguments |= dict(
            base_logits=case.base_logits[:, k : k + 1],
            hidden=None if case.hidden is None else case.hidden[:, k : k + 1],
            anchors=case.anchors if k == 0 else block.tokens[:, k - 1].clone(),
            sampling=now,
            first_draft=case.first_draft + k,
        )
        dk.draft_block(**arguments, out=out)
        out.tokens[:, case.first_draft + k] = block.tokens[:, k]
        for r, slot in rows_of(case):
            rows[r, k] = out.proposal.logits[slot, case.first_draft + k]
    return rows


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_equals_reference(data):
    draw = data.draw
    case = cases.draft_case(
        seed=draw(st.integers(0, 10**6)),
        kind=draw(st.sampled_from(["vanilla", "gated", "rnn"])),
        rank=draw(st.sampled_from([0, 1, 7, 33])),
        w2_dtype=draw(st.sampled_from([None, torch.int8, torch.float8_e4m3fn])),
        dtype=draw(st.sampled_from(DTYPES)),
        weight_dtype=draw(st.sampled_from(DTYPES)),
        requests=draw(st.sampled_from([1, 2, 3])),
        drafts=draw(st.sampled_from([1, 2, 3])),
        vocab=draw(st.sampled_from([1, 33, 300, 1031])),
        hidden_size=draw(st.sampled_from([1, 24, 130])),
        sampled=draw(st.booleans()),
        confidence=draw(st.sampled_from([None, "plain", "markov"])),
        scattered=draw(st.booleans()),
        first_draft=draw(st.sampled_from([0, 3])),
        noise=draw(st.sampled_from(["draft", "coupled"])),
        target_vocab=draw(st.sampled_from([None, 2000])),
        extra_columns=draw(st.sampled_from([0, 5])),
    )
    if case.head is None:  # kind has no meaning then
        case.head_state = None
    check(case, draw(st.sampled_from([1, 3, 16, 77, 256])), draw(st.sampled_from([0, 1, 6])))


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_settings_equal_reference(data):
    draw = data.draw
    case = cases.draft_case(
        seed=draw(st.integers(0, 10**6)),
        adjust=draw(st.sets(st.sampled_from(cases.ADJUSTMENTS))),
        filters=draw(st.sets(st.sampled_from(cases.FILTERS))),
        filter_order=draw(st.sampled_from(["top_k_first", "joint"])),
        rank=draw(st.sampled_from([0, 16])),
        confidence=None,
        dtype=draw(st.sampled_from(DTYPES)),
        requests=draw(st.sampled_from([1, 3])),
        drafts=draw(st.sampled_from([1, 3])),
        vocab=draw(st.sampled_from([33, 300])),
        scattered=draw(st.booleans()),
        target_vocab=draw(st.sampled_from([None, 500])),
    )
    check(case, draw(st.sampled_from([1, 9, 40])), draw(st.sampled_from([0, 4])))


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
def test_filters_see_the_candidates(order):
    """Every request sampled and filtered, among as many entries as there are ids."""
    case = cases.draft_case(
        seed=9, requests=6, drafts=2, vocab=60, rank=8, confidence=None, dtype=torch.bfloat16, temperatures=(0.7, 1.6),
        filters=cases.FILTERS, filter_order=order,
    )  # fmt: skip
    case.sampling.top_k[:] = torch.tensor([0, 4, 9, 5, 12, 7])
    case.sampling.top_p[:] = torch.tensor([0.9, 1.0, 0.6, 0.5, 0.7, 0.8])
    case.sampling.min_p[:] = torch.tensor([0.0, 0.02, 0.0, 0.0, 0.0, 0.05])
    block = check(case, 50)
    kept = (block.proposal.logits > -INF).sum(-1)
    assert (kept[1:] <= case.sampling.top_k[1:, None]).all() and (kept >= 1).all() and (kept < 50).all()


def test_penalties_follow_the_path():
    """Few ids and long blocks: drafts repeat, and each repeat is penalised more."""
    case = cases.draft_case(
        seed=4, requests=3, drafts=6, vocab=12, rank=4, confidence=None, temperatures=(1.0,),
        adjust=("repetition", "presence", "frequency"),
    )  # fmt: skip
    case.sampling.penalties.frequency[:] = -0.5  # repeats are favoured
    block = check(case, 9)
    assert any(len(set(row)) < 6 for row in block.tokens.tolist()), "no draft repeats, so this shows nothing"


def test_candidates_are_chosen_after_the_bias():
    """Base logits that all tie in bf16, told apart by a bias whose steps bf16 does not have."""
    case = cases.draft_case(seed=4, requests=1, drafts=1, vocab=90, rank=0, confidence=None, dtype=torch.bfloat16, adjust=("bias",))
    case.base_logits[:] = 8.0
    case.sampling.logit_bias[:] = torch.randperm(90, generator=torch.Generator().manual_seed(1)) * 2.0**-12
    block = check(case, 7)
    assert set(block.proposal.ids[0, 0].tolist()) == set(case.sampling.logit_bias[0].topk(7).indices.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lowest_ids(dtype):
    """On a dyadic grid sums are exact, and the C-th best base logit is shared by many ids."""
    case = cases.draft_case(seed=3, requests=3, vocab=1500, rank=8, grid=0.5, dtype=dtype, sampled=False)
    case.base_logits[0, 0] = 0.0  # all of them
    case.base_logits[0, 0, 7] = -0.0
    case.base_logits[0, 1] = -8.0
    case.base_logits[0, 1, 300:340] = 8.0  # more than 20 of the largest, in few sub-blocks
    block = check(case, 20, exempt=False)
    assert block.proposal.ids[0, 0].tolist() == list(range(20))
    assert block.proposal.ids[0, 1].tolist() == list(range(300, 320))
    for r, k in ((1, 0), (2, 3)):
        row = case.base_logits[r, k]
        least = row[block.proposal.ids[r, k]].min()
        assert (row > least).sum() < 20 < (row >= least).sum(), "the bound of the candidates is not tied, so this shows nothing"


def test_more_ties_at_the_top_than_candidates():
    """100 sub-blocks have the largest logit, and 64 are wanted: the others leave what stands behind a row's list as it is."""
    case = cases.draft_case(seed=35, requests=1, drafts=2, vocab=2000, confidence=None, dtype=torch.bfloat16)
    case.base_logits[0, 1, 3::20] = 50.0
    block = check(case, 64)
    assert block.proposal.ids[0, 1].tolist() == list(range(3, 3 + 20 * 64, 20))


@pytest.mark.parametrize("vocab", [40, 1500])
def test_logits_of_every_magnitude(vocab):
    """The search for the C-th best begins with a range of keys that is wider than an int32: fewer sub-blocks than C, and more."""
    case = cases.draft_case(seed=9, requests=1, drafts=2, vocab=vocab, rank=0, confidence=None, sampled=False)
    g = torch.Generator().manual_seed(2)
    exponents = torch.rand(case.base_logits.shape, generator=g) * 250 - 125
    case.base_logits[:] = torch.exp2(exponents) * torch.where(torch.rand(exponents.shape, generator=g) < 0.5, -1.0, 1.0)
    case.base_logits[0, 0, : vocab - 6] = -case.base_logits[0, 0, : vocab - 6].abs()  # the C-th best is far below the best
    check(case, 20, exempt=False)


@pytest.mark.parametrize("sampled", [True, False])
def test_all_candidates_are_the_dense_form(sampled):
    """C = V: the same drafts from the same distribution as without candidates. Sums on a dyadic grid have the same bits."""
    case = cases.draft_case(seed=6, requests=3, vocab=200, rank=12, grid=0.25, dtype=torch.bfloat16, sampled=sampled)
    dense = dk.draft_block(**case.arguments(), keep_logits=True)
    sparse = dk.draft_block(**case.arguments(), candidates=200, keep_logits=True)
    assert (sparse.proposal.ids == torch.arange(200)).all()
    assert torch.equal(sparse.tokens, dense.tokens) and torch.equal(sparse.proposal.logits, dense.proposal.logits)
    assert torch.equal(sparse.flags, dense.flags)
    assert torch.allclose(sparse.confidence, dense.confidence, rtol=0, atol=1e-6)
    if sampled:
        assert torch.allclose(sparse.proposal.lse, dense.proposal.lse, rtol=1e-6, atol=1e-6)


def test_a_dense_winner_wins_among_candidates():
    case = cases.draft_case(seed=8, requests=7, drafts=1, vocab=900, rank=0, confidence=None)
    dense = dk.draft_block(**case.arguments()).tokens[:, 0]
    sparse = dk.draft_block(**case.arguments(), candidates=30)
    among = (sparse.proposal.ids[:, 0] == dense[:, None]).any(1)
    assert among.any() and torch.equal(sparse.tokens[among, 0], dense[among])


# --- the same bits however the work is cut ----------------------------------------------------------------------------

FIELDS = ("tokens", "confidence", "confidence_logits")


def bits(block, slots):
    proposal = block.proposal
    return [getattr(block, name)[slots] for name in FIELDS] + [proposal.ids[slots], proposal.logits[slots], proposal.lse[slots]]


def same(have, want):
    return all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def take(case, rows):
    """Some requests of a case as a batch of their own, in this order."""
    index = torch.tensor(rows)
    sampling = dk.SamplingTensors(case.sampling.temperature[index], case.sampling.seed[index])
    fields = ("base_logits", "anchors", "anchor_positions", "hidden")
    state = None if case.head_state is None else case.head_state[index]
    return dataclasses.replace(case, **{name: getattr(case, name)[index] for name in fields}, sampling=sampling, head_state=state)


@pytest.mark.parametrize("kind", ["vanilla", "gated"])
def test_any_batch(kind):
    case = cases.draft_case(seed=50, requests=7, drafts=3, vocab=300, rank=24, kind=kind, dtype=torch.bfloat16)
    whole = dk.draft_block(**case.arguments(), candidates=21)
    for rows in ([4], [6, 0, 5, 2]):
        part = dk.draft_block(**take(case, rows).arguments(), candidates=21)
        assert same(bits(part, slice(None)), bits(whole, rows)), rows
        assert torch.equal(part.flags, whole.flags[rows])


def test_any_cut_of_the_vocabulary(monkeypatch):
    """Chunks of another size, several a program or one, and larger sub-blocks: all integers below, so the same bits."""
    case = cases.draft_case(seed=51, requests=2, drafts=2, vocab=1300, rank=16, dtype=torch.bfloat16)
    want = dk.draft_block(**case.arguments(), candidates=40)
    pick = launch.pick
    for change, parts in ((dict(block=128), 3), (dict(block=256, group=64, sub_blocks=64, chosen=32), 6), (dict(group=32), 1)):
        monkeypatch.setattr(launch, "pick", lambda *a: dataclasses.replace(pick(*a), **change))  # noqa: B023
        monkeypatch.setattr(launch, "parts", lambda *a: parts)  # noqa: B023
        assert same(bits(dk.draft_block(**case.arguments(), candidates=40), slice(None)), bits(want, slice(None)))


def test_rank_beyond_one_block(monkeypatch):
    """Ranks, outputs and hidden states that do not fit one block are summed in pieces."""
    pick = launch.pick
    small = dict(block_r=16, block_o=16, block_j=32)
    monkeypatch.setattr(launch, "pick", lambda *a: dataclasses.replace(pick(*a), **small))
    for kind in ("vanilla", "rnn"):
        check(cases.draft_case(seed=4, rank=75, vocab=150, kind=kind, hidden_size=70, requests=2, drafts=2), 20)


def test_many_candidates_of_many_positions():
    """More than the kernel takes at once: of positions, for ids, noise and log-sum-exp, and of ranks, for the confidence."""
    check(cases.draft_case(seed=33, requests=1, drafts=5, vocab=700, rank=260, dtype=torch.bfloat16), 200)


def test_flags_of_one_call_do_not_reach_the_next():
    case = cases.draft_case(seed=34, requests=2, drafts=2, vocab=300, confidence=None, dtype=torch.bfloat16)
    workspace = dk.Workspace(2, 2, 300, "cpu")
    logits = case.base_logits[1, 1].clone()
    for nan in (True, False):
        case.base_logits[1, 1, 7:9] = float("nan") if nan else logits[7:9]
        flags = dk.draft_block(**arguments_of(case), candidates=12, workspace=workspace).flags
        assert flags.tolist() == [0, int(dk.Flag.NAN) if nan else 0]


def test_programs_at_once_with_one_workspace(monkeypatch):
    """Parts of rows and products of heads end in any order; the workspace is left clean and may hold anything before."""
    from dspark_kernels.testing import interpreter

    if not interpreter.interpreting():
        pytest.skip("programs run together on a GPU anyway")
    case = cases.draft_case(seed=52, requests=2, drafts=2, vocab=600, rank=8, kind="rnn", dtype=torch.bfloat16)
    want = dk.draft_block(**arguments_of(case), candidates=12)
    workspace = dk.Workspace(2, 2, 600, "cpu", markov_rank=8)
    pick = launch.pick
    monkeypatch.setattr(launch, "pick", lambda *a: dataclasses.replace(pick(*a), block=128))
    monkeypatch.setattr(launch, "parts", lambda *a: 2)
    with interpreter.threads(2 + 2 * 2 * 2):  # the head's products and two parts of every row
        for _ in range(2):
            workspace.scratch.fill_(-1)
            have = dk.draft_block(**arguments_of(case), candidates=12, workspace=workspace)
            assert same(bits(have, slice(None)), bits(want, slice(None))) and torch.equal(have.flags, want.flags)
            assert (workspace.counters == 0).all(), "counters were not left clean"


def test_step_by_step_equals_the_block():
    case = cases.draft_case(seed=12, requests=2, drafts=3, vocab=300, confidence=None, kind="rnn", dtype=torch.bfloat16)
    whole = dk.draft_block(**arguments_of(case), candidates=16)
    shape = (2, 3, 16)
    out = dk.DraftBlock(
        tokens=torch.full((2, 3), -77),
        proposal=dk.SparseProposal(torch.full(shape, -77), torch.zeros(shape).bfloat16(), lse=torch.zeros(2, 3)),
        flags=torch.zeros(2, dtype=torch.int32),
    )
    arguments = arguments_of(case) | dict(candidates=16, out=out)
    for k in range(3):
        previous = case.anchors if k == 0 else out.tokens[:, k - 1].clone()
        arguments |= dict(base_logits=case.base_logits[:, k : k + 1], hidden=case.hidden[:, k : k + 1], anchors=previous)
        dk.draft_block(**arguments | dict(first_draft=k))
    assert torch.equal(out.tokens, whole.tokens) and torch.equal(out.proposal.ids, whole.proposal.ids)
    assert torch.equal(out.proposal.logits, whole.proposal.logits) and torch.equal(out.proposal.lse, whole.proposal.lse)


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_padding_rows_and_a_cache_with_real_strides():
    """Slots outside the batch and everything around the views keep what they hold; every element inside is written."""
    case = cases.draft_case(seed=6, requests=4, scattered=True, padding=1, vocab=300, drafts=2)
    slots = case.anchors.shape[0]
    cache, ids = torch.full((slots, 6, 40), float("nan")), torch.full((slots, 6, 40), -77)
    out = dk.DraftBlock(
        tokens=torch.full((slots, 5), -77)[:, :2],
        proposal=dk.SparseProposal(ids[:, :2, :24], cache[:, :2, :24], lse=torch.full((slots, 3), -77.0)[:, :2]),
        flags=torch.full((4,), -77, dtype=torch.int32),
        confidence=torch.full((slots, 2), -77.0),
        confidence_logits=torch.full((slots, 2), -77.0),
    )
    assert dk.draft_block(**candidate_arguments_of(case, 20, 4), out=out) is out
    check(case, 20, 4, out)
    used = [int(s) for s in case.state_indices if s >= 0]
    unused = sorted(set(range(slots)) - set(used))
    for tensor in (out.tokens, out.proposal.ids, out.proposal.lse, out.confidence, out.confidence_logits):
        assert (tensor[unused] == -77).all() and (tensor[used] != -77).all()
    assert out.flags.tolist()[3] == 0 and (out.flags != -77).all()
    ids[used, :2, :24] = -77
    cache[used, :2, :24] = float("nan")
    assert (ids == -77).all() and cache.isnan().all()


def test_proposal_of_a_greedy_block():
    case = cases.draft_case(seed=1, sampled=False, requests=2)
    assert isinstance(dk.draft_block(**case.arguments(), candidates=8).proposal, dk.OneHotProposal)
    kept = dk.draft_block(**case.arguments(), candidates=8, keep_logits=True).proposal
    assert isinstance(kept, dk.SparseProposal) and (kept.temperature == 0).all() and kept.lse is None


def test_successors_join_once():
    """Entry by entry: one of the candidates, an unused one, an id of no token, a new one, the same again."""
    case = cases.draft_case(seed=5, requests=1, drafts=1, vocab=100, rank=0, confidence=None)
    case.base_logits[0, 0] = -torch.arange(100.0)
    table = torch.full((100, 5), 50)
    case.base_logits[0, 0, 4] = -3.0  # tied with the last candidate, and not one
    table = torch.cat([table, table], 1)
    table[int(case.anchors[0])] = torch.tensor([2, 3, -1, 100, 40, 40, 4, 40, -7, 0])
    proposal = dk.draft_block(**case.arguments(), candidates=4, bigrams=table).proposal
    assert proposal.ids.flatten().tolist() == [0, 1, 2, 3] + [0, 0, 0, 0, 40, 0, 4, 0, 0, 0]
    expected = [0.0, -1.0, -2.0, -3.0] + [-INF, -INF, -INF, -INF, -40.0, -INF, -3.0, -INF, -INF, -INF]
    assert proposal.logits.flatten().tolist() == expected


def test_fewer_logits_than_candidates():
    """Rows with few finite logits, and a vocabulary smaller than C: valid ids, no finite one twice."""
    case = cases.draft_case(seed=5, requests=2, drafts=1, vocab=6, rank=0, confidence=None, temperatures=(1.0,))
    case.base_logits[1, 0, [0, 2, 3, 5]] = -INF
    for candidates, ids in ((4, [0, 1, 2, 4]), (9, [0, 1, 2, 3, 4, 5, 0, 0, 0])):
        proposal = check(case, candidates).proposal
        assert proposal.ids[1, 0].tolist() == ids
        assert [i for i, x in zip(ids, proposal.logits[1, 0].tolist(), strict=True) if x > -INF] == [1, 4]


@pytest.mark.parametrize("value", ["nan", "all_minus_inf", "all_nan", "two_inf", "only_inf", "beside_inf"])
@pytest.mark.parametrize("sampled", [False, True])
def test_odd_logits(value, sampled):
    case = cases.draft_case(seed=21, requests=2, drafts=2, vocab=700, sampled=sampled, confidence=None, dtype=torch.bfloat16)
    row = case.base_logits[1, 1]
    if value == "nan":
        row[5::7] = float("nan")
    elif value in ("all_minus_inf", "all_nan"):
        row[:] = -INF if value == "all_minus_inf" else float("nan")
    else:
        if value == "only_inf":
            row[:] = -INF
        row[[300, 600] if value != "beside_inf" else slice(300, 340)] = INF
    nonfinite, nan = int(dk.Flag.NONFINITE_ROW), int(dk.Flag.NAN)
    expected = dict(nan=nan, all_minus_inf=nonfinite, all_nan=nonfinite | nan, two_inf=0, only_inf=nonfinite, beside_inf=nonfinite)
    block = check(case, 12)
    assert block.flags.tolist() == [0, expected[value]]
    if "inf" in value:
        assert int(block.tokens[1, 1]) == (0 if value == "all_minus_inf" else 300)


@pytest.mark.parametrize("temperature", [1e-6, 1e6, -1.0, float("nan")])
def test_extreme_temperatures(temperature):
    case = cases.draft_case(seed=8, vocab=300, confidence=None, requests=2, drafts=2)
    case.sampling.temperature[:] = temperature
    check(case, 24)


@pytest.mark.parametrize("anchor", [-1, 300, 2**40])
def test_anchor_outside_the_vocabulary(anchor):
    case = cases.draft_case(seed=2, vocab=300, requests=2, drafts=1)
    case.anchors[1] = anchor
    block = dk.draft_block(**case.arguments(), candidates=10)
    assert block.flags.tolist() == [0, int(dk.Flag.BAD_TOKEN_ID)]
    assert torch.equal(block.proposal.logits[1, 0], case.base_logits[1, 0][block.proposal.ids[1, 0]])


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(candidates=0), ValueError, "candidates: expected in [1, 256]"),
        (dict(candidates=257), ValueError, "candidates: expected"),
        (dict(candidates=2.0), TypeError, "candidates: expected an int"),
        (dict(bigrams=torch.zeros(300, 129, dtype=torch.int64)), ValueError, "bigrams: expected 1 to 128 successors"),
        (dict(bigrams=torch.zeros(300, 2)), TypeError, "bigrams: expected dtype int32 or int64"),
        (dict(candidates=None, bigrams=torch.zeros(300, 2, dtype=torch.int64)), ValueError, "bigrams: expected None without"),
        (dict(out="dense"), TypeError, "out.proposal: expected SparseProposal"),
        (dict(out="narrow"), ValueError, "out.proposal.ids: expected shape [3, 4, 8]"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    case = cases.draft_case(seed=0, requests=3, drafts=4, vocab=300, confidence=None)
    arguments = case.arguments() | dict(candidates=8) | change
    if isinstance(arguments.get("out"), str):
        ids = torch.zeros(3, 4, 7, dtype=torch.int64)
        proposals = dict(dense=dk.DenseProposal(torch.zeros(3, 4, 300)), narrow=dk.SparseProposal(ids, ids.float()))
        proposal = proposals[arguments["out"]]
        arguments["out"] = dk.DraftBlock(torch.zeros(3, 4, dtype=torch.int64), proposal, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(error) as caught:
        dk.draft_block(**arguments)
    assert str(caught.value).startswith(message)


def test_empty_batch():
    case = cases.draft_case(seed=0, requests=1, vocab=50, confidence=None)
    arguments = case.arguments()
    for name in ("base_logits", "anchors", "anchor_positions"):
        arguments[name] = arguments[name][:0]
    arguments["sampling"] = dk.SamplingTensors(torch.empty(0), torch.empty(0, dtype=torch.int64))
    block = dk.draft_block(**arguments, candidates=7)
    assert block.tokens.shape == (0, 4) and block.proposal.ids.shape == (0, 4, 7)
