"""The first pass over logits: how a batch is cut into items changes no bit, and no odd logit is overlooked, wherever it stands."""

import dataclasses
import itertools

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels.launch import arch
from dspark_kernels.launch.accept import chain, items, tree
from reference import cases
from tests.ops.accept_checks import check
from tests.ops.fields import assert_same

INF = float("inf")
VOCAB = 5 * 1024 + 7  # six blocks, the last one ragged
# Of a block: ends, the ends of what a lane loads at once, of an octet and its halves, of what a warp loads at once.
PLACES = (0, 1, 3, 4, 7, 8, 127, 128, 255, 256, 511, 1000, 1023)


def cut(monkeypatch, steps, chunk=1):
    """Items of `steps` chunks of `chunk` blocks (a number, or for a number of requests), and second-phase items of as many."""

    def patched(pick, *names):
        def picked(gpu, requests, *shape):
            count = steps(requests) if callable(steps) else steps
            return dataclasses.replace(pick(gpu, requests, *shape), group=1, chunk=chunk, **dict.fromkeys(names, count))

        return picked

    monkeypatch.setattr(chain, "pick", patched(chain.pick, "steps", "span"))
    monkeypatch.setattr(tree, "pick", patched(tree.pick, "steps"))


def same_bits_for_any_cut(monkeypatch, case, op):
    want = check(case)
    for steps, chunk in ((1, 1), (9, 1), (2, 2), (3, 4)):
        with monkeypatch.context() as patch:
            cut(patch, steps, chunk)
            assert_same(op(**case.arguments()), want)


@pytest.mark.parametrize(
    "rule, proposal, sampled, dtype",
    [
        ("token", "one_hot", False, torch.bfloat16),
        ("token", "one_hot", True, torch.float32),
        ("token", "dense", True, torch.bfloat16),
        ("block", "dense", True, torch.float16),
        ("block", "sparse", True, torch.bfloat16),
        ("coupled", "none", True, torch.float32),
    ],
)
def test_chains_cut_anyhow_give_the_same_bits(monkeypatch, rule, proposal, sampled, dtype):
    case = cases.accept_case(seed=51, requests=2, drafts=2, vocab=VOCAB, proposal=proposal, rule=rule, sampled=sampled, dtype=dtype,
                             sharpness=1.0)  # fmt: skip
    same_bits_for_any_cut(monkeypatch, case, dk.accept_chain)


@pytest.mark.parametrize(
    "rule, drawn, sampled", [("walk", "one_hot", False), ("walk", "one_hot", True), ("recursive", "iid", True)]
)
def test_trees_cut_anyhow_give_the_same_bits(monkeypatch, rule, drawn, sampled):
    case = cases.accept_tree_case(52, 2, 4, VOCAB, drawn, rule, sampled=sampled, sharpness=1.0, reach=2)
    same_bits_for_any_cut(monkeypatch, case, dk.accept_tree)


