"""draft_block with penalties, bias, mask and filters: the stored law is the filtered one, and drafts come from it."""

import pytest
import torch
from draft_checks import check
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from reference import cases

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_equals_reference(data):
    draw = data.draw
    check(
        cases.draft_case(
            seed=draw(st.integers(0, 10**6)),
            adjust=draw(st.sets(st.sampled_from(cases.ADJUSTMENTS))),
            filters=draw(st.sets(st.sampled_from(cases.FILTERS))),
            filter_order=draw(st.sampled_from(["top_k_first", "joint"])),
            kind=draw(st.sampled_from(["vanilla", "gated", "rnn"])),
            rank=draw(st.sampled_from([7, 16])),
            dtype=draw(st.sampled_from(DTYPES)),
            requests=draw(st.sampled_from([1, 3, 7, 17])),
            drafts=draw(st.sampled_from([1, 4])),
            vocab=draw(st.sampled_from([33, 300, 1031])),
            confidence=draw(st.sampled_from([None, "markov"])),
            scattered=draw(st.booleans()),
            first_draft=draw(st.sampled_from([0, 3])),
            noise=draw(st.sampled_from(["draft", "coupled"])),
            target_vocab=draw(st.sampled_from([None, 2000])),
        )
    )
