"""The sampling primitives (kernels/primitives/adjust.py, filters.py) against reference/sampling.py."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from bench.filters import passes as filters
from dspark_kernels.ops.sampling import adjust_settings
from reference import cases, sampling as reference
from reference.decisions import Decisions
from reference.equality import assert_equal_or_tied

pytest.importorskip("triton")
from tests.ops import sampling_kernels as kernels

VOCAB_BLOCK, BLOCK = 1024, 1024
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run_adjust(rows, settings, slots, paths=None, tile=(2, 64)):
    out = torch.full(rows.shape, float("nan"))
    count, vocab = rows.shape
    path = None
    if paths is not None:
        width = max(map(len, paths))
        words = torch.full((count, width), 0, dtype=torch.int64)  # beyond a path lies a real token
        for words_of, own in zip(words, paths, strict=True):
            words_of[: len(own)] = torch.tensor(own, dtype=torch.int64)
        path = (words, torch.tensor([len(own) for own in paths], dtype=torch.int32), width)
    grid = (count // tile[0], -(-vocab // tile[1]))
    packed = adjust_settings(settings)
    kernels.adjust_kernel[grid](rows, out, slots, packed, path, vocab, ROWS=tile[0], WIDTH=tile[1])
    return out


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_adjusted_logits_have_the_references_bits(data):
    draw = data.draw
    seed, vocab = draw(st.integers(0, 10**6)), draw(st.sampled_from([7, 64, 200, 300]))
    g = torch.Generator().manual_seed(seed)
    rows = (torch.randn(4, vocab, generator=g) * 4).to(draw(st.sampled_from(DTYPES)))
    settings = cases.sampling_tensors(
        seed, 6, vocab=vocab, mask_rows=4, adjust=draw(st.sets(st.sampled_from(cases.ADJUSTMENTS), min_size=1)),
        penalised=draw(st.sampled_from([0, 1, 5, 200])),
    )  # fmt: skip
    slots = torch.tensor([5, 0, 3, 3], dtype=torch.int32)
    paths = None
    if draw(st.booleans()) and vocab > 2:
        pool = torch.cat([torch.arange(vocab), torch.tensor([-1, vocab + 5, 3, 3, 3])])
        paths = [pool[torch.randint(0, len(pool), (n,), generator=g)].tolist() for n in (0, 3, 7, 5)]
    have = run_adjust(rows, settings, slots, paths, draw(st.sampled_from([(2, 64), (1, 256), (4, 16)])))
    for r in range(4):
        want = reference.adjust(rows[r].float(), settings, int(slots[r]), r, paths[r] if paths else ())
        assert torch.equal(have[r], want), r


def test_rows_of_nobody_and_nan_go_through():
    rows = torch.tensor([[1.0, float("nan"), float("inf"), 2.0]] * 2)
    settings = cases.sampling_tensors(3, 2, vocab=4, mask_rows=2, adjust=set(cases.ADJUSTMENTS), penalised=3)
    settings = dataclasses.replace(settings, token_bitmask=torch.full((2, 1), -1, dtype=torch.int32))
    have = run_adjust(rows, settings, torch.tensor([-1, 1], dtype=torch.int32), tile=(2, 16))
    assert torch.equal(have[0].nan_to_num(7.0), rows[0].nan_to_num(7.0))
    want = reference.adjust(rows[1], settings, 1, 1)
    assert torch.equal(have[1].nan_to_num(7.0), want.nan_to_num(7.0)) and have[1].isnan()[1]


def run_filter(rows, sampling, group=128, reads=None):
    count, vocab = rows.shape
    blocks, groups = -(-vocab // VOCAB_BLOCK), -(-vocab // group)
    kept = torch.zeros(count, vocab, dtype=torch.bool)
    sumexp = torch.zeros(count, blocks, dtype=torch.int64)
    top = torch.full((count, blocks), float("nan"))
    lists = torch.full((count + 1, 2 * BLOCK), -7, dtype=torch.int32)
    default = lambda tensor, value, dtype: torch.full((count,), value, dtype=dtype) if tensor is None else tensor  # noqa: E731
    kernels.filter_kernel[(count,)](
        rows,
        sampling.temperature,
        default(sampling.top_k, 0, torch.int32),
        default(sampling.top_p, 1.0, torch.float32),
        default(sampling.min_p, 0.0, torch.float32),
        kept,
        sumexp,
        top,
        torch.full((count, groups), float("nan")),
        torch.full((count, groups), 2**31 - 1, dtype=torch.int32),
        lists,
        torch.zeros(count, 2, dtype=torch.int32) if reads is None else reads,
        vocab,
        blocks,
        JOINT=sampling.filter_order == "joint",
        GROUP=group,
        GROUPS=max(16, 1 << (groups - 1).bit_length()),
        BLOCKS=max(2, 1 << (blocks - 1).bit_length()),
    )
    assert (lists[count] == -7).all(), "a list ran over its end"
    return kept, sumexp, top


def check_filter(rows, sampling, group=128, exempt=True):
    kept, sumexp, top = run_filter(rows, sampling, group)
    scale = 1 / sampling.temperature.double()

    def run(decisions):
        clean = torch.where(rows.isnan(), -math.inf, rows.double())
        return {
            r: (reference.filtered(clean[r], float(scale[r]), sampling, r, decisions, r) > -math.inf).tolist()
            for r in range(len(rows))
        }

    assert_equal_or_tied(run, {r: row.tolist() for r, row in enumerate(kept)}, exempt=exempt)
    # Sums of what is kept: relative to each block's maximum.
    for r, row in enumerate(rows):
        e = torch.where(kept[r], torch.exp((row.double() - row.double().nan_to_num(-math.inf).max()) * scale[r]), 0.0)
        sums = torch.stack([part.sum() for part in e.split(VOCAB_BLOCK)])
        factor = torch.exp((top[r].double() - top[r].max()) * scale[r])
        torch.testing.assert_close(sumexp[r].double() * 2.0**-40 * factor, sums, rtol=3e-6, atol=1e-9)
    return kept


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_support_equals_reference(data):
    draw = data.draw
    seed, vocab = draw(st.integers(0, 10**6)), draw(st.sampled_from([2, 33, 500, 1024, 3000]))
    g = torch.Generator().manual_seed(seed)
    spread = draw(st.sampled_from([0.5, 3.0, 6.0]))
    rows = (torch.randn(4, vocab, generator=g) * spread).to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()) and vocab > 2:
        rows[:, ::3] = -math.inf
        rows[0, 1] = float("nan")
        rows[1, 1] = rows[1, vocab - 1] = 0.0
        rows[2] = rows[2, 1]
    sampling = cases.sampling_tensors(
        seed, 4, temperatures=(0.3, 1.0, 2.0), vocab=vocab, filters=draw(st.sets(st.sampled_from(cases.FILTERS), min_size=1)),
        filter_order=draw(st.sampled_from(["top_k_first", "joint"])),
    )  # fmt: skip
    check_filter(rows[:, :], sampling, draw(st.sampled_from([64, 128])))


@pytest.mark.parametrize(
    "filters, order",
    [
        ({"top_k"}, "top_k_first"),
        ({"top_p"}, "joint"),
        ({"top_k", "top_p"}, "top_k_first"),
        ({"top_k", "top_p"}, "joint"),
        ({"top_p", "min_p"}, "top_k_first"),
        ({"top_k", "top_p", "min_p"}, "joint"),
    ],
)
def test_more_elements_than_the_list_holds(filters, order):
    """Flat rows and many ties: the bound keeps more than BLOCK elements, which are then read from the row again."""
    g = torch.Generator().manual_seed(5)
    rows = torch.randint(0, 3, (2, 6000), generator=g).float() / 4
    sampling = dk.SamplingTensors(
        temperature=torch.tensor([1.0, 0.7]),
        seed=torch.zeros(2, dtype=torch.int64),
        top_k=torch.tensor([4500, 3001], dtype=torch.int32) if "top_k" in filters else None,
        top_p=torch.tensor([0.83, 0.31]) if "top_p" in filters else None,
        min_p=torch.tensor([0.7, 0.1]) if "min_p" in filters else None,
        filter_order=order,
    )
    check_filter(rows, sampling)


@pytest.mark.parametrize(
    "vocab, spread, setting",
    [
        (5000, 1.0, dict(top_p=0.95)),
        (5000, 1.0, dict(top_k=1700, top_p=0.9)),
        (5000, 4.0, dict(top_p=0.9)),
        (3000, 1.0, dict(top_k=20, min_p=0.05)),
        (3000, 0.3, dict(min_p=0.2)),
    ],
)
def test_passes_over_a_row_are_few_and_those_that_are_reported(vocab, spread, setting):
    """Flat rows take a pass for each factor of four of what is left, not one per bit of a key; bench.filters reports them."""
    g = torch.Generator().manual_seed(3)
    row = (torch.randn(1, vocab, generator=g) * spread).bfloat16()
    dtypes = dict(top_k=torch.int32)
    tensors = {name: torch.tensor([value], dtype=dtypes.get(name, torch.float32)) for name, value in setting.items()}
    sampling = dk.SamplingTensors(torch.ones(1), torch.zeros(1, dtype=torch.int64), **tensors)
    reads = torch.zeros(1, 2, dtype=torch.int32)
    run_filter(row, sampling, reads=reads)
    blocks, reached = reads[0].tolist()
    passes, rest = divmod(blocks, -(-reached * 128 // BLOCK))
    assert rest == 0 and passes <= 6 * len(setting)
    again = filters.read_again(row[0], **setting)
    assert (again.passes, again.share) == (passes, pytest.approx(reached / -(-vocab // 128)))


def test_top_p_counts_all_that_top_k_leaves():
    """Twenty equal probabilities in as many groups, fifteen of them left by top_k: top_p must not count fewer."""
    rows = torch.full((2, 1300), -math.inf)
    rows[:, : 20 * 64 : 64] = torch.arange(20) * -1e-3
    sampling = dk.SamplingTensors(
        torch.ones(2),
        torch.zeros(2, dtype=torch.int64),
        top_k=torch.tensor([15, 15], dtype=torch.int32),
        top_p=torch.tensor([0.5, 0.95]),
    )
    kept = check_filter(rows, sampling, group=64)
    assert [int(row.sum()) for row in kept] == [8, 15]


def test_settings_out_of_range_and_the_strictest():
    rows = torch.tensor([[0.0, 3.0, 3.0, 1.0, 2.0, -math.inf, 2.5, 3.0]]).repeat(8, 1)
    sampling = dk.SamplingTensors(
        temperature=torch.ones(8),
        seed=torch.zeros(8, dtype=torch.int64),
        top_k=torch.tensor([0, -3, 8, 100, 1, 2, 7, 4], dtype=torch.int32),
        top_p=torch.tensor([1.0, 2.0, 1.0, 0.0, -1.0, 1e-9, 0.99999, 1.0]),
        min_p=torch.tensor([0.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 5.0]),
    )
    kept = check_filter(rows, sampling)
    assert [row.nonzero().flatten().tolist() for row in kept] == [
        [0, 1, 2, 3, 4, 6, 7], [0, 1, 2, 3, 4, 6, 7], [1, 2, 7], [1], [1], [1], [0, 1, 2, 3, 4, 6, 7], [1, 2, 7],
    ]  # fmt: skip


def test_ties_go_to_the_lowest_ids():
    rows = torch.zeros(3, 2500)
    sampling = dk.SamplingTensors(
        torch.ones(3), torch.zeros(3, dtype=torch.int64), top_k=torch.tensor([1, 3, 2000], dtype=torch.int32)
    )
    kept = check_filter(rows, sampling, exempt=False)
    assert [int(row.sum()) for row in kept] == [1, 3, 2000] and kept[2, :2000].all()


def test_ties_of_neighbouring_floats():
    """The last bit of a logit decides, whichever it is."""
    one = torch.tensor(1.0)
    after = torch.nextafter(one, torch.tensor(2.0))
    rows = torch.stack([one, after, after, one, after, one]).repeat(2, 1)
    rows[1] = torch.nextafter(rows[1], torch.tensor(2.0))
    sampling = dk.SamplingTensors(torch.ones(2), torch.zeros(2, dtype=torch.int64), top_k=torch.tensor([2, 4], dtype=torch.int32))
    for k, want in ((2, [1, 2]), (4, [0, 1, 2, 4])):
        sampling.top_k.fill_(k)
        kept = check_filter(rows, sampling, exempt=False)
        assert [row.nonzero().flatten().tolist() for row in kept] == [want, want]


def test_near_ties_of_filters_are_recorded_and_turned():
    row = torch.tensor([0.3, 0.1, 0.6]).double().log()
    sampling = dk.SamplingTensors(torch.ones(1), torch.zeros(1, dtype=torch.int64), top_p=torch.tensor([0.9]))
    decisions = Decisions()
    kept = reference.filtered(row, 1.0, sampling, 0, decisions, 0) > -math.inf
    assert decisions.near() == [(0, 0)]
    flipped = reference.filtered(row, 1.0, sampling, 0, Decisions(frozenset([(0, 0)])), 0) > -math.inf
    assert {tuple(kept.tolist()), tuple(flipped.tolist())} == {(True, False, True), (True, True, True)}
