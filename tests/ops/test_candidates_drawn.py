"""What the drafts of the candidates' form are drawn from: their distribution, and acceptance that reads it."""

import torch

import dspark_kernels as dk
from reference import accept, cases, draft as reference, layout as layouts
from reference.equality import assert_equal_or_tied
from tests.ops.draft_checks import candidate_arguments_of

DRAWS, CANDIDATES, VOCABULARY = 400, 4, 8


def test_drafts_follow_the_stored_logits():
    """Blocks of three positions, then of three later ones under the same seeds: each window of three drafts has the distribution
    of the stored logits, and the two windows are independent. Noise that a position shares with another is detected."""
    g = torch.Generator().manual_seed(4)
    w1, w2 = torch.randn(VOCABULARY, 3, generator=g), torch.randn(VOCABULARY, 3, generator=g)
    base = torch.randn(1, 3, VOCABULARY, generator=g).expand(DRAWS, 3, VOCABULARY)
    seeds = torch.randint(-(2**63), 2**63 - 1, (DRAWS,), generator=g)
    sampling = dk.SamplingTensors(torch.full((DRAWS,), 1.3), seeds)
    windows, probs = [], []
    for round_ in range(2):
        block = drafted_in_pieces(base, dk.MarkovHead(w1, w2), sampling, 10 + 3 * round_)
        windows.append(block[0])
        probs.append(torch.softmax(block[1].double() / 1.3, -1))
        for k in range(3):
            assert chi_square(block[0][:, k], block[2][:, k], probs[-1][:, k]) < 40
    # The same place of both windows: with the position's noise alone they would be equal far too often.
    for k in range(3):
        probability = sum((probs[0][:, k] * probs[1][:, k]).sum(-1).tolist()) / DRAWS
        equal = (windows[0][:, k] == windows[1][:, k]).double().mean().item()
        assert abs(equal - probability) < 5 * (probability * (1 - probability) / DRAWS) ** 0.5


def drafted_in_pieces(base, head, sampling, position):
    anchors, positions = torch.zeros(DRAWS, dtype=torch.int64), torch.full((DRAWS,), position)
    # The interpreter takes a program per row one after another, so the reference draws most of them; the kernel, a sample.
    want = reference.draft_block(base, anchors, head, anchor_positions=positions, sampling=sampling, candidates=CANDIDATES)
    few = slice(0, 10)
    have = dk.draft_block(
        base[few], anchors[few], head, anchor_positions=positions[few], candidates=CANDIDATES,
        sampling=dk.SamplingTensors(sampling.temperature[few], sampling.seed[few].contiguous()),
    )  # fmt: skip
    assert torch.equal(have.tokens, want.tokens[few]) and torch.equal(have.proposal.ids, want.proposal.ids[few])
    return want.tokens, want.proposal.logits, want.proposal.ids


def chi_square(tokens, ids, probs):
    """Of drafts against their distributions, by id; these differ from draw to draw."""
    seen = torch.zeros(VOCABULARY, dtype=torch.float64)
    expected, variance = torch.zeros_like(seen), torch.zeros_like(seen)
    for v in range(VOCABULARY):
        probability = torch.where(ids == v, probs, 0.0).sum(-1)
        seen[v] = (tokens == v).sum()
        expected[v], variance[v] = probability.sum(), (probability * (1 - probability)).sum()
    some = variance > 0
    assert (seen[~some] == expected[~some]).all()
    return ((seen - expected)[some] ** 2 / variance[some]).sum().item()


def test_acceptance_reads_the_proposal():
    """Entries without a candidate (id 0 with -inf, beside a candidate 0 of positive probability) and successors, as stored."""
    case = cases.draft_case(seed=14, requests=4, drafts=3, vocab=40, rank=4, dtype=torch.bfloat16, confidence=None)
    case.base_logits[:, :, 0] += 3.0
    options = candidate_arguments_of(case, 50, 3)
    block = dk.draft_block(**options)
    assert (block.proposal.logits[..., 40:] == float("-inf")).all() and (block.proposal.ids[..., 40:50] == 0).all()
    layout = layouts.fixed_layout(block, torch.tensor([3, 3, 1, 2]), anchors=case.anchors, anchor_positions=case.anchor_positions)
    target = torch.randn(16, 40, generator=torch.Generator().manual_seed(3)).bfloat16()

    def run(decisions):
        want = accept.accept_chain(target, layout, block.proposal, sampling=case.sampling, decisions=decisions)
        return {r: (want.tokens[r].tolist(), int(want.flags[r])) for r in range(4)}

    have = dk.accept_chain(target, layout, block.proposal, sampling=case.sampling)
    assert_equal_or_tied(run, {r: (have.tokens[r].tolist(), int(have.flags[r])) for r in range(4)})
