"""When a call goes through torch's dispatcher, and when around it."""

import dataclasses

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dspark_kernels as dk
from dspark_kernels import library
from dspark_kernels.ops.accept import chain as accept
from reference import cases


class _Ops(TorchDispatchMode):
    """The names of this package's ops that go through torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [func.name()] if func.namespace == library.NAMESPACE else []
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Wrapped(torch.Tensor):
    pass


@pytest.fixture
def run():
    case = cases.accept_case(requests=2, drafts=2, vocab=130)
    return lambda: dk.accept_chain(**case.arguments())


def _through_dispatcher(monkeypatch, run):
    """How many calls of accept_chain's op `run` takes through torch's dispatcher, and how many around it."""
    through, inside = [], []
    stock = accept.library.kernels
    monkeypatch.setattr(accept.library, "kernels", lambda *args: (inside.append(args), stock(*args))[1])
    op = accept._accept_chain.op
    cells = dict(zip(accept._accept_chain.__code__.co_freevars, accept._accept_chain.__closure__, strict=True))
    monkeypatch.setattr(cells["op"], "cell_contents", lambda *values: (through.append(values), op(*values))[1])
    run()
    return len(through), len(inside) - len(through)


def test_a_plain_call_goes_around_the_dispatcher(monkeypatch, run):
    assert _through_dispatcher(monkeypatch, run) == (0, 1)


def test_a_default_device_is_no_mode_that_sees(monkeypatch, run):
    with torch.device("meta"):
        assert _through_dispatcher(monkeypatch, run) == (0, 1)


@pytest.mark.parametrize("mode", [_Ops, _Functions])
def test_a_mode_sees_the_op(monkeypatch, run, mode):
    with mode():
        assert _through_dispatcher(monkeypatch, run) == (1, 0)
    with _Ops() as seen:
        run()
    assert seen.names == ["dspark_kernels::accept_chain"]


def test_subclasses_and_transforms_go_through_the_dispatcher(monkeypatch):
    case = cases.accept_case(requests=2, drafts=2, vocab=130)
    sampling = dataclasses.replace(case.sampling, seed=case.sampling.seed.as_subclass(_Wrapped))
    assert _through_dispatcher(monkeypatch, lambda: dk.accept_chain(**case.arguments() | dict(sampling=sampling))) == (1, 0)

    def mapped(x):
        dk.accept_chain(**case.arguments())
        return x

    assert _through_dispatcher(monkeypatch, lambda: torch.vmap(mapped)(torch.zeros(2))) == (1, 0)
    assert _through_dispatcher(monkeypatch, lambda: mapped(torch.zeros(2))) == (0, 1)


def test_meta_tensors_launch_nothing():
    meta = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
    block = dk.draft_block(meta(2, 3, 130), meta(2, dtype=torch.int64), anchor_positions=meta(2, dtype=torch.int64))
    assert block.tokens.shape == (2, 3) and block.tokens.is_meta


def test_parameters_that_require_grad_are_plain_tensors():
    case = cases.draft_case(seed=3, requests=2, drafts=2, vocab=130)
    head = dk.MarkovHead(torch.nn.Parameter(case.head.w1), torch.nn.Parameter(case.head.w2))
    logits = case.base_logits.clone().requires_grad_()
    want = dk.draft_block(**case.arguments())
    have = dk.draft_block(**case.arguments() | dict(head=head, base_logits=logits))
    assert torch.equal(have.tokens, want.tokens) and torch.equal(have.proposal.logits, want.proposal.logits)
    assert not have.proposal.logits.requires_grad


# --- scratch memory ---------------------------------------------------------------------------------------------------
