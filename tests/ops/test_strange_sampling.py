"""Inputs made to hurt, one row or one draft each, whose outcome follows from the definitions alone: no reference is asked.

STRANGE: name -> (logits of the rows, drafts, settings, the tokens that may come out per position, flags).
"""

import math

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels import Flag

INF, NAN = math.inf, math.nan
BIG, TINY = 3.4028235e38, 1e-45  # the largest fp32, and its smallest denormal
NONE = Flag(0)
FAR = [0.0] * 1024 + [1.0]  # the best id is the first of the second block


def words(*ids, size=2):
    """A bit mask with these ids allowed: int32 [1, size]."""
    mask = [0] * size
    for i in ids:
        mask[i // 32] |= 1 << (i % 32)
    return torch.tensor([[word - (1 << 32) if word >> 31 else word for word in mask]], dtype=torch.int32)


def bias(vocab, **at):
    row = torch.zeros(1, vocab)
    for name, value in at.items():
        row[0, int(name[2:])] = value
    return row


STRANGE = {
    # One row, greedy: the largest logit, the lowest id of equal ones.
    "all equal": ([[0, 0, 0, 0]], (), {}, [{0}], NONE),
    "one finite": ([[-INF, -INF, 5, -INF]], (), {}, [{2}], NONE),
    "two infinite": ([[1, INF, INF]], (), {}, [{1}], NONE),
    "NaN before the best": ([[NAN, 3, 2]], (), {}, [{1}], Flag.NAN),
    "NaN behind the best": ([[3, 2, NAN]], (), {}, [{0}], Flag.NAN),
    "nothing but NaN": ([[NAN, NAN, NAN]], (), {}, [{0}], Flag.NAN | Flag.NONFINITE_ROW),
    "nothing finite": ([[-INF] * 4], (), {}, [{0}], Flag.NONFINITE_ROW),
    "NaN beside -inf": ([[-INF, NAN]], (), {}, [{0}], Flag.NAN | Flag.NONFINITE_ROW),
    "zeros of both signs": ([[-0.0, 0.0]], (), {}, [{0}], NONE),
    "denormals": ([[-TINY, TINY]], (), {}, [{1}], NONE),
    "the largest fp32, twice": ([[-BIG, BIG, BIG]], (), {}, [{1}], NONE),
    "the largest fp16": ([[-65504, 65504, 65503]], (), dict(dtype=torch.float16), [{1}], NONE),
    "neighbours in bf16": ([[256, 258, 257]], (), dict(dtype=torch.bfloat16), [{1}], NONE),
    "far below zero": ([[-1e31, -1e30]], (), {}, [{1}], NONE),
    "one id": ([[7]], (), {}, [{0}], NONE),
    "one id, not finite": ([[-INF]], (), {}, [{0}], Flag.NONFINITE_ROW),
    "the first id of the second block": ([FAR], (), {}, [{1024}], NONE),
    "the last id before the second block": ([FAR[1:]], (), {}, [{1023}], NONE),
    # One row, sampled, with a certain outcome.
    "probability 1": ([[0, -INF, -INF]], (), dict(t=1.0), [{0}], NONE),
    "probability 1, far down": ([[-INF, -BIG, -INF]], (), dict(t=1.0), [{1}], NONE),
    "sampled beside NaN": ([[NAN, -INF, 4]], (), dict(t=1.0), [{2}], Flag.NAN),
    "cold": ([[1.0, 1.01]], (), dict(t=1e-6), [{1}], NONE),
    "hot, one finite": ([[-INF, 0, -INF]], (), dict(t=1e30), [{1}], NONE),
    "temperature NaN": ([[1, 2, 1]], (), dict(t=NAN), [{1}], NONE),
    "temperature -inf": ([[1, 2, 1]], (), dict(t=-INF), [{1}], NONE),
    "two infinite, sampled": ([[0, INF, INF]], (), dict(t=1.0), [{1}], NONE),
    "top-k 1": ([[1, 2, 3]], (), dict(t=9.0, top_k=1), [{2}], NONE),
    "top-k 1 of a tie": ([[3, 3, 1]], (), dict(t=9.0, top_k=1), [{0}], NONE),
    "top-k beyond the vocabulary": ([[0, -INF, 0]], (), dict(t=1.0, top_k=1000), [{0, 2}], NONE),
    "top-k 0 is off": ([[0, -INF, 0]], (), dict(t=1.0, top_k=0), [{0, 2}], NONE),
    "top-k -1 is off": ([[0, -INF, 0]], (), dict(t=1.0, top_k=-1), [{0, 2}], NONE),
    "top-p 1e-9": ([[1, 2, 3]], (), dict(t=9.0, top_p=1e-9), [{2}], NONE),
    "top-p 2 is off": ([[0, -INF, 0]], (), dict(t=1.0, top_p=2.0), [{0, 2}], NONE),
    "min-p 1": ([[1, 3, 2]], (), dict(t=9.0, min_p=1.0), [{1}], NONE),
    "min-p 1 of a tie": ([[1, 3, 3]], (), dict(t=9.0, min_p=1.0), [{1, 2}], NONE),
    "bias lifts": ([[5, 0, 0, 0]], (), dict(t=0.0, logit_bias=bias(4, id3=100.0)), [{3}], NONE),
    "bias of -inf": ([[5, 4, 0, 0]], (), dict(t=0.0, logit_bias=bias(4, id0=-INF)), [{1}], NONE),
    "bias of NaN": ([[5, 4, 0, 0]], (), dict(t=0.0, logit_bias=bias(4, id0=NAN)), [{1}], Flag.NAN),
    "the sign bit of a mask's word": ([list(range(40))], (), dict(t=1.0, token_bitmask=words(31)), [{31}], NONE),
    "the second word of a mask": ([list(range(40))], (), dict(t=1.0, token_bitmask=words(32)), [{32}], NONE),
    "a mask's bits beyond the vocabulary": ([[0] * 40], (), dict(t=1.0, token_bitmask=words(7, 63)), [{7}], NONE),
    "a mask that allows nothing": ([[0] * 40], (), dict(t=1.0, token_bitmask=words()), [{0}], Flag.NONFINITE_ROW),
    "a mask that leaves -inf": ([[-INF, 0]], (), dict(t=0.0, token_bitmask=words(0, size=1)), [{0}], Flag.NONFINITE_ROW),
    # A draft and the row after it.
    "a certain draft": ([[-INF, 0], [0, -INF]], (1,), dict(t=1.0), [{1}, {0}], NONE),
    "an impossible draft": ([[-INF, 0], [0, 0]], (0,), dict(t=1.0), [{1}, {-1}], NONE),
    "no draft": ([[0, 5], [5, 0]], (-1,), dict(t=0.0), [{1}, {-1}], Flag.MISSING_DRAFT),
    "a draft below -1": ([[0, 5], [5, 0]], (-7,), dict(t=0.0), [{1}, {-1}], Flag.BAD_TOKEN_ID),
    "a draft beyond the vocabulary": ([[0, 5], [5, 0]], (2,), dict(t=0.0), [{1}, {-1}], Flag.BAD_TOKEN_ID),
    "a draft of 40 bits": ([[0, 5], [5, 0]], (1 + (1 << 40),), dict(t=0.0), [{1}, {-1}], Flag.BAD_TOKEN_ID),
    "a draft before a row of NaN": ([[0, 5], [NAN, NAN]], (1,), dict(t=0.0), [{1}, {0}], Flag.NAN | Flag.NONFINITE_ROW),
    "a draft at a row of NaN": ([[NAN, NAN], [5, 0]], (1,), dict(t=0.0), [{0}, {-1}], Flag.NAN | Flag.NONFINITE_ROW),
    "a draft that the mask forbids": (
        [[0, 5], [5, 0]], (1,), dict(t=1.0, token_bitmask=torch.tensor([[1], [3]], dtype=torch.int32)), [{0}, {-1}], NONE,
    ),
    "a draft that top-k removes": ([[0, 5], [5, 0]], (0,), dict(t=1.0, top_k=1), [{1}, {-1}], NONE),
}  # fmt: skip


def accepted(rows, drafts, *, t=None, dtype=torch.float32, seed=3, proposal=None, **settings):
    """accept_chain of one request."""
    logits = torch.tensor(rows, dtype=dtype)
    starts = torch.tensor([0, len(rows)])
    layout = dk.VerifyLayout.of_rows(starts, torch.tensor([0, *drafts]), torch.arange(len(rows)) + 5, len(drafts))
    sampling = None
    if t is not None or settings:
        given = {"top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
        for name, kind in given.items():
            if name in settings:
                settings[name] = torch.tensor([settings[name]], dtype=kind)
        sampling = dk.SamplingTensors(torch.tensor([t]), torch.tensor([seed]), **settings)
    return dk.accept_chain(logits, layout, proposal, sampling=sampling)


@pytest.mark.parametrize("name", STRANGE)
def test_what_comes_of_it(name):
    rows, drafts, settings, wanted, flags = STRANGE[name]
    for seed in (3, -(2**63)):
        acceptance = accepted(rows, drafts, seed=seed, **settings)
        for token, may in zip(acceptance.tokens[0].tolist(), wanted, strict=True):
            assert token in may, acceptance.tokens
        assert acceptance.num_emitted.tolist() == [sum(may != {-1} for may in wanted)]
        assert Flag(int(acceptance.flags[0])) == flags


def test_equal_distributions_accept_whatever_the_seed():
    row = [0.3, -1.0, 2.0, 0.0]
    proposal = dk.DenseProposal(torch.tensor([[row]]))
    for seed in range(12):
        assert accepted([row, row], (2,), t=0.7, seed=seed, proposal=proposal).num_accepted.tolist() == [1]


def test_disjoint_distributions_reject_whatever_the_seed():
    proposal = dk.DenseProposal(torch.tensor([[[0.0, -INF, -INF]]]))
    for seed in range(12):
        acceptance = accepted([[-INF, 0.0, 0.0], [0.0, 0.0, 0.0]], (0,), t=0.7, seed=seed, proposal=proposal)
        assert acceptance.num_accepted.tolist() == [0] and int(acceptance.tokens[0, 0]) in (1, 2)


def test_repeated_ids_of_a_list_add_up():
    """q = (1/2, 1/2) given as id 0 twice at 1/4 and id 1 at 1/2: equal to p, so every draft is accepted."""
    proposal = dk.SparseProposal(torch.tensor([[[0, 1, 0]]]), torch.tensor([[[0.0, math.log(2.0), 0.0]]]))
    for seed in range(12):
        for draft in (0, 1):
            acceptance = accepted([[0.0, 0.0], [0.0, 0.0]], (draft,), t=1.0, seed=seed, proposal=proposal)
            assert acceptance.num_accepted.tolist() == [1]
