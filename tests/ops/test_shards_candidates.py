"""The draft block on candidates and vocabulary shards: one gather, and the bits of the whole op whatever the cut."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from dspark_kernels.ops.draft import candidate_shards
from reference import cases
from tests.ops import shards
from tests.ops.draft_checks import arguments_of
from tests.ops.fields import assert_same

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def equal_on_all_ranks(case, count, width, candidates, **options):
    """Every rank's block, the logits included, is draft_block's, to the bit."""
    blocks, states, _ = shards.draft_candidates(case, count, width, candidates, **options)
    arguments = arguments_of(case)
    want = dk.draft_block(**arguments, candidates=candidates, keep_logits=True)
    for block in blocks:
        assert_same(block, want)
    assert all(state is None or torch.equal(state, arguments["head_state"]) for state in states)
    return want


@settings(max_examples=2, deadline=None)
@given(st.data())
def test_the_bits_of_the_whole_op(data):
    draw = data.draw
    vocab, count, width = draw(st.sampled_from([(300, 1, 300), (3000, 3, 1024), (4100, 4, 1100), (33, 8, 5), (1300, 3, 650)]))
    scattered = draw(st.booleans())
    requests = draw(st.sampled_from([1, 2, 5]))
    rank = draw(st.sampled_from([0, 3, 16]))
    case = cases.draft_case(
        seed=draw(st.integers(0, 10**6)),
        requests=requests,
        drafts=draw(st.integers(1, 3)),
        vocab=vocab,
        rank=rank,
        kind=draw(st.sampled_from(["vanilla", "gated", "rnn"])) if rank else "vanilla",
        w2_dtype=draw(st.sampled_from([None, None, torch.int8, torch.float8_e4m3fn])),
        dtype=draw(st.sampled_from(DTYPES)),
        sampled=draw(st.sampled_from([True, True, False])),
        confidence=draw(st.sampled_from([None, "plain", "markov"])),
        scattered=scattered,
        padding=draw(st.integers(0, requests - 1)) if scattered else 0,
        grid=draw(st.sampled_from([None, 0.5])),
        first_draft=draw(st.sampled_from([0, 2])),
        noise=draw(st.sampled_from(["draft", "coupled"])),
        adjust=draw(st.sampled_from([(), (), cases.ADJUSTMENTS])),
        filters=draw(st.sampled_from([(), (), cases.FILTERS])),
        filter_order=draw(st.sampled_from(["top_k_first", "joint"])),
        target_vocab=draw(st.sampled_from([None, None, 5000])),
    )
    candidates = draw(st.sampled_from([1, 7, 40, 256]))
    equal_on_all_ranks(case, count, width, candidates, whole=draw(st.booleans()), poison=draw(st.booleans()))


@pytest.mark.parametrize("kind, whole, w2_dtype", [("vanilla", False, torch.int8), ("rnn", True, None)])
def test_settings_maps_and_heads(kind, whole, w2_dtype):
    """Penalties along the path, bias, mask, all filters and an id map: applied on each rank, and again after the merge."""
    case = cases.draft_case(
        seed=6, requests=2, drafts=3, vocab=1500, rank=16, kind=kind, w2_dtype=w2_dtype, adjust=cases.ADJUSTMENTS,
        filters=cases.FILTERS, target_vocab=2500, temperatures=(0.8, 1.5), scattered=True, padding=1, first_draft=2,
    )  # fmt: skip
    equal_on_all_ranks(case, 2, 1024, 30, whole=whole, poison=True)


def test_bias_and_mask_are_by_target_id_without_a_map():
    """Base logits that all tie: bias and mask alone choose, on every rank those of its own ids."""
    case = cases.draft_case(seed=4, requests=1, drafts=2, vocab=1500, rank=3, confidence=None, adjust=("bias", "mask", "presence"))
    case.base_logits[:] = 1.0
    block = equal_on_all_ranks(case, 3, 640, 9)
    assert all(((block.proposal.ids[0] // 640) == rank).any() for rank in range(3))


def test_padding():
    """Its rows of a part are written, and no slot is."""
    case = cases.draft_case(
        seed=4, requests=3, drafts=2, vocab=300, rank=3, scattered=True, padding=2, confidence=None, w2_dtype=torch.int8
    )
    equal_on_all_ranks(case, 2, 160, 9, poison=True)


def test_ties_go_to_the_lowest_ids():
    """The C-th best logit is shared by ids of all ranks: those of the first ranks are kept."""
    case = cases.draft_case(seed=3, requests=2, drafts=2, vocab=400, rank=8, grid=0.5, dtype=torch.bfloat16, sampled=False)
    case.base_logits[0, 0] = 0.0
    case.base_logits[0, 0, 201] = -0.0
    case.base_logits[0, 1, 150:] = 9.0
    case.base_logits[1, 0, 390] = 50.0
    block = equal_on_all_ranks(case, 4, 100, 120)
    assert block.proposal.ids[0, 0].tolist() == list(range(120))
    assert block.proposal.ids[0, 1].tolist() == list(range(150, 270))
    assert 390 in block.proposal.ids[1, 0].tolist()


@pytest.mark.parametrize("value", ["nan", "all_minus_inf", "only_inf", "shard"])
def test_odd_logits(value):
    case = cases.draft_case(seed=8, requests=2, drafts=2, vocab=400, grid=0.25, temperatures=(0.0, 1.0))
    for row in (case.base_logits[0, 1], case.base_logits[1, 0]):
        if value == "nan":
            row[100:128] = float("nan")  # of the first rank, none of them a candidate
        elif value in ("all_minus_inf", "only_inf"):
            row[:] = -INF
        elif value == "shard":
            row[128:256] = -INF
        if value == "only_inf":
            row[[200, 390]] = INF
    block = equal_on_all_ranks(case, 4, 128, 10)
    assert all(bool(f & dk.Flag.NONFINITE_ROW) == (value in ("all_minus_inf", "only_inf")) for f in block.flags.tolist())
    assert all(bool(f & dk.Flag.NAN) == (value == "nan") for f in block.flags.tolist())


@pytest.mark.parametrize("anchor", [-1, 300, 2**40])
def test_anchor_out_of_range(anchor):
    case = cases.draft_case(seed=9, requests=2, drafts=2, vocab=300)
    case.anchors[1] = anchor
    assert equal_on_all_ranks(case, 3, 128, 9).flags.tolist() == [0, int(dk.Flag.BAD_TOKEN_ID)]


def test_more_candidates_than_a_rank_has_ids_and_the_workspace_stays_clean():
    case = cases.draft_case(seed=10, requests=2, drafts=2, vocab=150, kind="gated", dtype=torch.bfloat16)
    case.base_logits[0, 1, 70] = float("nan")
    workspace = dk.Workspace(2, 2, 150, "cpu", markov_rank=16)
    workspace.scratch.fill_(7)
    equal_on_all_ranks(case, 3, 64, 200, workspace=workspace)
    assert not workspace.counters.any()


def test_gathered_bytes_that_no_rank_sent_fault_nobody():
    case = cases.draft_case(seed=11, requests=2, drafts=2, vocab=300)
    blocks, _, parts = shards.draft_candidates(case, 2, 256, 8)
    head = dataclasses.replace(case.head, w2=case.head.w2[:256].contiguous())
    call = dict(anchor_positions=case.anchor_positions, sampling=case.sampling, hidden=case.hidden, confidence=case.confidence)
    call |= dict(candidates=8, base_logits=case.base_logits[..., :256], vocab_start=0, vocab_shards=2, vocab_size=300)
    for value in (0, -1, 2**62 + 12345):
        gathered = torch.full_like(torch.stack(parts), value)
        block = dk.draft_block_finish(gathered, blocks[0], case.anchors, head, **call)
        assert ((block.tokens >= 0) & (block.tokens < 300)).all()


def test_what_is_gathered():
    base = torch.empty(64, 7, 18992, dtype=torch.bfloat16)
    rows = dk.MarkovHead(torch.empty(1, 256), torch.empty(18992, 256, dtype=torch.bfloat16))
    whole = dk.MarkovHead(torch.empty(1, 256), torch.empty(151936, 256, dtype=torch.bfloat16))
    lists = 64 * 7 * 64 * 10 + 64 * 7 * 4
    assert 8 * candidate_shards.part_words(base, whole, candidates=64) == lists
    assert 8 * candidate_shards.part_words(base, rows, candidates=64) == lists + 64 * 7 * 64 * 512
    ids = torch.empty(18992, dtype=torch.int64)
    assert 8 * candidate_shards.part_words(base, whole, candidates=64, draft_to_target=ids) == lists + 64 * 7 * 64 * 4


HEAD = dk.MarkovHead(torch.zeros(300, 4), torch.zeros(150, 4))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(candidates=0), ValueError, "candidates: expected in [1, 256]"),
        (dict(position=0), ValueError, "position: expected None with `candidates`"),
        (dict(head=dk.MarkovHead(torch.zeros(300, 4), torch.zeros(200, 4))), ValueError, "head.w2: expected the 150 rows of this"),
        (dict(vocab_shards=128, vocab_size=300), ValueError, "candidates: expected at most 16384 entries on all 128 ranks"),
        (dict(block=dk.DraftBlock(torch.zeros(3, 4).long(), dk.DenseProposal(torch.zeros(3, 4, 150)), torch.zeros(3).int())),
         TypeError, "out.proposal: expected OneHotProposal"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    case = cases.draft_case(seed=0, rank=4)
    arguments = dict(base_logits=case.base_logits[..., :150], anchors=case.anchors, anchor_positions=case.anchor_positions)
    arguments |= dict(head=HEAD, candidates=200, vocab_start=0, vocab_shards=2)
    with pytest.raises(error) as caught:
        dk.draft_block_partial(**arguments | change)
    assert str(caught.value).startswith(message)


def test_a_finish_needs_what_the_part_was_made_of():
    case = cases.draft_case(seed=0, rank=4, vocab=150, confidence=None, sampled=False)
    where = dict(vocab_start=0, vocab_shards=1, candidates=9)
    common = where | dict(anchor_positions=case.anchor_positions)
    part, block = dk.draft_block_partial(case.base_logits, case.anchors, HEAD, **common)
    with pytest.raises(TypeError, match="base_logits: expected a torch.Tensor"):
        dk.draft_block_finish(part[None], block, case.anchors, HEAD, **common)
    with pytest.raises(ValueError, match="gathered: expected shape"):
        dk.draft_block_finish(part[None], block, case.anchors, base_logits=case.base_logits, **common)


@pytest.mark.parametrize("options", [dict(kind="rnn", sampled=False), dict(adjust=cases.ADJUSTMENTS, target_vocab=300)])
def test_opcheck(monkeypatch, options):
    calls = []
    for name in ("_draft_candidates_partial", "_draft_candidates_finish"):
        registered = getattr(candidate_shards, name)
        keep = lambda given, do=registered: (calls.append((do.op, do.values(given))), do(given))[1]  # noqa: E731
        monkeypatch.setattr(candidate_shards, name, keep)
    shards.draft_candidates(cases.draft_case(requests=2, drafts=1, vocab=130, **options), 1, 130, 5)
    assert len(calls) == 2, "one launch per call"
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def _block(base_logits, anchors, positions, temperature, seed, w1, w2):
    head, sampling = dk.MarkovHead(w1, w2), dk.SamplingTensors(temperature, seed)
    common = dict(anchor_positions=positions, sampling=sampling, vocab_start=0, vocab_shards=1, candidates=9)
    part, block = dk.draft_block_partial(base_logits, anchors, head, **common)
    block = dk.draft_block_finish(part[None], block, anchors, head, base_logits=base_logits, **common)
    return block.tokens, block.proposal.ids, block.proposal.lse


def test_compiles_into_one_graph():
    case = cases.draft_case(seed=6, requests=2, drafts=2, vocab=300, confidence=None)
    sampling = case.sampling
    arguments = (
        case.base_logits, case.anchors, case.anchor_positions, sampling.temperature, sampling.seed, case.head.w1, case.head.w2
    )  # fmt: skip
    have = torch.compile(_block, fullgraph=True, backend="aot_eager")(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(have, _block(*arguments), strict=True))
