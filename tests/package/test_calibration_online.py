"""dspark_kernels.calibration.OnlineCalibration against a model of its ring."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dspark_kernels.calibration import (
    OnlineCalibration,
    fit_sts,
)
from dspark_kernels.types import ConfidenceHead
from tests.package.test_calibration import (
    EXCESS,
    cut_at_random,
    cut_by_confidence,
    errors,
    excess_on_held_out_rounds,
    generator_of,
    make_rounds,
    prefix,
)

# The online form


class Ring:
    """What the ring holds, by a deque: (logits, verified, accepted) of the last `window` rounds."""

    def __init__(self, drafts, window):
        self.drafts, self.rounds = drafts, collections.deque(maxlen=window)

    def update(self, logits, draft_lens, num_accepted, state_indices=None):
        for row, (length, accepted) in enumerate(zip(draft_lens.tolist(), num_accepted.tolist(), strict=True)):
            slot = row if state_indices is None else state_indices[row].item()
            if slot in range(len(logits)) and length > 0:
                length = min(length, self.drafts)
                score = logits[slot].tolist()
                if not any(math.isnan(x) for x in score[:length]):
                    self.rounds.append((score, length, min(max(accepted, 0), length)))

    def tensors(self):
        logits = torch.tensor([score for score, _, _ in self.rounds]).view(-1, self.drafts)
        lens, accepted = (torch.tensor([r[i] for r in self.rounds], dtype=torch.int64) for i in (1, 2))
        return logits, prefix(accepted, self.drafts), prefix(lens, self.drafts)


def same_rounds(have, want):
    """Equal, NaN where NaN is (it may be among drafts that were not verified)."""
    return all(torch.equal(a.nan_to_num(777.0), b.nan_to_num(777.0)) for a, b in zip(have, want, strict=True))


def make_step(generator, requests, slots, drafts, wild=True):
    """One step's arguments. Wild: padding, zero and impossible lengths, slots that do not exist, NaN."""
    random = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator, dtype=torch.int32)  # noqa: E731
    logits = torch.randn(slots, drafts, generator=generator)
    lens = random(-1 if wild else 0, drafts + (3 if wild else 1), requests)
    accepted = random(-1, drafts + 3, requests) if wild else torch.minimum(random(0, drafts + 1, requests), lens)
    indices = torch.randperm(slots, generator=generator)[:requests].int()
    if wild:
        logits[torch.rand(logits.shape, generator=generator) < 0.05] = float("nan")
        for value in (-1, slots, slots + 5, -7):
            indices[torch.rand(requests, generator=generator) < 0.1] = value
    return logits, lens, accepted, indices


@pytest.mark.parametrize("window", [1, 5, 50])
@pytest.mark.parametrize("drafts", [1, 7])
@pytest.mark.parametrize("wild", [False, True])
def test_the_window_holds_the_last_rounds(window, drafts, wild):
    generator = generator_of(window * drafts)
    online, ring = OnlineCalibration(drafts, window, "cpu"), Ring(drafts, window)
    held, places = online.bytes, {name: x.data_ptr() for name, x in vars(online).items() if torch.is_tensor(x)}
    assert held == sum(x.nbytes for x in vars(online).values() if torch.is_tensor(x))
    assert held <= (window + 1) * (4 * drafts + 8) + 8 + 8 * drafts
    assert online.rounds()[0].shape == (0, drafts)
    full = 0
    # A step of 13 requests into a window of 5 overwrites itself; 0 requests is a step too.
    for requests in (3, 0, 1, 13, 2, 7, 13, 13, 5, 1, 13, 4, 13) * 3:
        arguments = make_step(generator, requests, requests + 2, drafts, wild)
        if requests % 2:
            online.update(*arguments)
            ring.update(*arguments)
        else:
            # Without state_indices row i is slot i; int64 lengths are as good.
            arguments = (arguments[0][:requests], arguments[1].long(), arguments[2].long())
            online.update(*arguments)
            ring.update(*arguments)
        assert same_rounds(online.rounds(), ring.tensors()), requests
        full += len(ring.rounds) == window
        if ring.rounds:
            logits, survived, observed = ring.tensors()
            fitted = online.fit(min_rounds=1)
            want = fit_sts(logits, survived, observed=observed)
            never = ~observed.any(0)
            assert torch.equal(fitted[~never], want[~never])
    assert full > 3, "the ring never wrapped around"
    assert online.bytes == held
    assert places == {name: x.data_ptr() for name, x in vars(online).items() if torch.is_tensor(x)}


