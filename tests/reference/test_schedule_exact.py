"""reference/schedule.py against a brute-force algorithm 1 in fractions, and the exact distribution of what is emitted."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from reference.schedule import (
    COST_LIMIT,
    schedule_prefixes,
)
from tests.blocks import anchored, block_of, ints
from tests.reference.test_schedule import FEW, lengths, table_of

# --- comparison with a brute-force simulation -----------------------------------------------------


class Simulation:
    """Algorithm 1 by repeated search for the best next draft of any request, in fractions of seconds and tokens."""

    def __init__(self, confidence, units, limits, rows, emitting, capacity, min_len):
        self.survival = []
        for row in confidence:
            product, values = np.float32(1), []
            for value in row:
                product = np.float32(product * np.float32(value))
                values.append(Fraction(int(Fraction(float(product)) * 2**24), 2**24))
            self.survival.append(values)
        self.units, self.limits, self.capacity = units, limits, capacity
        self.rows, self.tau = rows, Fraction(emitting)
        self.lens = [0] * len(confidence)
        for position in range(min_len):
            for request in range(len(confidence)):
                if position < limits[request]:
                    self.admit(request)

    def cost(self, rows):
        if rows <= len(self.units):
            return Fraction(self.units[rows - 1])
        slope = self.units[-1] - self.units[-2] if len(self.units) > 1 else 0
        return Fraction(min(COST_LIMIT, self.units[-1] + max(0, slope) * (rows - len(self.units))))

    def admit(self, request):
        if self.rows < self.capacity:
            self.tau += self.survival[request][self.lens[request]]
            self.rows += 1
            self.lens[request] += 1

    def next(self):
        """The request whose next draft is best, or None."""
        best = None
        for request, length in enumerate(self.lens):
            if length < self.limits[request] and self.survival[request][length] > 0 and self.rows < self.capacity:
                rank = (self.survival[request][length], -length, -request)
                if best is None or rank > best[0]:
                    best = (rank, request)
        return best and best[1]

    def causal(self):
        while (request := self.next()) is not None:
            before = self.tau / self.cost(self.rows)
            after = (self.tau + self.survival[request][self.lens[request]]) / self.cost(self.rows + 1)
            if after <= before:
                break
            self.admit(request)
        return self.lens

    def take(self, number):
        while sum(self.lens) < number and (request := self.next()) is not None:
            self.admit(request)
        return self.lens

    def best_count(self):
        found = [(self.tau / self.cost(self.rows), -sum(self.lens))] if self.rows else [(0, 0)]
        while (request := self.next()) is not None:
            self.admit(request)
            found.append((self.tau / self.cost(self.rows), -sum(self.lens)))
        return -max(found)[1]


confidences = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32))


@st.composite
def batches(draw):
    requests, drafts = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    grid = st.lists(st.lists(confidences, min_size=drafts, max_size=drafts), min_size=requests, max_size=requests)
    step = st.sampled_from([0, 0, 1, 3, 40, 300])
    units = [draw(st.integers(1, 2000))]
    for more in draw(st.lists(step, max_size=requests * (drafts + 1) + 2)):
        units.append(max(1, units[-1] + more - (2 if more == 1 else 0)))
    tokens = [[draw(st.sampled_from([1, 2, 3, 3, 3, -1])) if k else 5 for k in range(drafts)] for _ in range(requests)]
    return dict(
        now=draw(grid),
        stale=draw(grid),
        units=units,
        tokens=tokens,
        max_len=draw(st.lists(st.integers(0, drafts), min_size=requests, max_size=requests)),
        prefill=draw(st.lists(st.sampled_from([0, 0, 0, 2]), min_size=requests, max_size=requests)),
        emits=draw(st.lists(st.sampled_from([True, True, True, False]), min_size=requests, max_size=requests)),
        padding=draw(st.lists(st.sampled_from([False, False, False, True]), min_size=requests, max_size=requests)),
        min_len=draw(st.sampled_from([0, 0, 0, 1, 2])),
        spare=draw(st.sampled_from([99, 99, 3, 1, 0])),
        budget=draw(st.integers(0, requests * drafts + 1)),
        order=draw(st.permutations(range(requests))),
    )


def cut(tokens):
    return next((k for k, token in enumerate(tokens) if token < 0), len(tokens))


@settings(FEW, max_examples=300)
@given(batches())
def test_schedule_equals_the_simulation(case):
    """All policies and options at once, with requests in another order than their slots."""
    order, requests, drafts = case["order"], len(case["order"]), len(case["now"][0])
    slots = [-1 if case["padding"][row] else slot for row, slot in enumerate(order)]
    live = [row for row in range(requests) if slots[row] >= 0]
    fixed = sum(case["prefill"][row] or 1 for row in live)
    emitting = sum(case["emits"][row] for row in live)
    capacity = fixed + case["spare"]
    decoding = [slots[row] >= 0 and not case["prefill"][row] and case["emits"][row] for row in range(requests)]
    caps = [min(case["max_len"][row], drafts) if decoding[row] else 0 for row in range(requests)]
    limits = [min(caps[row], cut(case["tokens"][order[row]])) for row in range(requests)]

    def simulate(confidence, bounds):
        by_row = [confidence[slot] for slot in order]
        return Simulation(by_row, case["units"], bounds, fixed, emitting, capacity, case["min_len"])

    def schedule(**policy):
        return schedule_prefixes(
            block_of(case["now"], case["tokens"], requests=requests),
            table_of(case["units"]),
            **anchored(requests),
            state_indices=ints(*slots),
            num_prefill_tokens=ints(*case["prefill"]),
            emits=torch.tensor(case["emits"]),
            max_len=ints(*case["max_len"]),
            max_rows=capacity,
            min_len=case["min_len"],
            **policy,
        )

    causal = schedule()
    assert causal.draft_lens.tolist() == simulate(case["now"], limits).causal()
    budget = schedule(policy="budget", budget=ints(case["budget"]))
    assert budget.draft_lens.tolist() == simulate(case["now"], limits).take(case["budget"])
    planned = schedule(policy="budget", stale_confidence=torch.tensor(case["stale"], dtype=torch.float32))
    number = simulate(case["stale"], caps).best_count()
    assert planned.draft_lens.tolist() == simulate(case["now"], limits).take(number)
    for layout in (causal, budget, planned):
        check_rows(layout, case, slots, capacity)


def check_rows(layout, case, slots, capacity):
    """Each row has its request, token and position; the logit rows of a request end at its last row."""
    lens, starts, logits = layout.draft_lens.tolist(), layout.query_start_loc.tolist(), layout.cu_num_logits.tolist()
    assert starts[0] == logits[0] == 0 and layout.num_rows.item() == starts[-1] <= capacity == len(layout.token_ids)
    for row, slot in enumerate(slots):
        mine = slice(starts[row], starts[row + 1])
        prefill, emits = case["prefill"][row], case["emits"][row]
        expected = [] if slot < 0 else [0] * prefill if prefill else [7000 + slot, *case["tokens"][slot][: lens[row]]]
        assert layout.token_ids[mine].tolist() == expected
        assert layout.positions[mine].tolist() == [10 * slot + 10 + i for i in range(len(expected))]
        assert (layout.batch_indices[mine] == row).all()
        count = 0 if slot < 0 or not emits else 1 if prefill else lens[row] + 1
        rows = layout.logits_indices[logits[row] : logits[row + 1]].tolist()
        assert rows == list(range(starts[row + 1] - count, starts[row + 1]))
    assert (layout.batch_indices[starts[-1] :] == -1).all() and (layout.token_ids[starts[-1] :] == 0).all()
    assert (layout.logits_indices[logits[-1] :] == 0).all()


# --- no anticipation ------------------------------------------------------------------------------


@settings(FEW, max_examples=300)
@given(batches(), st.data())
def test_admission_does_not_look_ahead(case, data):
    """What is drafted at position k or later changes nothing about whether positions 1..k are verified.

    c_{k+1} is the first confidence that knows draft k; later tokens may change too, missing ones included.
    """
    requests, drafts = len(case["order"]), len(case["now"][0])
    request, known = data.draw(st.integers(0, requests - 1)), data.draw(st.integers(1, drafts))
    changed = [list(row) for row in case["now"]]
    changed[request][known:] = [data.draw(confidences) for _ in range(drafts - known)]
    tokens = [list(row) for row in case["tokens"]]
    tokens[request][known:] = [data.draw(st.sampled_from([-1, 8, 9])) for _ in range(drafts - known)]

    rules = dict(min_len=case["min_len"], max_rows=requests + case["spare"], max_len=ints(*case["max_len"]))
    for policy in (
        dict(policy="causal"),
        dict(policy="causal", bypass=0.05),
        dict(policy="budget", budget=ints(case["budget"])),
        dict(policy="budget", stale_confidence=torch.tensor(case["stale"], dtype=torch.float32)),
    ):
        before = lengths(case["now"], case["units"], case["tokens"], **rules, **policy)
        after = lengths(changed, case["units"], tokens, **rules, **policy)
        assert min(before[request], known) == min(after[request], known), policy


def sequence_probs(target, draft, length_of):
    """Exact distribution of the first three tokens, alphabet {0, 1}: one round of the token rule with K = 2, then plain
    sampling.

    target, draft: prefix -> probability of token 0. length_of(x1, x2) -> number of drafts verified.
    """
    probs = {}

    def prob(source, prefix, token):
        return source[prefix] if token == 0 else 1 - source[prefix]

    def continue_from(prefix, weight):
        if weight == 0:
            return
        if len(prefix) == 3:
            probs[prefix] = probs.get(prefix, 0) + weight
            return
        for token in (0, 1):
            continue_from((*prefix, token), weight * prob(target, prefix, token))

    for drafts in itertools.product((0, 1), repeat=2):
        weight = prob(draft, (), drafts[0]) * prob(draft, drafts[:1], drafts[1])
        prefix = ()
        for token in drafts[: length_of(*drafts)]:
            p, q = prob(target, prefix, token), prob(draft, prefix, token)
            accept = min(Fraction(1), p / q)
            # With two tokens a rejected one leaves all of the residual to the other.
            continue_from((*prefix, 1 - token), weight * (1 - accept))
            weight *= accept
            prefix = (*prefix, token)
        continue_from(prefix, weight)
    return probs


def distance_from_target(target, draft, length_of):
    probs = sequence_probs(target, draft, length_of)
    plain = {}
    for tokens in itertools.product((0, 1), repeat=3):
        probability = Fraction(1)
        for i, token in enumerate(tokens):
            probability *= target[tokens[:i]] if token == 0 else 1 - target[tokens[:i]]
        plain[tokens] = probability
    return sum(abs(probs.get(tokens, 0) - probability) for tokens, probability in plain.items()) / 2


PREFIXES = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("policy", ["causal", "budget", "stale", "bypass"])
def test_emitted_distribution_is_the_targets(policy):
    """Of two requests the first is followed exactly; its c_2 depends on its first draft, as it may."""
    rng = random.Random(5)
    various, biased = 0, 0
    for _ in range(100):
        target = {prefix: Fraction(rng.randint(1, 9), 10) for prefix in PREFIXES}
        draft = {prefix: Fraction(rng.randint(1, 9), 10) for prefix in PREFIXES[:3]}
        first, second = rng.random(), (rng.choice([0.0, rng.random()]), 1.0)
        other = [rng.random(), rng.random()]
        units = [1000]
        for _ in range(5):
            units.append(units[-1] + rng.choice([0, 100, 300, 700, 900]))
        rules = {
            "causal": dict(),
            "bypass": dict(bypass=rng.choice([0.0, 0.5, 2.0])),
            "budget": dict(policy="budget", budget=ints(rng.randint(0, 4))),
            "stale": dict(policy="budget", stale_confidence=torch.rand(2, 2, generator=torch.Generator().manual_seed(7))),
        }[policy]

        def length_of(x1, x2, first=first, second=second, other=other, units=units, rules=rules):
            return lengths([[first, second[x1]], other], units, [[x1, x2], [0, 0]], **rules)[0]

        def looks_ahead(x1, x2, first=first, second=second, units=units):
            survival = [first, first * second[x1]]
            throughput = [(1 + sum(survival[:n])) / units[n] for n in range(3)]
            return throughput.index(max(throughput))

        various += len({length_of(x1, 0) for x1 in (0, 1)}) > 1
        biased += distance_from_target(target, draft, looks_ahead) > 0
        assert distance_from_target(target, draft, length_of) == 0
    assert biased > 0  # the same drafts, scheduled by the global maximum, are detected
    assert various > 0 or policy == "bypass"
