"""The sizes of published checkpoints: V = 151936, r = 256. One request in the interpreter, whole batches on a GPU."""

import dataclasses

import pytest
import torch
from test_accept import check as check_accept
from test_draft import check as check_draft

from reference import cases

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
