"""What a wrong argument is told: its name, what was expected and what came; one default device; `to` of every record."""

import dataclasses
import inspect

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels import checks, scheduling
from dspark_kernels.calibration import OnlineCalibration
from reference import cases

CACHE = torch.zeros(3, 4, 2, 8)


def tree(**change):
    z = torch.zeros(2, dtype=torch.int64)
    call = dict(base_logits=torch.zeros(2, 3, 40), anchors=z, anchor_positions=z, num_nodes=4)
    return dk.draft_tree(**call | change)


def sampling(**setting):
    return dk.SamplingTensors(torch.ones(2), torch.zeros(2, dtype=torch.int64), **setting)


def schedule(**change):
    z = torch.zeros(2, dtype=torch.int64)
    block = dk.DraftBlock(torch.zeros(2, 3, dtype=torch.int64), dk.OneHotProposal(), z.int(), confidence=torch.ones(2, 3))
    return dk.schedule_prefixes(block, dk.CostTable(torch.ones(9)), anchors=z, anchor_positions=z, **change)


BUDGET, STALE = torch.ones(1, dtype=torch.int32), torch.ones(2, 3)
LAYER = "a PagedKV or a tuple of its caches"
OP = "op: expected an op of dspark_kernels, such as dspark_kernels.draft_block, got"