def test_padding_and_requests_without_drafts_record_nothing():
    online = OnlineCalibration(3, 4, "cpu")
    logits = torch.arange(15.0).view(5, 3)
    lens, accepted = torch.tensor([2, 3, 0, 1], dtype=torch.int32), torch.tensor([2, 1, 0, 0], dtype=torch.int32)
    online.update(logits, lens, accepted, torch.tensor([4, -1, 0, 2], dtype=torch.int32))
    assert online.rounds()[0].tolist() == [[12, 13, 14], [6, 7, 8]]
    assert online.rounds()[1].tolist() == [[True, True, False], [False, False, False]]
    assert online.rounds()[2].tolist() == [[True, True, False], [True, False, False]]
    for nothing in (
        (logits, lens, accepted, torch.full((4,), -1, dtype=torch.int32)),
        (logits[:4], torch.zeros_like(lens), accepted),
        (logits.fill_(float("nan"))[:4], lens, accepted),
    ):
        online.update(*nothing)
        assert online.rounds()[0].tolist() == [[12, 13, 14], [6, 7, 8]]


class Seen(TorchDispatchMode):
    """Names of the operators that ran, and the rows that index_copy_ wrote."""

    def __init__(self):
        super().__init__()
        self.names, self.rows = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        self.names.add(name)
        if name == "index_copy_":
            self.rows.append(args[2])
        return function(*args, **(kwargs or {}))


def test_no_two_rounds_of_a_step_go_to_one_row():
    """A GPU writes the rows of an index_copy_ in any order, and the logits of one round would meet the lengths of another."""
    online, generator = OnlineCalibration(2, 5, "cpu"), generator_of(1)
    for requests in (3, 13, 4, 13, 6):
        with Seen() as seen:
            step = make_step(generator, requests, requests, 2, wild=False)
            online.update(*step)
        logits, lengths = (rows.tolist() for rows in seen.rows)
        kept = [row for row in logits if row != 5]
        assert logits == lengths and len(set(kept)) == len(kept) == min(5, int((step[1] > 0).sum()))
        assert set(kept) <= set(range(5)) and (requests < 13 or (step[1] > 0).sum() > 5)


# Operators that read a device value on the host, or whose result has a size that only the device knows.
WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique2", "bincount"}


def test_update_does_not_wait_for_the_device(monkeypatch):
    generator = generator_of(0)
    step = make_step(generator, 5, 9, 7)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name, **k: pytest.fail(f"update called Tensor.{name}"))
    for indices in (step[3], None):
        arguments = step[0] if indices is not None else step[0][:5], *step[1:3], indices
        with Seen() as seen:
            OnlineCalibration(7, 20, "cpu").update(*arguments)
        assert "index_copy_" in seen.names and not seen.names & WAITING, seen.names & WAITING
        # Meta tensors hold no values at all: what needs one fails.
        OnlineCalibration(7, 20, "meta").update(*(None if a is None else a.to("meta") for a in arguments))


def test_the_same_operators_run_whatever_the_values():
    """No branch on the device's values, so what a graph captured is right for every step."""
    seen = []
    for seed in range(3):
        online = OnlineCalibration(4, 6, "cpu")
        with Seen() as mode:
            online.update(*make_step(generator_of(seed), 8, 8, 4))
        seen.append(mode.names)
    assert seen[0] == seen[1] == seen[2] and not seen[0] & WAITING


