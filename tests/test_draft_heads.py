"""Sequential heads of draft_block: gated, rnn, quantised W2, any rank, in every combination with the rest."""

import dataclasses

import pytest
import torch
from draft_checks import arguments_of, check, rows_of
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from dspark_kernels.launch import draft as launch
from reference import cases

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
W2_DTYPES = [*DTYPES, torch.int8, torch.float8_e4m3fn]


@settings(max_examples=36, deadline=None)
@given(st.data())
def test_equals_reference(data):
    draw = data.draw
    check(
        cases.draft_case(
            seed=draw(st.integers(0, 10**6)),
            kind=draw(st.sampled_from(["vanilla", "gated", "rnn"])),
            rank=draw(st.sampled_from([1, 7, 16, 48, 65])),
            w2_dtype=draw(st.sampled_from(W2_DTYPES)),
            weight_dtype=draw(st.sampled_from(DTYPES)),
            dtype=draw(st.sampled_from(DTYPES)),
            requests=draw(st.sampled_from([1, 2, 7, 17])),
            drafts=draw(st.sampled_from([1, 2, 5])),
            vocab=draw(st.sampled_from([33, 300, 1031])),
            hidden_size=draw(st.sampled_from([1, 24, 130])),
            sampled=draw(st.booleans()),
            confidence=draw(st.sampled_from([None, "plain", "markov"])),
            scattered=draw(st.booleans()),
            first_draft=draw(st.sampled_from([0, 3])),
            noise=draw(st.sampled_from(["draft", "coupled"])),
            target_vocab=draw(st.sampled_from([None, 2000])),
            padded=draw(st.booleans()),
            extra_columns=draw(st.sampled_from([0, 5])),
        )
    )