WRONG = {
    "workspace_no_such_device": (lambda: dk.Workspace(1, 1, 9, "gpu"), ValueError, "device: expected a device that torch has here, got 'gpu'"),
    "workspace_device_of_no_kind": (lambda: dk.Workspace(1, 1, 9, 1.5), TypeError, "device: expected a torch.device, its name or None, got float"),
    "workspace_device_true": (lambda: dk.Workspace(1, 1, 9, True), TypeError, "device: expected a torch.device, its name or None, got bool"),
    "history_no_such_device": (lambda: scheduling.ConfidenceHistory(1, 1, "gpu"), ValueError, "device: expected a device that torch has here"),
    "calibration_no_such_device": (lambda: OnlineCalibration(1, device="gpu"), ValueError, "device: expected a device that torch has here"),
    "curve_no_such_device": (lambda: dk.CostTable.from_curve([1, 2], [1, 1], device="gpu"), ValueError, "device: expected a device"),
    "layers_a_tensor": (lambda: dk.KVLayers.of(CACHE), TypeError, f"layers: expected a list with an entry per layer, {LAYER}"),
    "layers_a_number": (lambda: dk.KVLayers.of(5), TypeError, f"layers: expected a list with an entry per layer, {LAYER}"),
    "layers_none": (lambda: dk.KVLayers.of(None), TypeError, "layers: expected a list with an entry per layer"),
    "layers_of_tensors": (lambda: dk.KVLayers.of([CACHE]), TypeError, f"layers[0]: expected {LAYER}"),
    "layers_second_a_number": (lambda: dk.KVLayers.of([(CACHE, CACHE), 5]), TypeError, f"layers[1]: expected {LAYER}"),
    "layers_empty": (lambda: dk.KVLayers.of([]), ValueError, "layers: expected at least one layer, got none"),
    "warmup_a_name": (lambda: dk.warmup("draft_block", {}), TypeError, f"{OP} 'draft_block'"),
    "warmup_another_function": (lambda: dk.warmup(len, {}), TypeError, f"{OP} len"),
    "warmup_a_class": (lambda: dk.warmup(dk.Workspace, {}), TypeError, f"{OP} Workspace"),
    "warmup_none": (lambda: dk.warmup(None, {}), TypeError, f"{OP} NoneType"),
    "warmup_shapes_a_number": (lambda: dk.warmup(dk.draft_block, 5), TypeError, "shapes: expected a mapping of argument names, or several"),
    "warmup_shapes_of_numbers": (lambda: dk.warmup(dk.draft_block, [5]), TypeError, "shapes: expected mappings of argument names, got int"),
    "prepare_a_name": (lambda: dk.prepare("accept_chain"), TypeError, f"{OP} 'accept_chain'"),
    "prepare_another_function": (lambda: dk.prepare(len), TypeError, f"{OP} len"),
    "budget_twice": (lambda: schedule(policy="budget", budget=BUDGET, stale_confidence=STALE), ValueError, "budget: expected None with stale_confidence, which says the budget too, got both"),
    "budget_never": (lambda: schedule(policy="budget"), ValueError, "budget: expected a tensor with policy 'budget' (or stale_confidence"),
    "budget_of_causal": (lambda: schedule(budget=BUDGET), ValueError, "budget: expected None with policy 'causal', got Tensor"),
    "stale_of_causal": (lambda: schedule(stale_confidence=STALE), ValueError, "stale_confidence: expected None with policy 'causal', got Tensor"),
    "tree_top_k": (lambda: tree(sampling=sampling(top_k=torch.ones(2, dtype=torch.int32))), NotImplementedError, "draft_tree: sampling.top_k: a top-k filter along a tree is not supported"),
    "tree_top_p": (lambda: tree(sampling=sampling(top_p=torch.ones(2))), NotImplementedError, "draft_tree: sampling.top_p: a top-p filter along a tree is not supported"),
    "tree_min_p": (lambda: tree(sampling=sampling(min_p=torch.zeros(2))), NotImplementedError, "draft_tree: sampling.min_p: a min-p filter along a tree is not supported"),
    "tree_mask": (lambda: tree(sampling=sampling(token_bitmask=torch.zeros(2, 2, dtype=torch.int32))), NotImplementedError, "draft_tree: sampling.token_bitmask: a mask of tokens along a tree is not supported"),
    "tree_bias": (lambda: tree(sampling=sampling(logit_bias=torch.zeros(2, 40))), NotImplementedError, "draft_tree: sampling.logit_bias: with method 'conditioned' it is not supported"),
    "tree_map": (lambda: tree(draft_to_target=torch.arange(40)), NotImplementedError, "draft_tree: draft_to_target: with method 'conditioned' it is not supported"),
    "tree_candidates": (lambda: tree(method="top_k", branching=(2,), candidates=4), NotImplementedError, "draft_tree: candidates: with method 'top_k' they are not supported"),
    "to_no_such_device": (lambda: dk.CostTable(torch.ones(3)).to("gpu"), ValueError, "device: expected a device that torch has here, got 'gpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name):
    make, kind, message = WRONG[name]
    with pytest.raises(kind) as caught:
        make()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="device: expected a device that torch has here, got 'cuda'"):
        dk.Workspace(1, 1, 9, device="cuda")


def test_one_default_device(tmp_path):
    here = checks.check_device("device", None)
    assert here.type == ("cuda" if torch.cuda.is_available() else "cpu")
    table = dk.CostTable.from_curve([1, 2], [0.1, 0.2])
    table.save(tmp_path / "cost.json")
    lie = [dk.Workspace(1, 1, 9).counters, OnlineCalibration(1).temperatures, scheduling.ConfidenceHistory(1, 1).confidence]
    lie += [table.seconds, dk.CostTable.load(tmp_path / "cost.json").seconds]
    assert {tensor.device.type for tensor in lie} == {here.type}
    defaults = [dk.Workspace, OnlineCalibration, scheduling.ConfidenceHistory, dk.CostTable.from_curve, dk.CostTable.load]
    assert {inspect.signature(made).parameters["device"].default for made in (*defaults, dk.cost.measure)} == {None}


def tensors(record):
    """(where it stands, tensor) of everything in a record."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, torch.Tensor):
            yield field.name, value
        elif isinstance(value, checks.Checked):
            yield from ((f"{field.name}.{name}", tensor) for name, tensor in tensors(value))
        elif isinstance(value, (tuple, list)):
            yield from ((f"{field.name}[{i}]", x) for i, x in enumerate(value) if isinstance(x, torch.Tensor))


def records():
    """Records of many kinds: with records inside, with numbers, with addresses, with nothing."""
    pytest.importorskip("triton")
    draft, accept = cases.draft_case(requests=2, drafts=2, vocab=60), cases.accept_case(requests=2, drafts=2, vocab=60)
    z = torch.zeros(2, dtype=torch.int64)
    yield from (draft.sampling, draft.head, draft.confidence, accept.layout, accept.proposal, dk.OneHotProposal())
    yield dk.PagedKV(CACHE, CACHE, torch.zeros(2, 1, dtype=torch.int32), z.int())
    yield from (dk.CostTable(torch.full((3,), 0.5), torch.full((3,), 0.5)), dk.KVLayers.of([(CACHE, CACHE.clone())]))
    yield from (dk.draft_block(**draft.arguments()), dk.accept_chain(**accept.arguments()))
    yield tree(method="iid", branching=(2,), sampling=sampling())


def test_every_record_has_to():
    kinds = {value for value in vars(dk).values() if inspect.isclass(value) and issubclass(value, checks.Checked)}
    assert len(kinds) > 15 and all(kind.to is checks.Checked.to or kind is dk.KVLayers for kind in kinds)


def test_to_moves_every_tensor_and_nothing_else():
    for record in records():
        same, moved, kind = record.to("cpu"), record.to("meta"), type(record)
        assert type(same) is type(moved) is kind
        for (name, mine), (_, its), (_, there) in zip(tensors(record), tensors(same), tensors(moved), strict=True):
            assert there.is_meta and (there.shape, there.dtype) == (mine.shape, mine.dtype), (kind, name)
            shared = its.data_ptr() == mine.data_ptr()
            assert shared or (kind is dk.KVLayers and name == "table"), f"{kind}.{name} was copied"
        plain = [f.name for f in dataclasses.fields(record) if isinstance(getattr(record, f.name), (int, float, str))]
        assert all(getattr(moved, name) == getattr(record, name) for name in plain)
