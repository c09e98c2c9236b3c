"""CUDA graphs on a GPU: capture with out= and workspace=, replay with changed contents, no allocation, no synchronisation."""

import dataclasses

import pytest
import torch
from test_full_size import to_device
from test_layout import assert_same_layout
from test_schedule import POLICIES, arguments as schedule_arguments

import dspark_kernels as dk
from reference import cases
from reference.schedule import schedule_prefixes

pytestmark = pytest.mark.gpu


def _copy(into, source):
    for field in dataclasses.fields(source):
        value = getattr(source, field.name)
        if isinstance(value, torch.Tensor):
            getattr(into, field.name).copy_(value)
        elif dataclasses.is_dataclass(value):
            _copy(getattr(into, field.name), value)


def _capture(call):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@pytest.mark.parametrize("sampled", [True, False])
def test_draft_block_in_a_graph(device, sampled):
    make = lambda seed: to_device(cases.draft_case(seed=seed, requests=9, drafts=5, vocab=5000, sampled=sampled), device)  # noqa: E731
    static = make(0)
    workspace = dk.Workspace(9, 5, 5000, device)
    out = dk.draft_block(**static.arguments(), keep_logits=True, workspace=workspace)
    graph = _capture(lambda: dk.draft_block(**static.arguments(), out=out, workspace=workspace))
    for seed in (6, 12):
        fresh = make(seed)
        want = dk.draft_block(**fresh.arguments(), keep_logits=True)
        _copy(static, fresh)
        before = torch.cuda.memory_allocated()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        assert torch.equal(out.tokens, want.tokens) and torch.equal(out.proposal.logits, want.proposal.logits)
        assert (workspace.counters[2:] == 0).all()


@pytest.mark.parametrize("proposal", ["dense", "one_hot"])
def test_accept_chain_in_a_graph(device, proposal):
    make = lambda seed: to_device(cases.accept_case(seed=seed, requests=9, drafts=5, vocab=5000, proposal=proposal), device)  # noqa: E731
    static = make(0)
    workspace = dk.Workspace(9, 5, 5000, device)
    out = dk.accept_chain(**static.arguments(), workspace=workspace)
    graph = _capture(lambda: dk.accept_chain(**static.arguments(), out=out, workspace=workspace))
    for seed in (1, 2, 3):
        fresh = make(seed)
        want = dk.accept_chain(**fresh.arguments())
        _copy(static, fresh)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out.tokens, want.tokens) and torch.equal(out.commit_mask, want.commit_mask)
        assert (workspace.counters[1:] == 0).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("requests, drafts", [(64, 7), (700, 13)])
def test_schedule_prefixes_in_a_graph(device, policy, requests, drafts):
    def make(seed):
        given = schedule_arguments(seed, requests, drafts, policy, scattered=True, missing=True)
        return {name: to_device(value, device) for name, value in given.items()}

    static = make(0)
    workspace = dk.Workspace(requests, drafts, 5000, device)
    out = dk.schedule_prefixes(**static, workspace=workspace)
    graph = _capture(lambda: dk.schedule_prefixes(**static, out=out, workspace=workspace))
    for seed in (1, 2, 3):
        fresh = make(seed)
        for name, value in fresh.items():
            if isinstance(value, torch.Tensor):
                static[name].copy_(value)
            elif dataclasses.is_dataclass(value):
                _copy(static[name], value)
        before = torch.cuda.memory_allocated()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        assert_same_layout(to_device(out, "cpu"), schedule_prefixes(**{k: to_device(v, "cpu") for k, v in fresh.items()}))
