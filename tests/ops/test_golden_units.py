"""Heads and residuals of the published research code against the reference and the draft kernel.

The arrays lie in `../shared/golden/units.npz`, beside the checkout; a few of them are also in `data/golden_units.npz`,
so that a lone checkout tests something too. Everything greedy: tokens must be the same, floats within the bounds below.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

import dspark_kernels as dk
from dspark_kernels.types import ConfidenceHead, GatedMarkovHead, MarkovHead, RnnMarkovHead
from reference.accept import token_rule
from reference.draft import draft_block

HERE = Path(__file__).resolve().parents[1]
FILES = {"copied": HERE / "data" / "golden_units.npz", "shared": HERE.parents[1] / "shared" / "golden" / "units.npz"}
INSIDE = {
    "copied": ("vanilla1", "gated0", "rnn1", "residual0"),
    "shared": tuple(f"{kind}{i}" for kind in ("vanilla", "gated", "rnn", "residual") for i in range(3)),
}
HEADS = [(source, name) for source, names in INSIDE.items() for name in names if not name.startswith("residual")]
RESIDUALS = [(source, name) for source, names in INSIDE.items() for name in names if name.startswith("residual")]
# The research code sums in fp32, the reference in fp64. One unit in the last place is 9.5e-7 for logits in 8..16
# (largest logit 11.4) and 2.4e-7 for confidence logits in 2..4 (largest 3.0). Measured: 1.5e-6 for the reference,
# 1.9e-6 for the kernel in fp32; confidences 4.8e-7.
LOGITS = dict(rtol=0.0, atol=4e-6)
CONFIDENCES = dict(rtol=0.0, atol=1e-6)
# One subtraction, one division by a sum of up to 257 numbers; measured 1.6e-7 relative.
RESIDUAL_PROBS = dict(rtol=1e-6, atol=0.0)


@functools.cache
def arrays(source: str) -> dict[str, np.ndarray]:
    if not FILES[source].exists():
        pytest.skip("the golden data is not beside this checkout")
    with np.load(FILES[source]) as file:
        return {key: file[key] for key in file.files}


def golden_of(source: str, name: str) -> dict[str, torch.Tensor]:
    everything = arrays(source)
    prefix = name + "."
    golden = {key.removeprefix(prefix): torch.from_numpy(a) for key, a in everything.items() if key.startswith(prefix)}
    assert golden, f"{name} is missing in {FILES[source].name}"
    return golden


def head_of(name: str, golden) -> MarkovHead:
    w1, w2 = golden["head.markov_w1.weight"], golden["head.markov_w2.weight"]
    if name.startswith("gated"):
        return GatedMarkovHead(w1, w2, gate_weight=golden["head.gate_proj.weight"], gate_bias=golden["head.gate_proj.bias"])
    if name.startswith("rnn"):
        return RnnMarkovHead(w1, w2, joint_weight=golden["head.joint_proj.weight"], joint_bias=golden["head.joint_proj.bias"])
    return MarkovHead(w1, w2)


def arguments_of(name: str, golden) -> dict:
    weight, bias = golden["confidence.proj.weight"], golden["confidence.proj.bias"]
    anchors = golden["anchor"]
    return dict(
        base_logits=golden["base_logits"],
        anchors=anchors,
        head=head_of(name, golden),
        anchor_positions=torch.full_like(anchors, 5),
        hidden=golden["hidden"],
        confidence=ConfidenceHead(weight[0], bias),
        keep_logits=True,
    )


@pytest.mark.parametrize("source", FILES)
def test_nothing_is_left_out(source):
    kinds = ("vanilla", "gated", "rnn", "residual")
    assert {key.split(".")[0] for key in arrays(source) if key.startswith(kinds)} == set(INSIDE[source])
    found = [golden_of(*where) for where in HEADS if where[0] == source]
    changed = [bool((golden["greedy_tokens"] != golden["base_logits"].argmax(-1)).any()) for golden in found]
    assert sum(changed) >= len(changed) - 1, "heads that decide nothing"


@pytest.mark.parametrize(("source", "name"), HEADS)
def test_reference_heads(source, name):
    golden = golden_of(source, name)
    block = draft_block(**arguments_of(name, golden))
    check(block, golden)


@pytest.mark.parametrize(("source", "name"), HEADS)
def test_draft_kernel(source, name):
    golden = golden_of(source, name)
    block = dk.draft_block(**arguments_of(name, golden))
    check(block, golden)


def check(block, golden):
    assert torch.equal(block.tokens, golden["greedy_tokens"])
    assert int(block.flags.abs().sum()) == 0
    torch.testing.assert_close(block.proposal.logits, golden["corrected_logits"], **LOGITS)
    torch.testing.assert_close(block.confidence_logits, golden["confidence_logits"], **CONFIDENCES)


class Refusing:
    """Rejects every draft and keeps the weights of the correction."""

    def accepts(self, position, denominator, numerator):
        return False

    def draw(self, position, weights):
        self.weights = weights
        return 0


@pytest.mark.parametrize(("source", "name"), RESIDUALS)
def test_residual_of_the_token_rule(source, name):
    golden = golden_of(source, name)
    target, draft, want = (golden[key].double() for key in ("target_probs", "draft_probs", "residual_probs"))
    empty = []
    for row in range(len(target)):
        refusing = Refusing()
        verdict = token_rule(target[row : row + 1], draft[row : row + 1], [0], refusing, 0)
        assert verdict.num_accepted == 0 and not verdict.bad_draft and not verdict.missing_draft
        empty.append(verdict.empty_residual)
        have = refusing.weights / refusing.weights.sum()
        assert torch.equal(have > 0, want[row] > 0)
        torch.testing.assert_close(have, want[row], **RESIDUAL_PROBS)
    assert empty == [False] * (len(target) - 1) + [True], "the last row has equal distributions"
    assert torch.equal(target[-1], draft[-1])
