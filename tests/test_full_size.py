"""The sizes of published checkpoints: V = 151936, r = 256. One request in the interpreter, whole batches on a GPU."""

import dataclasses

import pytest
import torch
from test_accept import check as check_accept
from test_draft import check as check_draft
from test_layout import assert_same_layout
from test_schedule import POLICIES, arguments as schedule_arguments

import dspark_kernels as dk
from reference import cases
from reference.schedule import schedule_prefixes

VOCAB = 151936


def to_device(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value):
        return type(value)(**{f.name: to_device(getattr(value, f.name), device) for f in dataclasses.fields(value)})
    return value


def _draft(requests, drafts, sampled, device, seed=70):
    case = cases.draft_case(
        seed=seed, requests=requests, drafts=drafts, vocab=VOCAB, rank=256, hidden_size=2560, dtype=torch.bfloat16, sampled=sampled
    )
    check_draft(to_device(case, device))


def _accept(requests, drafts, proposal, device, seed=71):
    case = cases.accept_case(
        seed=seed, requests=requests, drafts=drafts, vocab=VOCAB, proposal=proposal, closeness=0.9, sharpness=2.0,
        lengths=None if requests > 1 else torch.tensor([drafts]),
    )  # fmt: skip
    check_accept(to_device(case, device))


@pytest.mark.slow
def test_draft_block_in_the_interpreter(device):
    _draft(1, 2, True, device)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["dense", "one_hot"])
def test_accept_chain_in_the_interpreter(device, proposal):
    _accept(1, 2, proposal, device)


@pytest.mark.gpu
@pytest.mark.parametrize("requests", [1, 3, 13, 32, 64])
@pytest.mark.parametrize("sampled", [True, False])
def test_draft_block_on_a_gpu(device, requests, sampled):
    _draft(requests, 7, sampled, device)


@pytest.mark.gpu
@pytest.mark.parametrize("requests", [1, 3, 13, 32, 64])
@pytest.mark.parametrize("proposal", ["dense", "one_hot"])
def test_accept_chain_on_a_gpu(device, requests, proposal):
    _accept(requests, 7, proposal, device)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("requests, drafts", [(1, 7), (13, 1), (256, 7), (256, 8), (700, 13), (1024, 16)])
def test_schedule_prefixes_on_a_gpu(device, policy, requests, drafts):
    given = schedule_arguments(7, requests, drafts, policy, kind="jagged", coarse=requests % 2 == 0, missing=True)
    given["cost"] = dk.CostTable(2e-3 + 1e-7 * torch.arange(20000.0), torch.full((1025,), 1e-4))
    have = dk.schedule_prefixes(**{name: to_device(value, device) for name, value in given.items()})
    assert_same_layout(to_device(have, "cpu"), schedule_prefixes(**given))
