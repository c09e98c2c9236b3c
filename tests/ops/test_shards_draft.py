"""The draft block on vocabulary shards: the bits of the whole op for cuts at multiples of 64 ids, the reference's for others."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from dspark_kernels.ops.draft import shards as draft_shards
from reference import cases
from tests.ops import shards
from tests.ops.draft_checks import arguments_of, check
from tests.ops.fields import assert_same

INF = float("inf")


def equal_on_all_ranks(case, count, width, exact=True, **options):
    """exact: the joined block is draft_block's, to the bit; otherwise the reference's, up to near ties."""
    blocks, states = shards.draft(case, count, width, **options)
    joined = shards.joined(blocks, case.base_logits.shape[2])
    for block in blocks:
        assert_same(dataclasses.replace(block, proposal=blocks[0].proposal), blocks[0], "ranks disagree")
        if case.sampling is not None and block.proposal.lse is not None:
            assert torch.equal(block.proposal.lse, blocks[0].proposal.lse)
    assert all(state is None or torch.equal(state, states[0]) for state in states), "ranks disagree on a state"
    if exact:
        arguments = arguments_of(case)
        want = dk.draft_block(**arguments, keep_logits=True)
        assert_same(joined, want if options.get("lse", True) else without_lse(want))
        assert case.head_state is None or torch.equal(states[0], arguments["head_state"])
    else:
        check(case, joined, states[0])
    return joined


def without_lse(block):
    return dataclasses.replace(block, proposal=dataclasses.replace(block.proposal, lse=None))


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_whole_sub_blocks_give_the_bits_of_the_whole_op(data):
    """On a dyadic grid, where the host's matrix product is exact whatever the tile it is given."""
    draw = data.draw
    vocab, count, width = draw(st.sampled_from([
        (300, 1, 300), (1500, 2, 1024), (700, 3, 256), (2100, 4, 1024), (500, 8, 64), (1300, 2, 704),
    ]))  # fmt: skip
    scattered = draw(st.booleans())
    requests = draw(st.sampled_from([1, 2, 5]))
    case = cases.draft_case(
        seed=draw(st.integers(0, 10**6)),
        requests=requests,
        drafts=draw(st.integers(1, 3)),
        vocab=vocab,
        rank=draw(st.sampled_from([0, 3, 16])),
        w2_dtype=draw(st.sampled_from([None, None, torch.int8, torch.float8_e4m3fn])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        sampled=draw(st.sampled_from([True, True, False])),
        confidence=draw(st.sampled_from([None, "plain", "markov"])),
        scattered=scattered,
        padding=draw(st.integers(0, requests - 1)) if scattered else 0,
        grid=0.25,
        first_draft=draw(st.sampled_from([0, 2])),
        noise=draw(st.sampled_from(["draft", "coupled"])),
    )
    equal_on_all_ranks(case, count, width, poison=draw(st.booleans()))


@pytest.mark.parametrize(
    "kind, w2_dtype, requests, first_draft",
    [("gated", torch.int8, 17, 2), ("rnn", torch.float8_e4m3fn, 1, 2), ("rnn", None, 2, 0)],
)
def test_heads_with_latents(kind, w2_dtype, requests, first_draft):
    case = cases.draft_case(
        seed=5, requests=requests, drafts=2, vocab=2500, rank=16, kind=kind, w2_dtype=w2_dtype, dtype=torch.bfloat16,
        first_draft=first_draft, scattered=requests > 1, padding=requests // 2,
    )  # fmt: skip
    equal_on_all_ranks(case, 3, 1024)


@pytest.mark.parametrize("kind", ["gated", "rnn"])
def test_any_cut_draws_what_the_reference_draws_with_latents(kind):
    case = cases.draft_case(seed=3, requests=2, drafts=2, vocab=700, rank=16, kind=kind, adjust=("bias", "frequency"))
    equal_on_all_ranks(case, 3, 250, exact=False)


@settings(max_examples=4, deadline=None)
@given(st.data())
def test_settings_and_maps(data):
    draw = data.draw
    case = cases.draft_case(
        seed=draw(st.integers(0, 10**6)),
        requests=draw(st.sampled_from([1, 3, 9])),
        drafts=draw(st.sampled_from([1, 3])),
        vocab=1400,
        kind=draw(st.sampled_from(["vanilla", "vanilla", "gated"])),
        rank=draw(st.sampled_from([0, 16])),
        adjust=draw(st.sets(st.sampled_from(cases.ADJUSTMENTS))),
        target_vocab=draw(st.sampled_from([None, 3000])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        scattered=draw(st.booleans()),
        grid=0.25,
        confidence=None,
    )
    equal_on_all_ranks(case, 2, 1024, poison=draw(st.booleans()))


@pytest.mark.parametrize("vocab, count, width, sampled", [(700, 3, 250, True), (33, 8, 5, True), (300, 4, 77, False)])
def test_any_cut_draws_what_the_reference_draws(vocab, count, width, sampled):
    case = cases.draft_case(seed=width, requests=2, drafts=2, vocab=vocab, sampled=sampled)
    equal_on_all_ranks(case, count, width, exact=False)


def test_a_batch_of_several_tiles():
    equal_on_all_ranks(cases.draft_case(seed=3, requests=19, drafts=2, vocab=200, grid=0.25), 2, 128)


def test_a_proposal_without_lse_is_gathered_in_two_words():
    case = cases.draft_case(seed=5, requests=2, drafts=2, vocab=300, confidence=None, grid=0.25)
    equal_on_all_ranks(case, 2, 192, lse=False)
    assert draft_shards.part_words(64, 18992, False) == 128 and draft_shards.part_words(64, 18992, True) == 128 + 64 * 298 * 3 // 2


@pytest.mark.parametrize("value", ["nan", "all_minus_inf", "only_inf", "two_inf", "shard"])
def test_odd_logits(value):
    case = cases.draft_case(seed=8, requests=2, drafts=2, vocab=400, grid=0.25, temperatures=(0.0, 1.0))
    for row in (case.base_logits[0, 1], case.base_logits[1, 0]):
        if value == "nan":
            row[::5] = float("nan")
        elif value in ("all_minus_inf", "only_inf"):
            row[:] = -INF
        elif value == "shard":
            row[128:256] = -INF  # a rank without any finite logit
        if value in ("only_inf", "two_inf"):
            row[[200, 390]] = INF
    block = equal_on_all_ranks(case, 4, 128)
    assert all(bool(f & dk.Flag.NONFINITE_ROW) == (value in ("all_minus_inf", "only_inf")) for f in block.flags.tolist())
    assert all(bool(f & dk.Flag.NAN) == (value == "nan") for f in block.flags.tolist())


def test_a_row_is_finite_or_not_after_bias_and_mask():
    """Allowed is one id alone, which a bias makes infinite: nothing finite is left, whatever the base logits are."""
    case = cases.draft_case(seed=9, requests=1, drafts=1, vocab=300, rank=0, confidence=None, adjust=("bias", "mask"))
    case.sampling.logit_bias[0, 200] = INF
    case.sampling.token_bitmask[:] = 0
    case.sampling.token_bitmask[0, 0, 200 // 32] = 1 << (200 % 32)
    block = equal_on_all_ranks(case, 3, 128)
    assert block.tokens.tolist() == [[200]] and block.flags.tolist() == [int(dk.Flag.NONFINITE_ROW)]


@pytest.mark.parametrize("anchor", [-1, 300, 2**40])
def test_anchor_out_of_range(anchor):
    case = cases.draft_case(seed=9, requests=2, drafts=2, vocab=300, grid=0.25)
    case.anchors[1] = anchor
    assert equal_on_all_ranks(case, 3, 128).flags.tolist() == [0, int(dk.Flag.BAD_TOKEN_ID)]


def test_columns_without_an_id_get_no_probability_and_the_workspace_stays_clean():
    case = cases.draft_case(seed=10, requests=2, drafts=2, vocab=300)
    workspace = dk.Workspace(2, 2, 300, "cpu")
    blocks, _ = shards.draft(case, 4, 128, workspace=workspace)
    assert not workspace.counters.any()
    assert (blocks[2].proposal.logits[..., 44:] == -INF).all() and (blocks[3].proposal.logits == -INF).all()


GATED = dk.GatedMarkovHead(torch.zeros(300, 4), torch.zeros(150, 4), gate_weight=torch.zeros(4, 9), gate_bias=torch.zeros(4))
RNN = dk.RnnMarkovHead(torch.zeros(300, 4), torch.zeros(150, 4), joint_weight=torch.zeros(12, 13), joint_bias=torch.zeros(12))


def settings_of(**fields):
    return dk.SamplingTensors(torch.ones(3), torch.zeros(3, dtype=torch.int64), **fields)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(position=4), ValueError, "position: expected in [0, 3], got 4"),
        (dict(position=1), ValueError, "block: expected the block of position 0 at position 1"),
        (dict(vocab_start=100), ValueError, "vocab_start: expected a multiple of the 150 columns"),
        (dict(vocab_size=301), ValueError, "vocab_size: expected at most 2 shards x 150 columns"),
        (dict(head=dk.MarkovHead(torch.zeros(300, 4), torch.zeros(300, 4))), ValueError, "head.w2: expected shape [150, 4]"),
        (dict(head=GATED), ValueError, "hidden: expected [R, K, H] because a GatedMarkovHead is given"),
        (dict(head=RNN, hidden=torch.zeros(3, 4, 5)), ValueError, "head_state: expected fp32 [S, r], where"),
        (dict(draft_to_target=torch.zeros(300).long()), ValueError, "draft_to_target: expected shape [150], got [300]"),
        (dict(position=None), TypeError, "position: expected an int, got NoneType"),
        (dict(bigrams=torch.zeros(300, 2).long()), NotImplementedError, "draft_block_partial: bigrams: successors of a draft"),
        (dict(sampling=settings_of(logit_bias=torch.zeros(3, 150))), ValueError, "sampling: expected logit_bias and "),
        (dict(sampling=settings_of(top_k=torch.ones(3).int())), NotImplementedError, "draft_block_partial: sampling.top_k"),
        (dict(sampling=settings_of(min_p=torch.ones(3))), NotImplementedError, "draft_block_partial: sampling.min_p"),
        (dict(out=torch.zeros(3)), TypeError, "out: expected dtype int64"),
        (dict(noise="white"), ValueError, "noise: expected one of"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    case = cases.draft_case(seed=0, rank=4)
    arguments = dict(base_logits=case.base_logits[..., :150], anchors=case.anchors, anchor_positions=case.anchor_positions)
    with pytest.raises(error) as caught:
        dk.draft_block_partial(**dict(position=0, vocab_start=0, vocab_shards=2) | arguments | change)
    assert str(caught.value).startswith(message)


def test_a_gather_of_another_size_is_refused():
    case = cases.draft_case(seed=0, confidence=None)
    common = dict(position=0, sampling=case.sampling, vocab_start=0, vocab_shards=1)
    part, block = dk.draft_block_partial(case.base_logits, case.anchors, anchor_positions=case.anchor_positions, **common)
    with pytest.raises(ValueError, match=r"gathered: expected shape \[1, "):
        dk.draft_block_finish(part[None, 2:], block, case.anchors, **common)
    with pytest.raises(ValueError, match="sampling: expected the temperatures"):
        dk.draft_block_finish(part[None], block, case.anchors, **common | dict(sampling=None))


def test_opcheck(monkeypatch):
    calls = []
    for name in ("_draft_block_partial", "_draft_block_finish"):
        registered = getattr(draft_shards, name)
        keep = lambda given, do=registered: (calls.append((do.op, do.values(given))), do(given))[1]  # noqa: E731
        monkeypatch.setattr(draft_shards, name, keep)
    shards.draft(cases.draft_case(requests=2, drafts=1, vocab=130), 1, 130)
    assert len(calls) == 2, "one launch per call"
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


def _block(base_logits, anchors, positions, temperature, seed, w1, w2):
    head, sampling = dk.MarkovHead(w1, w2), dk.SamplingTensors(temperature, seed)
    block = None
    for k in range(base_logits.shape[1]):
        common = dict(position=k, sampling=sampling, vocab_start=0, vocab_shards=1)
        part, block = dk.draft_block_partial(base_logits, anchors, head, anchor_positions=positions, block=block, **common)
        block = dk.draft_block_finish(part[None], block, anchors, head, **common)
    return block.tokens, block.proposal.lse


def test_compiles_into_one_graph():
    case = cases.draft_case(seed=6, requests=2, drafts=2, vocab=300, confidence=None)
    sampling = case.sampling
    arguments = (
        case.base_logits, case.anchors, case.anchor_positions, sampling.temperature, sampling.seed, case.head.w1, case.head.w2
    )  # fmt: skip
    have = torch.compile(_block, fullgraph=True, backend="aot_eager")(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(have, _block(*arguments), strict=True))
