"""Sampled text of the loop: by seed, as plain sampling gives it, with the target's distribution."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from dspark_kernels.types import CostTable, DenseProposal
from reference.drafters import Autoregressive
from reference.loop import REFERENCE_OPS, Request, decode
from tests.reference.toy_models import (
    SYSTEMS,
    TARGET,
    all_logits,
    make_dspark,
    make_target,
    requests_of,
)


@pytest.mark.parametrize("name", ["draft model", "MTP", "block", "DSpark, threshold", "DSpark, causal"])
@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_sampled_text_is_reproducible_by_seed(name, rule):
    make, options = SYSTEMS[name]
    requests = requests_of(temperature=1.0)
    texts = [
        [result.output_ids for result in decode(TARGET, make(TARGET), asked, rule=rule, **options)]
        for asked in (requests, requests, [dataclasses.replace(r, seed=r.seed + 1000) for r in requests])
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize("name", SYSTEMS)
def test_coupled_text_is_that_of_plain_sampling(name):
    make, options = SYSTEMS[name]
    requests = requests_of(temperature=0.8)
    plain = decode(TARGET, Autoregressive(), requests, rule="coupled")
    drafted = decode(TARGET, make(TARGET), requests, rule="coupled", batch_size=3, **options)
    assert [result.output_ids for result in drafted] == [result.output_ids for result in plain]
    assert any(any(result.accepted) for result in drafted)


# Distribution of the first three tokens: the prefill's, and two that come from rounds. 4 ids, so 64 texts.
DIST_VOCAB, DIST_TOKENS, DIST_TEMPERATURE, DIST_SEEDS = 4, 3, 2.0, 500
DIST_PROMPT = [1, 3, 0]


def dist_target():
    return make_target(DIST_VOCAB, seed=21)


def exact_distribution(target):
    """Probability of every text of DIST_TOKENS tokens after the prompt."""
    found = {}
    for text in itertools.product(range(DIST_VOCAB), repeat=DIST_TOKENS):
        logits = all_logits(target, DIST_PROMPT + list(text)).double() / DIST_TEMPERATURE
        rows = torch.log_softmax(logits, -1)[len(DIST_PROMPT) - 1 :]
        found[text] = math.exp(sum(float(rows[i, token]) for i, token in enumerate(text)))
    assert math.isclose(sum(found.values()), 1.0, abs_tol=1e-9)
    return found


def misfit(target, results):
    """Chi-square statistic over the value that a right sampler stays below in all but 10^-6 of the seed sets.

    Texts with fewer than 5 expected counts are pooled; the limit is Wilson and Hilferty's approximation.
    """
    expected = {text: probability * len(results) for text, probability in exact_distribution(target).items()}
    counts = dict.fromkeys(expected, 0)
    for result in results:
        counts[tuple(result.output_ids[len(DIST_PROMPT) :])] += 1
    common = [text for text in expected if expected[text] >= 5]
    cells = [(counts[text], expected[text]) for text in common]
    rest = len(results) - sum(n for n, _ in cells), len(results) - sum(m for _, m in cells)
    assert len(common) >= 20 and rest[1] > 5
    statistic = sum((n - m) ** 2 / m for n, m in [*cells, rest])
    freedom = len(cells)
    return statistic / (freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3)


def dist_results(target, drafter, **options):
    requests = [Request(DIST_PROMPT, DIST_TOKENS, DIST_TEMPERATURE, seed=seed) for seed in range(DIST_SEEDS)]
    return decode(target, drafter, requests, batch_size=64, **options)


def dist_dspark(target):
    return make_dspark(target, seed=12, mask_token_id=3, block_size=3)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_distribution_of_dspark_with_threshold(rule):
    target = dist_target()
    results = dist_results(target, dist_dspark(target), rule=rule, confidence_threshold=0.45)
    assert {length for result in results for length in result.proposal_lengths} == {0, 1, 2, 3}
    assert misfit(target, results) < 1


def test_distribution_of_dspark_with_costs():
    target = dist_target()
    cost = CostTable(seconds=1e-3 * (1.0 + 0.01 * torch.arange(300.0)))
    results = dist_results(target, dist_dspark(target), cost=cost, policy="budget")
    assert len({length for result in results for length in result.proposal_lengths}) >= 3
    assert misfit(target, results) < 1


def test_distribution_test_detects_a_proposal_that_is_not_the_sampled_distribution():
    """The same test with drafts that were chosen greedily but are said to be sampled."""

    def draft_block(*arguments, sampling, **options):
        block = REFERENCE_OPS.draft_block(*arguments, sampling=None, keep_logits=True, **options)
        wrong = DenseProposal(block.proposal.logits)  # at the sampling temperature
        return dataclasses.replace(block, proposal=wrong)

    target = dist_target()
    ops = SimpleNamespace(**{**vars(REFERENCE_OPS), "draft_block": draft_block})
    results = dist_results(target, dist_dspark(target), confidence_threshold=0.45, ops=ops)
    assert misfit(target, results) > 1
