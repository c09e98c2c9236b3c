"""What engines hand over: rows of logits, ids of either width, slots and batch rows, scaled targets, probabilities."""

import dataclasses

import pytest
import torch

import dspark_kernels as dk
from reference import cases, layout as layouts
from tests.ops.accept_checks import PER_REQUEST, check

INTS = (torch.int32, torch.int64)


def engine_rows(layout, ids=torch.int64, behind=0):
    """(cu_num_logits, token_ids, positions) at the logit rows of a layout, with `behind` rows of rubbish after them."""
    rows = layout.logits_indices[: int(layout.cu_num_logits[-1])]
    rubbish = torch.full((behind,), 7)
    token_ids = torch.cat([layout.token_ids[rows], rubbish]).to(ids)
    return layout.cu_num_logits, token_ids, torch.cat([layout.positions[rows], rubbish]).to(ids)


def assert_fields(have, want):
    for field in dataclasses.fields(want):
        a, b = getattr(have, field.name), getattr(want, field.name)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(b, torch.Tensor) else a == b, field.name


@pytest.mark.parametrize("ids", INTS)
@pytest.mark.parametrize("starts", [[0, 3, 3, 5, 6, 6], [0, 0, 0], [0, 4], [0]])
def test_layout_of_rows(starts, ids):
    cu = torch.tensor(starts, dtype=ids)
    token_ids = torch.randint(-1, 9, (8,), dtype=ids)
    layout = dk.VerifyLayout.of_rows(cu, token_ids, token_ids + 5, 3)
    assert layout.token_ids is token_ids
    assert_fields(layout, layouts.layout_of_rows(cu, token_ids, token_ids + 5, 3))


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_acceptance_over_rows_of_an_engine(rule):
    """int32 ids, padding rows and requests, a draft that was taken back: as the reference, and as by forward rows."""
    case = cases.accept_case(seed=5, requests=6, drafts=3, vocab=90, rule=rule, scattered=True, padding=2, exact_rows=True)
    case.layout.token_ids[case.layout.logits_indices[1]] = -1
    whole = check(case)
    cu, token_ids, positions = engine_rows(case.layout, torch.int32, behind=4)
    logits = torch.cat([case.target_logits, torch.full((4, 90), float("nan")).to(case.target_logits.dtype)])
    rows = dataclasses.replace(case, layout=dk.VerifyLayout.of_rows(cu, token_ids, positions, 3), target_logits=logits)
    acceptance = check(rows)
    for name in PER_REQUEST:
        if name != "last_row":
            assert torch.equal(getattr(acceptance, name), getattr(whole, name)), name
