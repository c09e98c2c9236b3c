"""Everything that the reference's accept_chain reports around the rules.

Probabilities are multiples of 1/8, so that every comparison below is exact in fp64.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dspark_kernels.types import DenseProposal, Flag, OneHotProposal, SamplingTensors, SparseProposal, Stream, VerifyLayout
from reference import accept, philox
from reference.accept import RULES, Verdict, accept_chain
from reference.decisions import Decisions
from tests.reference.test_accept_rules import ANCHOR, DRAFT, INF, NAN, TARGET, Script, probs_of

# --- accept_chain


def pack(*requests, rows=None, max_drafts=None):
    """A layout by hand. Request: (position of its first row, row ids, how many of the last rows give logits)."""
    starts, logit_starts, ids, positions, owners, logits, lens = [0], [0], [], [], [], [], []
    for r, (position, row_ids, giving) in enumerate(requests):
        logits += range(len(ids) + len(row_ids) - giving, len(ids) + len(row_ids))
        ids += row_ids
        positions += range(position, position + len(row_ids))
        owners += [r] * len(row_ids)
        lens.append(max(giving - 1, 0))
        starts.append(len(ids))
        logit_starts.append(len(logits))
    room = (rows or len(ids)) - len(ids)

    def ints(values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype)

    return VerifyLayout(
        draft_lens=ints(lens),
        query_start_loc=ints(starts),
        cu_num_logits=ints(logit_starts),
        token_ids=ints(ids + [0] * room, torch.int64),
        positions=ints(positions + [0] * room, torch.int64),
        batch_indices=ints(owners + [-1] * room),
        logits_indices=ints(logits + [0] * (len(ids) + room - len(logits))),
        num_rows=ints([len(ids)]),
        flags=ints([0] * len(requests)),
        max_drafts=max_drafts,
    )


def chain(*drafts, position=ANCHOR):
    return position, [99, *drafts], len(drafts) + 1


def tensors(temperatures, seeds=None):
    return SamplingTensors(torch.tensor(temperatures, dtype=torch.float32), torch.tensor(seeds or list(range(len(temperatures)))))


def logits_of(probs):
    return probs.log().float()


def rows_of(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def uniform_and_noise(seed, position, anchor):
    """The acceptance uniform of a draft, and -ln E of ids 0..2 for a correction (one vocabulary block: its race has one runner)."""
    u = philox.uniform(philox.words(seed, torch.zeros(1, dtype=torch.int64), position, anchor, Stream.ACCEPT))
    return float(u), philox.gumbel(seed, torch.arange(3), position, anchor, Stream.CORRECT)


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", ["dense", "one_hot", "none"])
def test_philox_decides_as_the_script_does(rule, kind):
    """Acceptance uniform of draft i at anchor + i; correction or bonus after n at anchor + n + 1: the rule on these numbers."""
    ends = set()
    for seed in range(-60, 60):
        anchor = 1000 + seed
        uniforms = {anchor + 1 + i: uniform_and_noise(seed, anchor + 1 + i, anchor)[0] for i in range(2)}
        script = Script(uniforms)
        shapes = dict(dense=DRAFT, one_hot=probs_of((0, 8, 0), (8, 0, 0)), none=probs_of((0, 8, 0), (8, 0, 0)))
        verdict = RULES[rule](TARGET, shapes[kind], [1, 0], script, anchor)
        position, weights = script.drawn
        want = int((torch.tensor(weights).log() + uniform_and_noise(seed, position, anchor)[1]).argmax())
        proposal = dict(dense=DenseProposal(logits_of(DRAFT)[None]), one_hot=OneHotProposal(), none=None)[kind]
        have = accept_chain(
            logits_of(TARGET),
            pack(chain(1, 0, position=anchor)),
            proposal,
            sampling=tensors([1.0], [seed]),
            rule=rule,
        )
        n = verdict.num_accepted
        assert have.tokens.tolist() == [[*[1, 0][:n], want, *[-1] * (2 - n)]]
        assert have.next_token.tolist() == [want]
        assert (int(have.num_accepted), int(have.num_emitted), int(have.num_rejected)) == (n, n + 1, 2 - n)
        assert int(have.last_row) == n and have.commit_mask.tolist() == [i <= n for i in range(3)]
        assert int(have.flags) == 0
        ends.add((n, want))
    assert {n for n, _ in ends} == {0, 1, 2} and len(ends) >= 5


def test_coupled_philox_does_not_know_the_anchor():
    """The noise is that of position alone: the tokens are those of plain sampling, whatever the drafts."""
    seen = set()
    for seed in range(30):
        y = [
            int((TARGET[i].log() + philox.gumbel(seed, torch.arange(3), ANCHOR + 1 + i, 0, Stream.COUPLED)).argmax())
            for i in range(3)
        ]
        have = accept_chain(logits_of(TARGET), pack(chain(1, 0)), sampling=tensors([1.0], [seed]), rule="coupled")
        n = 0 if y[0] != 1 else 1 if y[1] != 0 else 2
        assert have.tokens.tolist() == [[*y[: n + 1], *[-1] * (2 - n)]]
        seen.add(n)
    assert seen == {0, 1, 2}


class Spy:
    """Takes the place of a rule and shows the distributions that it was given; accepts nothing."""

    def __init__(self, monkeypatch):
        monkeypatch.setitem(accept.RULES, "token", self)

    def __call__(self, target_probs, draft_probs, drafts, source, anchor_position):
        self.drafts, self.anchor_position = drafts, anchor_position
        self.target = [target_probs[i].tolist() for i in range(len(drafts) + 1)]
        self.draft = [draft_probs[i] for i in range(len(drafts))]
        self.draft = [row if row is None else row.tolist() for row in self.draft]
        return Verdict(0, 0)


def softmax(*logits, scale=1.0):
    weights = [math.exp((x - max(logits)) * scale) for x in logits]
    return pytest.approx([w / sum(weights) for w in weights], rel=1e-12, abs=0.0)


def test_target_distribution(monkeypatch):
    spy = Spy(monkeypatch)
    rows = rows_of((1.0, 2.0, -3.0), (NAN, 0.5, -INF), (0.0, INF, INF), (-1.0, 3.0, NAN))
    accept_chain(rows, pack(chain(0, 1, 2)), sampling=tensors([0.5]))
    assert spy.target[0] == softmax(1, 2, -3, scale=2)
    assert spy.target[1] == [0, 1, 0]
    assert spy.target[2] == [0, 1, 0]  # several +inf: the lowest id
    assert spy.target[3] == softmax(-1, 3, -INF, scale=2)
    assert spy.drafts == [0, 1, 2] and spy.anchor_position == ANCHOR
    accept_chain(rows_of((1.0, 1.5, 0.0)), pack(chain()), sampling=tensors([1e-38]))
    assert spy.target == [[0, 1, 0]]  # 1/T is at most 1e30: no overflow


def test_dense_draft_distribution(monkeypatch):
    spy = Spy(monkeypatch)
    target = torch.zeros(5, 3)
    drafted = rows_of((1.0, 2.0, -3.0), (NAN, 0.5, -INF), (0.0, INF, INF), (-INF, -INF, NAN))

    def seen(proposal, drafts=(0, 1, 2, 1), **options):
        have = accept_chain(target, pack(chain(*drafts)), proposal, sampling=tensors([0.5]), **options)
        assert int(have.flags) == 0, "a NaN of a draft row is not the target's"
        return spy.draft

    first = seen(DenseProposal(drafted[None]))
    assert first == [softmax(1, 2, -3, scale=2), [0, 1, 0], [0, 1, 0], [0, 0, 0]]
    own = seen(DenseProposal(drafted[None], temperature=torch.tensor([2.0])))
    assert own[0] == softmax(1, 2, -3, scale=0.5)
    lse = seen(DenseProposal(drafted[None], lse=torch.full((1, 4), 77.0)))
    assert lse == first, "the normaliser is computed again"
    missing = seen(DenseProposal(drafted[None]), (0, -1, 2, 1))
    assert missing[1] is None and missing[2] == [0, 1, 0]
    greedy = seen(DenseProposal(drafted[None], temperature=torch.tensor([0.0])), (0, 2, 3, -1))
    assert greedy == [[1, 0, 0], [0, 0, 1], [0, 0, 0], None]
    assert seen(OneHotProposal(), (2, 1, 3, -1)) == seen(None, (2, 1, 3, -1)) == [[0, 0, 1], [0, 1, 0], [0, 0, 0], None]


def test_draft_distributions_of_another_width(monkeypatch):
    spy = Spy(monkeypatch)
    narrow, wide = rows_of((1.0, 2.0)), rows_of((1.0, 2.0, -1.0, 3.0))

    def seen(proposal):
        accept_chain(torch.zeros(2, 3), pack(chain(0)), proposal, sampling=tensors([1.0]))
        return spy.draft[0]

    e = [math.exp(x) for x in (1, 2, -1, 3)]
    assert seen(DenseProposal(narrow[None])) == pytest.approx([e[0] / sum(e[:2]), e[1] / sum(e[:2]), 0], rel=1e-12)
    # Ids beyond the target's stay in the normaliser.
    assert seen(DenseProposal(wide[None])) == pytest.approx([x / sum(e) for x in e[:3]], rel=1e-12)
    mapped = DenseProposal(wide[None], draft_to_target=torch.tensor([2, 0, 7, -1]))
    assert seen(mapped) == pytest.approx([e[1] / sum(e), 0, e[0] / sum(e)], rel=1e-12)
    sparse = SparseProposal(torch.tensor([[[2, 0, 5, -1]]]), wide[None])
    assert seen(sparse) == pytest.approx([e[1] / sum(e), 0, e[0] / sum(e)], rel=1e-12)


ROWS = rows_of((0.0, 5.0, 1.0), (2.0, 0.0, 2.0), (0.0, 1.0, 4.0))


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
@pytest.mark.parametrize("temperature", [None, 0.0, -1.0, NAN])
@pytest.mark.parametrize(
    ("drafts", "tokens", "flags"),
    [
        ((1, 0), [1, 0, 2], 0),
        ((1, 2), [1, 0, -1], 0),  # ties: the lowest id alone is right
        ((0, 0), [1, -1, -1], 0),
        ((1, -1), [1, 0, -1], Flag.MISSING_DRAFT),
        ((3, 0), [1, -1, -1], Flag.BAD_TOKEN_ID),
        ((-5, 0), [1, -1, -1], Flag.BAD_TOKEN_ID),
        ((0, 7), [1, -1, -1], 0),  # never looked at
    ],
)
def test_greedy_rows_under_every_rule(rule, temperature, drafts, tokens, flags):
    sampling = None if temperature is None else tensors([temperature])
    have = accept_chain(ROWS, pack(chain(*drafts)), sampling=sampling, rule=rule)
    assert have.tokens.tolist() == [tokens] and int(have.flags) == flags


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize(
    ("draft", "flags"),
    [(-1, Flag.MISSING_DRAFT), (3, Flag.BAD_TOKEN_ID), (2, Flag.BAD_TOKEN_ID), (-3, Flag.BAD_TOKEN_ID)],
)
def test_flags_of_impossible_drafts(seed, rule, draft, flags):
    """Draft 2 has probability 0 in its own distribution. The draft behind it is not verified."""
    proposal = DenseProposal(rows_of((0.0, 0.0, -INF), (0.0, 0.0, 0.0))[None])
    have = accept_chain(ROWS, pack(chain(draft, 0)), proposal, sampling=tensors([1.0], [seed]), rule=rule)
    assert int(have.num_accepted) == 0 and int(have.flags) == flags
    assert 0 <= int(have.next_token) < 3


@pytest.mark.parametrize("rule", ["token", "block"])
def test_empty_residual_is_flagged(rule):
    row = rows_of((-INF, 0.0, 1.0))
    emitted = set()
    for seed in range(12):
        have = accept_chain(
            torch.cat([row, row]), pack(chain(0)), DenseProposal(row[None]), sampling=tensors([1.0], [seed]), rule=rule
        )
        assert int(have.flags) == Flag.EMPTY_RESIDUAL | Flag.BAD_TOKEN_ID and int(have.num_accepted) == 0
        emitted.add(int(have.next_token))
    assert emitted == {1, 2}


@pytest.mark.parametrize("temperature", [None, 1.0])
@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
@pytest.mark.parametrize(
    ("row", "token", "flags"),
    [
        ((-INF, -INF, -INF), 0, Flag.NONFINITE_ROW),
        ((-INF, NAN, -INF), 0, Flag.NONFINITE_ROW | Flag.NAN),
        ((-INF, INF, INF), 1, Flag.NONFINITE_ROW),  # the lowest id that is allowed
        ((NAN, -INF, INF), 2, Flag.NONFINITE_ROW | Flag.NAN),
    ],
)
@pytest.mark.parametrize("where", [0, 1, 2])
def test_rows_without_finite_logits(temperature, rule, row, token, flags, where):
    """Point masses elsewhere: drafts (1, 0) are right, but acceptance ends at the row, though it may allow the draft."""
    rows = rows_of((-INF, 5.0, -INF), (5.0, -INF, -INF), (-INF, -INF, 5.0))
    rows[where] = rows_of(row)
    sampling = None if temperature is None else tensors([temperature])
    have = accept_chain(rows, pack(chain(1, 0)), OneHotProposal(), sampling=sampling, rule=rule)
    assert have.tokens.tolist() == [[*[1, 0][:where], token, *[-1] * (2 - where)]]
    assert int(have.flags) == flags and int(have.last_row) == where


@pytest.mark.parametrize(
    ("drafts", "flags"),
    [((0,), 0), ((-1,), Flag.MISSING_DRAFT), ((3,), Flag.BAD_TOKEN_ID), ((2,), Flag.BAD_TOKEN_ID)],
)
def test_rejected_draft_at_a_row_without_finite_logits(drafts, flags):
    proposal = DenseProposal(rows_of((0.0, 0.0, -INF))[None])
    rows = rows_of((-INF, -INF, -INF), (0.0, 0.0, 0.0))
    have = accept_chain(rows, pack(chain(*drafts)), proposal, sampling=tensors([1.0]))
    assert have.tokens.tolist() == [[0, -1]] and int(have.flags) == flags | Flag.NONFINITE_ROW


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_flags_stop_where_acceptance_stops(temperature):
    """NaN of row 1 shows only if draft 1 passed; the same for a bad row or draft behind."""
    rows = rows_of((-INF, 5.0, -INF), (5.0, NAN, -INF), (NAN, NAN, NAN))
    sampling = None if temperature is None else tensors([temperature])
    for drafts, flags in (((0, -1), 0), ((1, 2), Flag.NAN), ((1, 0), Flag.NAN | Flag.NONFINITE_ROW)):
        have = accept_chain(rows, pack(chain(*drafts)), OneHotProposal(), sampling=sampling)
        assert int(have.flags) == flags, drafts


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_plus_infinity_is_a_point_mass(temperature):
    sampling = None if temperature is None else tensors([temperature])
    rows = rows_of((3.0, INF, INF), (3.0, -INF, INF))
    have = accept_chain(rows, pack(chain(1)), OneHotProposal(), sampling=sampling)
    assert have.tokens.tolist() == [[1, 2]] and int(have.flags) == 0
    have = accept_chain(rows, pack(chain(2)), OneHotProposal(), sampling=sampling)
    assert have.tokens.tolist() == [[1, -1]] and int(have.flags) == 0


def test_width_of_the_tokens():
    rows = torch.cat([ROWS, ROWS[:1]])  # one row of logits more than the request uses
    layout = pack(chain(1, 0))
    widths = [
        accept_chain(rows, dataclasses.replace(layout, max_drafts=5), DenseProposal(torch.zeros(1, 4, 3))),
        accept_chain(rows, layout, DenseProposal(torch.zeros(1, 4, 3))),
        accept_chain(rows, layout, SparseProposal(torch.zeros(1, 6, 2, dtype=torch.int64), torch.zeros(1, 6, 2))),
        accept_chain(rows, layout, OneHotProposal()),
        accept_chain(rows, layout),
        accept_chain(ROWS[:0], pack((0, [1, 2], 0))),
    ]
    assert [have.tokens.shape[1] for have in widths] == [6, 5, 7, 4, 4, 1]
    for have in widths[:-1]:
        assert have.tokens[0].tolist() == [1, 0, 2] + [-1] * (have.tokens.shape[1] - 3)


def mixed_batch():
    """Batch row: its slot. 0: 4, drafts (1, 2) of which the second fails; 1: padding; 2: 1, a prefill chunk of 3 rows
    that emits nothing; 3: 0, a prefill of 2 rows whose last emits; 4: 2, the anchor alone; 5: 5, one draft, right."""
    layout = pack(
        (10, [7, 1, 2], 3),
        (0, [], 0),
        (20, [8, 8, 8], 0),
        (30, [9, 9], 1),
        (50, [6], 1),
        (60, [5, 2], 2),
        rows=14,
    )
    logits = torch.cat([ROWS, rows_of((9.0, 0, 0), (0, 0, 9.0), (0, 0, 9.0), (0, 9.0, 0)), torch.full((3, 3), NAN)])
    return logits, layout, torch.tensor([4, -1, 1, 0, 2, 5], dtype=torch.int32)


def test_a_mixed_batch():
    logits, layout, slots = mixed_batch()
    anchors, positions = torch.arange(100, 107), torch.arange(200, 207, dtype=torch.int32)
    have = accept_chain(
        logits, layout, state_indices=slots, anchors=anchors, anchor_positions=positions,
        sampling=tensors([0.0] * 7),
    )  # fmt: skip
    empty = [-1] * 9
    assert [row[:3] for row in have.tokens.tolist()] == [
        [1, 0, -1], empty[:3], empty[:3], [0, -1, -1], [2, -1, -1], [2, 1, -1],
    ]  # fmt: skip
    assert have.tokens.shape == (6, 10) and bool((have.tokens[:, 3:] == -1).all())
    assert have.num_accepted.tolist() == [1, 0, 0, 0, 0, 1]
    assert have.num_emitted.tolist() == [2, 0, 0, 1, 1, 2]
    assert have.num_rejected.tolist() == [1, 0, 0, 0, 0, 0]
    assert have.next_token.tolist() == [0, -1, -1, 0, 2, 1]
    assert have.last_row.tolist() == [1, 0, 0, 7, 8, 10]
    kept = [True, True, False] + [True] * 3 + [True, True] + [True] + [True, True] + [False] * 3
    assert have.commit_mask.tolist() == kept
    assert have.flags.tolist() == [0] * 6
    # In place: the new anchor and its position, by slot; slots 1 (no emission), 3 and 6 (not in the batch) untouched.
    assert anchors.tolist() == [0, 101, 2, 103, 0, 1, 106]
    assert positions.tolist() == [32, 201, 51, 203, 12, 62, 206]


def test_sampling_settings_and_distributions_are_found_by_slot(monkeypatch):
    spy = Spy(monkeypatch)
    drafted = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(1))
    layout = pack((10, [7, 1, 2], 3), (60, [5, 2], 2))
    slots = torch.tensor([-1, 1], dtype=torch.int32)
    logits = torch.cat([ROWS, ROWS])
    accept_chain(logits, layout, DenseProposal(drafted), sampling=tensors([1.0, 4.0, 0.5]), state_indices=slots)
    assert spy.draft == [softmax(*drafted[1, 0].tolist(), scale=0.25)]
    assert spy.target[0] == softmax(*logits[3].tolist(), scale=0.25)
    assert spy.anchor_position == 60 and spy.drafts == [2]


def test_padding_leaves_its_rows_neutral():
    """A row of the batch without a slot: nothing of it is read, not even where the layout has rows for it."""
    anchors, positions = torch.tensor([7, 8]), torch.tensor([70, 80])
    have = accept_chain(
        torch.cat([ROWS * NAN, ROWS]),
        pack(chain(1, 0), chain(1, 0)),
        state_indices=torch.tensor([-1, 1], dtype=torch.int32),
        anchors=anchors,
        anchor_positions=positions,
    )
    assert have.tokens.tolist() == [[-1] * 6, [1, 0, 2, -1, -1, -1]]
    for name in ("num_accepted", "num_emitted", "num_rejected", "last_row", "flags"):
        assert int(getattr(have, name)[0]) == 0, name
    assert int(have.next_token[0]) == -1 and have.commit_mask.tolist() == [False] * 3 + [True] * 3
    assert anchors.tolist() == [7, 2] and positions.tolist() == [70, ANCHOR + 3]


def test_an_empty_batch():
    have = accept_chain(torch.zeros(0, 3), pack())
    assert have.tokens.shape == (0, 1) and have.commit_mask.shape == (0,)


def test_margins_are_recorded_and_flips_obeyed():
    """Greedy: two logits closer than fp32 resolves; sampled: the acceptance uniform of draft 1."""
    rows = ROWS.double()
    rows[1, 2] += 2.0**-18
    decisions = Decisions()
    have = accept_chain(rows, pack(chain(1, 2)), decisions=decisions)
    assert have.tokens.tolist() == [[1, 2, 2]]
    assert decisions.near() == [(0, 1)] and decisions.margins[0, 1] == ("greedy", 2.0**-18, 2 + 2.0**-18)
    have = accept_chain(rows, pack(chain(1, 2)), decisions=Decisions(frozenset(decisions.near())))
    assert have.tokens.tolist() == [[1, 0, -1]]

    sampled = dict(proposal=DenseProposal(logits_of(DRAFT)[None]), sampling=tensors([1.0], [5]))
    decisions = Decisions()
    have = accept_chain(logits_of(TARGET), pack(chain(1, 0)), **sampled, decisions=decisions)
    u = uniform_and_noise(5, ANCHOR + 1, ANCHOR)[0]
    kind, margin, scale = decisions.margins[0, 0]
    assert (kind, scale) == ("accept", 1.0) and margin == pytest.approx(abs(math.log(u / 0.75)), rel=1e-6)
    other = accept_chain(logits_of(TARGET), pack(chain(1, 0)), **sampled, decisions=Decisions(frozenset([(0, 0)])))
    assert (int(have.num_accepted) > 0) != (int(other.num_accepted) > 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(rule="greedy"), ValueError, "rule: expected"),
        (dict(out=object()), ValueError, "out: expected None"),
        (dict(workspace=object()), ValueError, "workspace: expected None"),
        (dict(logprobs="all"), ValueError, "logprobs: expected"),
        (dict(synthetic_rates=torch.ones(2)), ValueError, "sampling: expected"),
    ],
)
def test_refused(options, error, message):
    with pytest.raises(error, match=message):
        accept_chain(ROWS, pack(chain(1, 0)), **options)