@pytest.mark.gpu
def test_update_in_a_graph(device):
    online, ring = OnlineCalibration(7, 20, device), Ring(7, 20)
    generator = generator_of(0)
    static = [x.to(device) for x in make_step(generator, 5, 9, 7)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        OnlineCalibration(7, 20, device).update(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        online.update(*static)
    for _ in range(9):
        step = make_step(generator, 5, 9, 7)
        for place, fresh in zip(static, step, strict=True):
            place.copy_(fresh)
        graph.replay()
        ring.update(*step)
        assert same_rounds(online.rounds(), ring.tensors())


def feed(online, logits, survived, lens):
    """Rounds in steps of 64 requests, as an engine would: accepted lengths instead of survival."""
    accepted = torch.minimum(survived.sum(1), lens)
    for part in zip(logits.split(64), lens.split(64), accepted.split(64), strict=True):
        online.update(*part)


def test_fit_equals_fit_sts_and_keeps_what_it_saw_too_rarely():
    logits, survived = make_rounds(3000, seed=6)
    lens = cut_at_random(logits)
    start = torch.tensor([1.5, 1.0, 3.0, 0.5, 7.0])
    online = OnlineCalibration(5, 4096, "cpu", start)
    start.zero_()  # the object holds its own copy
    assert online.temperatures.tolist() == [1.5, 1.0, 3.0, 0.5, 7.0]
    feed(online, logits, survived, lens)
    recorded = lens > 0
    verified = prefix(lens, 5)
    want = fit_sts(logits[recorded], survived[recorded], observed=verified[recorded])
    counts = verified.sum(0)
    with pytest.raises(ValueError, match="min_rounds"):
        online.fit(min_rounds=4097)
    assert torch.equal(online.fit(min_rounds=4096), online.temperatures) and online.temperatures[4] == 7.0
    # Exactly as many as asked for are enough, one fewer are not.
    fitted = online.fit(min_rounds=int(counts[2]))
    assert torch.equal(fitted[:3], want[:3]) and fitted[3:].tolist() == [0.5, 7.0]
    assert online.fit(min_rounds=int(counts[2]) + 1)[2] == want[2], "the last fit stays"
    fitted = online.fit(min_rounds=1)
    assert torch.equal(fitted, want)
    fitted.zero_()
    assert torch.equal(online.temperatures, want), "a caller's writes do not reach the object"
    # The bins are passed on.
    coarse = fit_sts(logits[recorded], survived[recorded], observed=verified[recorded], bins=3)
    assert torch.equal(online.fit(bins=3, min_rounds=1), coarse) and not torch.equal(coarse, want)


def test_accepted_lengths_of_cut_rounds_recalibrate():
    logits, survived = make_rounds(60000, seed=9)
    online = OnlineCalibration(5, 60000, "cpu")
    feed(online, logits, survived, cut_by_confidence(logits))
    assert excess_on_held_out_rounds(online.temperatures, cut_by_confidence) > 5 * EXCESS
    assert excess_on_held_out_rounds(online.fit(), cut_by_confidence) < EXCESS


def test_the_window_forgets():
    window, old, new = 16384, (0.5, 3.0), (3.0, 0.5)
    online = OnlineCalibration(2, window, "cpu")
    lens = torch.full((window,), 2)
    feed(online, *make_rounds(window, 0, old), lens)
    assert torch.equal(online.fit(), fit_sts(*make_rounds(window, 0, old)))
    fresh = make_rounds(window, 1, new)
    feed(online, *(x[:8000] for x in fresh), lens[:8000])
    between = online.fit()
    feed(online, *(x[8000:] for x in fresh), lens[8000:])
    after = online.fit()
    assert torch.equal(after, fit_sts(*fresh)), "nothing of the old rounds is left"
    held_out = make_rounds(20000, 2, new)
    assert max(errors(*held_out, after)) < 0.02 and max(errors(*held_out, between)) > 0.05


def test_apply_writes_in_place():
    head = ConfidenceHead(torch.zeros(8), None, torch.full((5,), 9.0))
    online = OnlineCalibration(5, 4096, "cpu")
    feed(online, *make_rounds(4096, seed=11), torch.full((4096,), 5))
    place = head.sts_temperatures.data_ptr()
    online.apply(head.sts_temperatures)
    assert head.sts_temperatures.tolist() == [1.0] * 5, "before the first fit: no scaling"
    fitted = online.fit()
    assert (fitted != 1).all() and head.sts_temperatures.tolist() == [1.0] * 5
    online.apply(head.sts_temperatures)
    assert torch.equal(head.sts_temperatures, fitted) and head.sts_temperatures.data_ptr() == place
    online.apply(torch.nn.Parameter(torch.ones(5)))  # a weight of a module: no gradient in the way
