"""warmup makes the calls of a shape family and touches nothing of theirs."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dspark_kernels as dk
from reference import cases


def snapshot(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if dataclasses.is_dataclass(value):
        return {field.name: snapshot(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(7.0) if a.is_floating_point() else a, b.nan_to_num(7.0) if b.is_floating_point() else b)
    return all(same(a[k], b[k]) for k in a) if isinstance(a, dict) else a is b or a == b


@pytest.mark.parametrize("scattered", [False, True])
def test_accepting_leaves_anchors_and_results_alone(scattered):
    case = cases.accept_case(seed=2, requests=3, drafts=2, vocab=50, scattered=scattered)
    slots = 6 if scattered else 3
    call = case.arguments() | dict(
        anchors=torch.arange(slots), anchor_positions=torch.arange(slots), out=dk.accept_chain(**case.arguments())
    )
    before = {name: snapshot(value) for name, value in call.items()}
    assert dk.warmup(dk.accept_chain, call) == 1
    assert all(same(before[name], snapshot(call[name])) for name in call)


def test_drafting_leaves_the_slots_alone():
    case = cases.draft_case(seed=6, requests=3, drafts=2, vocab=50, scattered=True)
    call = case.arguments() | dict(out=dk.draft_block(**case.arguments()))
    before = snapshot(call["out"])
    assert dk.warmup(dk.draft_block, [call, call]) == 2
    assert same(before, snapshot(call["out"]))


def test_stand_ins_have_strides_and_alignment_of_their_own_memory():
    from dspark_kernels.warmup import _like

    views = torch.ones(40)[1:], torch.ones(6, 10)[:, 2:7], torch.ones(9)[3], torch.ones(0, 3), torch.ones(4, dtype=torch.int64)
    for tensor in views:
        like = _like(tensor, -1)
        assert like.shape == tensor.shape and like.stride() == tensor.stride() and like.dtype == tensor.dtype
        assert not tensor.numel() or like.data_ptr() % 16 == tensor.data_ptr() % 16
        assert (like == -1).all() and (tensor == 1).all()


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="shapes"):
        dk.warmup(dk.draft_block, [3])
    with pytest.raises(TypeError, match="bass_logits"):
        dk.warmup(dk.draft_block, dict(bass_logits=torch.zeros(1, 1, 4)))


def test_progress(capsys):
    case = cases.draft_case(requests=1, drafts=1, vocab=16, confidence=None)
    dk.warmup(dk.draft_block, case.arguments(), progress=True)
    assert capsys.readouterr().err == "\rwarmup draft_block 1/1\n"


@pytest.mark.parametrize(("upto", "complete"), [(40, True), (3, False)])
def test_nothing_compiles_after_it(upto, complete):
    """Every variant that batches of 1 to 40 requests launch was met by warming up; stopping at 3 leaves some out."""
    root = Path(__file__).resolve().parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    command = [sys.executable, str(root / "tests" / "warmed.py"), str(upto)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    missing, needed, launched = map(int, done.stdout.split())
    assert (missing == 0) == complete and 10 <= needed < launched == 280
