"""Scratch memory: its regions, and calls that share it."""

import dataclasses
import gc
import weakref

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels import workspace as workspaces
from reference import cases


def test_regions_of_a_workspace_are_cut_once():
    workspace = dk.Workspace(2, 3, 100, "cpu")
    workspace.scratch.zero_()  # what memory held before may read as NaN, which equals nothing
    regions = [workspaces.Carver(workspace.scratch).take(5, torch.float32) for _ in range(2)]
    assert regions[0] is regions[1] and regions[0].data_ptr() == workspace.scratch.data_ptr() and regions[0].shape == (8,)
    carver = workspaces.Carver(workspace.scratch)
    for (count, dtype), start in zip(((5, torch.float32), (3, torch.int64), (1, torch.int32)), (0, 4, 8), strict=True):
        region = carver.take(count, dtype)
        assert region.dtype == dtype and region.data_ptr() == workspace.scratch[start:].data_ptr()
        assert torch.equal(region, workspaces.Carver(workspace.scratch.clone(), start).take(count, dtype))


def test_a_workspace_keeps_a_bounded_number_of_regions(monkeypatch):
    monkeypatch.setattr(workspaces, "MOST_REGIONS", 3)
    workspace = dk.Workspace(2, 3, 100, "cpu")
    for start in range(0, 20, 2):
        assert workspaces.Carver(workspace.scratch, start).take(2, torch.int64).data_ptr() == workspace.scratch[start:].data_ptr()
        assert len(workspace.scratch.regions) <= 3


def test_regions_do_not_keep_a_workspace_alive():
    workspace = dk.Workspace(2, 3, 100, "cpu")
    dk.accept_chain(**cases.accept_case(requests=2, drafts=2, vocab=100).arguments(), workspace=workspace)
    assert workspace.scratch.regions
    memory = weakref.ref(workspace.scratch)
    del workspace
    gc.collect()
    assert memory() is None


def test_one_workspace_serves_calls_of_all_sizes():
    """In turns, so that regions of one call lie over those of another."""
    workspace = dk.Workspace(3, 4, 300, "cpu")
    sizes = dict(a=dict(requests=2, drafts=2, vocab=130), b=dict(requests=3, drafts=4, vocab=300))
    for size in "abab":
        drafted, accepted = cases.draft_case(**sizes[size]), cases.accept_case(**sizes[size], rule="block")
        for op, case in ((dk.draft_block, drafted), (dk.accept_chain, accepted)):
            have, want = op(**case.arguments(), workspace=workspace), op(**case.arguments())
            assert torch.equal(have.tokens, want.tokens) and torch.equal(have.flags, want.flags)


def test_a_call_is_checked_every_time():
    """After calls with the same memory that were right, what is wrong is refused in the words of a first call."""
    case = cases.accept_case(requests=2, drafts=2, vocab=130)
    right, replace = case.arguments(), dataclasses.replace
    proposal, sampling, logits = case.proposal, case.sampling, case.target_logits
    wrong = [
        dict(target_logits=logits[:, :0]),
        dict(target_logits=logits.int()),
        dict(target_logits=logits.t().contiguous().t()),
        dict(target_logits=logits.to("meta")),
        dict(rule="best"),
        dict(logprobs="all"),
        dict(layout=replace(case.layout, max_drafts=3)),
        dict(layout=replace(case.layout, logits_indices=case.layout.logits_indices[:2])),
        dict(proposal=replace(proposal, logits=proposal.logits[:1], lse=None)),
        dict(proposal=torch.zeros(2)),
        dict(sampling=dk.SamplingTensors(sampling.temperature[:1], sampling.seed[:1])),
        dict(anchors=torch.zeros(3, dtype=torch.int64)),
        dict(anchors=torch.zeros(2)),
        dict(state_indices=torch.zeros(2)),
        dict(synthetic_rates=torch.zeros(9)),
        dict(workspace=dk.Workspace(1, 1, 130, "cpu")),
    ]

    def refusal(change, **memory):
        with pytest.raises((TypeError, ValueError)) as caught:
            dk.accept_chain(**right | memory | change)
        return caught.type, str(caught.value)

    first = [refusal(change) for change in wrong]
    workspace = dk.Workspace(2, 2, 130, "cpu")
    out = dk.accept_chain(**right, workspace=workspace)
    for change, words in zip(wrong, first, strict=True):
        dk.accept_chain(**right, out=out, workspace=workspace)
        assert refusal(change, out=out, workspace=workspace) == words, change
