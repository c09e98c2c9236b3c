"""Arguments of schedule_prefixes, made from a seed: what the tests of scheduling share."""

import contextlib
import dataclasses

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels.launch.layout import schedule as launch
from reference import cases
from tests.blocks import block_of, ints

POLICIES = ("causal", "budget", "stale")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def _confidence(g, shape, coarse):
    """Confidences that fall off slowly; coarse: of few values, so that survivals tie, 0 and 1 among them."""
    values = torch.rand(shape, generator=g) ** 0.4
    return (values * 4).round() / 4 if coarse else values


def table(kind, seed=0, entries=64):
    """A cost table: flat, steep, rising, jagged, of one measured entry, or with values that nobody should measure."""
    g = generator(seed)
    seconds = {
        "flat": torch.full((entries,), 3e-3),
        "steep": 1e-3 * torch.arange(entries),
        "rising": 2e-3 + 2e-5 * torch.rand(entries, generator=g).cumsum(0) * torch.arange(entries) / 8,
        "jagged": 2e-3 + 4e-4 * torch.rand(entries, generator=g),
        "steps": 2e-3 + 3e-4 * (torch.arange(entries) // 8),
        "single": torch.tensor([0.0, 1e-3]),
    }[kind]
    if seed % 3:
        seconds[0] = float("nan")  # no measurement, whatever is there
    return dk.CostTable(seconds, 1e-4 + 1e-4 * torch.rand(3, generator=g) if seed % 2 else None)


TABLES = ("flat", "steep", "rising", "jagged", "steps", "single")


def arguments(seed, requests, drafts, policy, kind="rising", coarse=False, scattered=False, padding=0, missing=False, **options):
    """Arguments of schedule_prefixes for a batch made from the seed."""
    g = generator(seed)
    slots = requests + 3 if scattered else requests
    tokens = torch.randint(0, 1000, (slots, drafts), generator=g)
    if missing:
        tokens[torch.rand(tokens.shape, generator=g) < 0.1] = -1
    anchors = torch.randint(0, 1000, (slots,), generator=g)
    if missing and slots:
        anchors[-1] = -1
    chosen = dict(
        causal={},
        budget=dict(policy="budget", budget=ints(int(torch.randint(0, requests * drafts + 1, (1,), generator=g)))),
        stale=dict(policy="budget", stale_confidence=_confidence(g, (slots, drafts), coarse)),
    )[policy]
    return dict(
        block=block_of(_confidence(g, (slots, drafts), coarse), tokens, requests=requests),
        cost=table(kind, seed),
        anchors=anchors,
        anchor_positions=torch.randint(0, 50000, (slots,), generator=g),
        state_indices=cases.slot_map(seed, requests, padding) if scattered else None,
        **chosen,
        **options,
    )


@contextlib.contextmanager
def small_pieces():
    """Few drafts in order at a time and few rows a program, as a large batch would have them on a GPU."""
    picked = launch.pick
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "pick", lambda *shape: dataclasses.replace(picked(*shape), sort=16, block=64))
        yield
