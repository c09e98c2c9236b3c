"""The draft block on candidates and vocabulary shards: one gather, and the bits of the whole op whatever the cut."""

import dataclasses

import pytest
import shards
import torch
from draft_checks import arguments_of
from hypothesis import Phase, given, settings, strategies as st

import dspark_kernels as dk
from dspark_kernels.ops import candidate_shards
from reference import cases

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def equal_on_all_ranks(case, count, width, candidates, **options):
    """Every rank's block, the law included, is draft_block's, to the bit."""
    blocks, states, _ = shards.draft_candidates(case, count, width, candidates, **options)
    arguments = arguments_of(case)
    want = dk.draft_block(**arguments, candidates=candidates, keep_logits=True)
    assert all(shards.same(block, want) for block in blocks)
    assert all(state is None or torch.equal(state, arguments["head_state"]) for state in states)
    return want


@settings(max_examples=10, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_the_bits_of_the_whole_op(data):
    draw = data.draw
    vocab, count, width = draw(st.sampled_from([
        (300, 1, 300), (3000, 3, 1024), (4100, 4, 1100), (700, 3, 250), (33, 8, 5), (1300, 3, 650),
    ]))  # fmt: skip
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
    equal_on_all_ranks(case, count, width, candidates, whole=draw(st.booleans()), spoil=draw(st.booleans()))
