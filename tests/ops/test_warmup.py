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
from reference.cases import accept_tree_case
from tests.ops.compact_cases import bytes_of, case_of


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


def test_accepting_trees_leaves_anchors_and_results_alone():
    settings = dict(filters=("top_p",), adjust=("presence",))
    case = accept_tree_case(3, 3, 4, 50, "without_replacement", "traversal", scattered=True, **settings)
    call = case.arguments() | dict(
        anchors=torch.arange(6), anchor_positions=torch.arange(6).int(), out=dk.accept_tree(**case.arguments())
    )
    before = {name: snapshot(value) for name, value in call.items()}
    assert dk.warmup(dk.accept_tree, call) == 1
    assert all(same(before[name], snapshot(call[name])) for name in call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int32])
def test_compacting_leaves_the_caches_alone(dtype):
    case = case_of(4, 3, 6, 4, ("plain", "heads first"), (dtype,), extra=2)
    layers = dk.KVLayers.of([case.caches])
    before = [bytes_of(cache).clone() for cache in [*case.caches, *case.extra]]
    assert dk.warmup(dk.compact_kv, dict(layers=layers, acceptance=case.acceptance, layout=case.layout, extra=case.extra)) == 1
    assert all(torch.equal(bytes_of(cache), old) for cache, old in zip([*case.caches, *case.extra], before, strict=True))


def test_drafting_leaves_the_slots_alone():
    case = cases.draft_case(seed=6, requests=3, drafts=2, vocab=50, scattered=True)
    call = case.arguments() | dict(out=dk.draft_block(**case.arguments()))
    before = snapshot(call["out"])
    assert dk.warmup(dk.draft_block, [call, call]) == 2
    assert same(before, snapshot(call["out"]))


def test_growing_trees_leaves_the_slots_alone():
    case = cases.draft_case(seed=6, requests=3, drafts=2, vocab=50, scattered=True, confidence=None)
    shared = dict(anchor_positions=case.anchor_positions, method="iid", sampling=case.sampling, state_indices=case.state_indices)
    shape = dict(base_logits=case.base_logits, anchors=case.anchors, head=case.head, num_nodes=7, branching=(2,))
    tree = dk.draft_tree(**shared, **shape)
    before = snapshot(tree)
    assert dk.warmup(dk.draft_tree, dict(**shared, **shape, out=tree)) == 1
    assert dk.warmup(dk.expand_tree, dict(**shared, tree=tree, node_logits=case.base_logits, depth=1, branching=1, out=tree)) == 1
    assert same(before, snapshot(tree))


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
    root = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.ops.warmed", str(upto)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    missing, needed, launched = map(int, done.stdout.split())
    assert (missing == 0) == complete and 10 <= needed < launched == 440