def odd_case(value, sampled, dtype):
    """One odd logit in each row: every place of a block in the first block, one in the middle, and the last."""
    places = [block * 1024 + place for block in (0, 3, 5) for place in PLACES if block * 1024 + place < VOCAB]
    requests = -(-len(places) // 3)
    case = cases.accept_case(seed=53, requests=requests, drafts=2, vocab=VOCAB, proposal="one_hot", sampled=sampled, closeness=1.0,
                             dtype=dtype, lengths=torch.full((requests,), 2), sharpness=1.0)  # fmt: skip
    for row, place in zip(case.target_logits, itertools.cycle(places), strict=False):
        if value.startswith("only"):
            row[:] = -INF
        row[place] = float(value.removeprefix("only "))
    return case


ODD = [(value, sampled, torch.bfloat16) for value in ("nan", "inf") for sampled in (True, False)]
ODD += [("-inf", True, torch.bfloat16), ("only inf", True, torch.bfloat16), ("only -300", False, torch.bfloat16)]
ODD += [("nan", True, torch.float32), ("inf", True, torch.float16)]


@pytest.mark.parametrize("value, sampled, dtype", ODD)
def test_one_odd_logit_anywhere(monkeypatch, value, sampled, dtype):
    """NaN is flagged, +inf takes all probability, -inf none; of a row of nothing but -inf, one number takes all, and +inf is flagged."""
    cut(monkeypatch, 3)
    case = odd_case(value, sampled, dtype)
    acceptance = check(case)
    for flag, odd in ((dk.Flag.NAN, "nan"), (dk.Flag.NONFINITE_ROW, "only inf")):
        flagged = (acceptance.flags & flag) != 0
        assert flagged.all() if value == odd else not flagged.any()
    if value not in ("nan", "-inf"):
        first = case.target_logits[case.layout.cu_num_logits[:-1].long()].float().argmax(-1)
        assert (acceptance.tokens[:, 0] == first).all()


@pytest.mark.parametrize("sampled", [True, False])
def test_rows_that_are_minus_infinity_for_a_while(monkeypatch, sampled):
    """A block, a whole chunk, the last chunk, everything but the last ids, and a whole row."""
    cut(monkeypatch, 2, 2)
    case = cases.accept_case(seed=54, requests=5, drafts=1, vocab=VOCAB, proposal="one_hot", sampled=sampled, closeness=1.0,
                             lengths=torch.ones(5, dtype=torch.int64), dtype=torch.bfloat16)  # fmt: skip
    for r, (start, end) in enumerate(((1024, 2048), (2048, 4096), (4096, VOCAB), (0, VOCAB - 5), (0, VOCAB))):
        case.target_logits[int(case.layout.cu_num_logits[r]), start:end] = -INF
    acceptance = check(case)
    assert [bool(flag & dk.Flag.NONFINITE_ROW) for flag in acceptance.flags] == [False] * 4 + [True]


def test_a_batch_that_is_cut_otherwise_gives_the_same_bits(monkeypatch):
    case = cases.accept_case(seed=55, requests=6, drafts=2, vocab=VOCAB, rule="block", dtype=torch.bfloat16, closeness=0.9,
                             lengths=torch.full((6,), 2))  # fmt: skip
    seen = []
    cut(monkeypatch, lambda requests: seen.append(requests) or requests)
    whole = dk.accept_chain(**case.arguments())
    for r in range(2):
        rows = slice(3 * r, 3 * r + 3)
        layout = cases.accept_case(seed=55, requests=1, drafts=2, vocab=VOCAB, rule="block", lengths=torch.full((1,), 2)).layout
        layout = dataclasses.replace(layout, token_ids=case.layout.token_ids[rows], positions=case.layout.positions[rows])
        sampling = dk.SamplingTensors(case.sampling.temperature[r : r + 1], case.sampling.seed[r : r + 1])
        proposal = dk.DenseProposal(case.proposal.logits[r : r + 1])
        part = dk.accept_chain(case.target_logits[rows], layout, proposal, sampling=sampling, rule="block")
        assert torch.equal(part.tokens[0], whole.tokens[r]) and torch.equal(part.flags[0], whole.flags[r])
    assert seen == [6, 1, 1]


@pytest.mark.parametrize("name", sorted(arch.KNOWN))
def test_steps_of_any_batch(name):
    """Between one chunk an item and all of them; one where a request alone has to fill the GPU, more and more as the batch grows."""
    gpu = arch.KNOWN[name]
    counts = [items.steps(gpu, 4, 128, 8 * requests, 38) for requests in (1, 4, 16, 64, 1024)]
    assert counts[0] <= 2 and counts[-1] >= 13 and all(1 <= count <= 38 for count in counts)
    assert all(small <= 2 * large for small, large in itertools.pairwise(counts))
    assert items.steps(gpu, 8, 255, 0, 1) == 1
