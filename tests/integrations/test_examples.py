"""The examples of single ways to use the package run, and do what they say (examples/round.py: tests/package/test_example.py)."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dspark_kernels as dk
from tests.integrations.allocations import Asked

ROOT = Path(__file__).resolve().parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_example", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rejection():
    """The example, its inputs for six requests, and the target's probabilities after grammar and temperature, fp64 [6, 4, 50]."""
    example = load("rejection_sampler")
    step = example.inputs(requests=6)
    bits = torch.stack([step[5] >> bit & 1 for bit in range(32)], -1).flatten(-2)[..., :50] == 1
    return example, step, (step[0].masked_fill(~bits, -torch.inf).double() / step[3][:, None, None]).softmax(-1)


SEEDS, POSITIONS = torch.arange(6), torch.full((6,), 17)


def test_rejection_sampler_emits_what_settings_allow(rejection):
    example, step, probs = rejection
    larger = (probs[..., None, :] > probs[..., None]) * probs[..., None, :]
    allowed = (larger.sum(-1) < 0.9) & (probs > 0)
    assert 0.02 < allowed.double().mean() < 0.3
    tokens = example.in_one_launch(*step, SEEDS, POSITIONS)
    for request, row in enumerate(tokens.tolist()):
        emitted = [token for token in row if token >= 0]
        assert row == emitted + [-1] * (4 - len(emitted)) and emitted[:-1] == step[1][request, : len(emitted) - 1].tolist()
        assert all(allowed[request, i, token] for i, token in enumerate(emitted))
    assert len(set((tokens >= 0).sum(1).tolist())) > 1, "as many accepted everywhere"


@pytest.mark.parametrize("change", [{3: 1e-4}, {4: 1e-6}], ids=["temperature", "top_p"])
def test_rejection_samplers_agree(rejection, change):
    """Where settings leave one token of a row, so that nothing is random: drafts are the target's, 0 to 3 of each request."""
    example, step, probs = rejection
    right = torch.tensor([0, 1, 2, 3, 3, 3])
    drafts = torch.where(torch.arange(3) < right[:, None], probs[:, :-1].argmax(-1), probs[:, :-1].argmin(-1))
    step = [torch.full_like(given, change[i]) if i in change else given for i, given in enumerate(step)]
    step[1] = drafts
    tokens = example.in_one_launch(*step, SEEDS, POSITIONS)
    assert torch.equal(tokens, example.in_torch(*step)) and (tokens >= 0).sum(1).tolist() == (right + 1).tolist()


def _check_rounds(example, capsys):
    """The example's rounds, against calls that allocate their outputs; and what a later round asks of torch."""
    emitted, plain = example.main(3), example.Round()
    shown = capsys.readouterr().out
    want = [[] for _ in emitted]
    for _ in range(3):
        plain.block = plain.layout = plain.acceptance = None
        plain()
        for tokens, row in zip(want, plain.acceptance.tokens.tolist(), strict=True):
            tokens += [token for token in row if token >= 0]
    assert emitted == want and sum(map(len, emitted)) > 9, "no draft was ever accepted"
    with Asked() as mode:
        plain()
    assert mode.found == ["aten.index_select.out"] * 2
    return shown


def test_cuda_graph_without_a_gpu(capsys, monkeypatch):
    example = load("cuda_graph")
    monkeypatch.setattr(example, "DEVICE", "cpu")
    assert _check_rounds(example, capsys) == "no GPU: the calls run one by one\n"


@pytest.mark.gpu
def test_cuda_graph(capsys):
    assert _check_rounds(load("cuda_graph"), capsys) == ""


def test_compile():
    """One graph; the probabilities are those of the drafts in the proposal."""
    example = load("compile")
    plain, compiled = example.main()
    hidden, lm_head, anchors, positions, temperature, seed, w1, w2 = example.inputs()
    block = dk.draft_block(
        hidden @ lm_head.T,
        anchors,
        dk.MarkovHead(w1, w2),
        anchor_positions=positions,
        sampling=dk.SamplingTensors(temperature, seed),
    )
    probs = (block.proposal.logits / temperature[:, None, None]).softmax(-1).gather(-1, block.tokens[..., None])[..., 0]
    assert torch.equal(compiled[0], block.tokens) and torch.equal(plain[0], block.tokens)
    torch.testing.assert_close(compiled[1], probs)


@pytest.mark.slow
def test_tensor_parallel():
    """Two processes under torchrun emit what one emits."""
    pytest.importorskip("triton")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "examples/tensor_parallel.py",
        "2",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("request ")]  # gloo may have written others
    shown = [[int(token) for token in re.findall(r"\d+", line)[1:]] for line in lines]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert load("tensor_parallel").main("cpu", 2) == shown
    finally:
        dist.destroy_process_group()
    assert sum(map(len, shown)) > 4, "no draft was ever accepted"
