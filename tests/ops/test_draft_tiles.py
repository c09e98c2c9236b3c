"""Many tiles of ids for one program of a dense draft block: what it keeps from tile to tile, sweeps in both directions."""

import dataclasses
import itertools

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels.launch.draft import dense as launch
from reference import cases
from tests.ops.draft_checks import check

TILE = 64
VOCAB = 5 * TILE + 13  # the last tile is ragged


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    pick = launch.pick
    monkeypatch.setattr(launch, "pick", lambda *a: dataclasses.replace(pick(*a), block_v=TILE))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(requests=19, drafts=2, rank=8),  # 32 requests at a time, then 64
        dict(requests=40, drafts=2, rank=8, scattered=True, padding=3),
        dict(requests=70, drafts=2, rank=8, noise="coupled"),  # two tiles of requests, each with sweeps of its own
        dict(requests=1, kind="gated", w2_dtype=torch.int8),
        dict(kind="rnn", target_vocab=900, noise="coupled"),
        dict(sampled=False, dtype=torch.bfloat16, adjust=("bias", "mask")),
    ],
    ids=str,
)
def test_equals_reference(options):
    check(cases.draft_case(seed=21, vocab=VOCAB, **dict(requests=3, drafts=3) | options))


def _greedy(base, **arguments):
    requests = base.shape[0]
    return dk.draft_block(base, torch.zeros(requests, dtype=torch.int64), anchor_positions=torch.arange(requests), **arguments)


# Ids of equal logits: in the same place of three tiles, in different places, in the ragged tile, -0.0 beside 0.0; and every two
# of eight neighbours, of which a thread keeps one where a turn takes more than 16 requests.
TIES = [[7, 7 + TILE, 7 + 3 * TILE], [TILE + 60, 2 * TILE + 3], [4 * TILE + 1, 5 * TILE + 12], [VOCAB - 1, 0]]
NEIGHBOURS = [[TILE + 8 + i, TILE + 8 + j] for i, j in itertools.permutations(range(8), 2)]


@pytest.mark.parametrize("value", [2.0, 0.0, float("inf"), float("-inf")])
@pytest.mark.parametrize("ties", [TIES, [*TIES, *NEIGHBOURS[:20]], [*TIES, *NEIGHBOURS]], ids=len)
def test_ties_go_to_the_lowest_id(ties, value):
    """At positions of both directions; a row of equal values everywhere goes to id 0."""
    base = torch.full((len(ties), 4, VOCAB), -1.0 if value > -1 else value)
    for row, ids in enumerate(ties):
        base[row, :, ids] = value
        base[row, :, ids[-1]] = -value if value == 0.0 else value  # -0.0 ties with 0.0
    block = _greedy(base)
    lowest = [min(ids) for ids in ties] if value > -1 else [0] * len(ties)
    assert block.tokens.tolist() == [[token] * 4 for token in lowest]
    if value == 2.0:
        # By target ids: the map turns the order round.
        turned = _greedy(base, draft_to_target=torch.arange(VOCAB).flip(0))
        assert turned.tokens.tolist() == [[VOCAB - 1 - max(ids)] * 4 for ids in ties]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("requests", [4, 20, 40])
def test_nan_elsewhere_than_the_winner_is_flagged(requests, position, sampled):
    """And only for its request: in the first, a middle and the ragged tile, before and after the winner's, and beside it."""
    beside = [3 * TILE + 8 + i for i in range(8) if i != 1]
    places = (
        [*([3, 2 * TILE + 5, VOCAB - 1, None] * 10)[: requests - 7], *beside]
        if requests > 16
        else [3, 2 * TILE + 5, VOCAB - 1, None]
    )
    base = torch.zeros(len(places), 2, VOCAB)
    base[:, :, 3 * TILE + 9] = 90.0
    for row, place in enumerate(places):
        if place is not None:
            base[row, position, place] = float("nan")
    sampling = None
    if sampled:
        sampling = dk.SamplingTensors(torch.ones(len(places)), torch.arange(len(places)))
    block = _greedy(base, sampling=sampling)
    assert (block.tokens == 3 * TILE + 9).all()
    assert block.flags.tolist() == [0 if place is None else int(dk.Flag.NAN) for place in places]


def test_a_padding_row_beside_others_publishes_nothing():
    base = torch.zeros(3, 2, VOCAB)
    base[:, :, TILE + 1] = 1.0
    base[1, 0, 5] = float("nan")
    tokens = torch.full((4, 2), -7)
    out = dk.DraftBlock(tokens=tokens, proposal=dk.OneHotProposal(), flags=torch.full((3,), -7, dtype=torch.int32))
    workspace = dk.Workspace(3, 2, VOCAB, "cpu")
    slots = torch.tensor([2, -1, 0], dtype=torch.int32)
    anchors, positions = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    dk.draft_block(base, anchors, anchor_positions=positions, state_indices=slots, out=out, workspace=workspace)
    assert tokens.tolist() == [[TILE + 1] * 2, [-7, -7], [TILE + 1] * 2, [-7, -7]] and out.flags.tolist() == [0, 0, 0]
    assert (workspace.counters[2:] == 0).all(), "counters were not left clean"
