"""The load simulator, `python -m bench.load`: a simulation by hand, its random numbers, policies, rounds, files and refusals."""

import csv
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.load import __main__ as job, report, simulation
from bench.shared import acceptance, roofline
from dspark_kernels.types import CostTable

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
ALL = ("none", *(f"fixed-{k}" for k in range(1, 8)), "threshold-0.3", "causal", "causal-convex", "budget")


def table_of(times, draft=None):
    """In ms: entry B = times[B]; drafting takes `draft` for any number of requests."""
    steps = 1e-3 * torch.tensor(times, dtype=torch.float32)
    return CostTable(steps, None if draft is None else torch.full((2,), 1e-3 * draft))


def flat(draft=0.25):
    return table_of([1.0] * 100, draft)


def steep(draft=0.25):
    return table_of([1.0 * n for n in range(100)], draft)


@pytest.fixture(scope="module")
def source():
    """Two made-up domains of 7 drafts: easy rounds accept much and know it."""
    random = torch.Generator().manual_seed(1)
    domains = []
    for level in (0.9, 0.5):
        confidence = (level + 0.2 * torch.rand(50, 7, generator=random) - 0.1).float()
        accepted = (torch.rand(50, 7, generator=random) < confidence).int().cumprod(1).sum(1)
        domains.append((confidence, accepted))
    return simulation.Source.of(domains)


def simulated(name, source, table, steps=60, requests=4, bypass=None, mean_tokens=20.0, seed=3):
    draws = simulation.Draws.of(seed, steps, requests, 0.5, mean_tokens)
    return simulation.simulate(simulation.policy_of(name, bypass), source, draws, table, warm=0)


# --- the simulation ---------------------------------------------------------------------------------------------------


def by_hand():
    """Three rounds of one domain, drawn in turn by two slots; the second slot's request ends after its first step."""
    confidence = torch.tensor([[0.9, 0.9, 0.2], [0.9, 0.1, 0.9], [0.3, 0.9, 0.9]])
    accepted = torch.tensor([3, 1, 0])
    other = torch.full((1, 3), 0.9), torch.tensor([2])
    source = simulation.Source.of([(confidence, accepted), other])
    pick = np.array([[0.0, 0.4], [0.4, 0.99], [0.7, 0.5]])  # rounds 0 1, 1 and the other domain's, 2 and the other domain's
    draws = simulation.Draws(pick, np.array([[0, 0], [0, 1]]), np.array([[99, 99], [1, 99]]))
    return source, draws


@pytest.mark.parametrize(
    "name, tokens, verified",
    [
        ("none", [2, 2, 2], [0, 0, 0]),
        ("fixed-1", [4, 4, 3], [2, 2, 2]),
        ("fixed-2", [5, 5, 4], [4, 4, 4]),
        ("fixed-3", [6, 5, 4], [6, 6, 6]),
        ("threshold-0.5", [5, 5, 4], [3, 4, 3]),
    ],
)
def test_a_simulation_by_hand(name, tokens, verified):
    """Emitted min(accepted, length) + 1; seconds by rows, and drafting unless nothing is ever drafted."""
    source, draws = by_hand()
    table = table_of([0.0, *(0.5 + n / 8 for n in range(1, 20))], draft=0.25)
    run = simulation.simulate(simulation.policy_of(name, None), source, draws, table, warm=0)
    assert run.tokens.tolist() == tokens and run.verified.tolist() == verified
    drafting = 0.0 if name == "none" else 0.25
    assert np.allclose(run.seconds, [1e-3 * (0.5 + (2 + v) / 8 + drafting) for v in verified], rtol=0, atol=1e-9)
    speed = sum(tokens) / run.seconds.sum()
    (row,) = report.records([run])
    assert math.isclose(row["tokens_per_second"], speed) and math.isclose(row["tokens_per_second_per_user"], speed / 2)
    assert math.isclose(row["tokens_per_round"], sum(tokens) / 6) and math.isclose(row["verified_per_round"], sum(verified) / 6)
    assert math.isclose(row["rows_per_step"], 2 + sum(verified) / 3) and math.isclose(row["ms_per_step"], 1e3 * run.seconds.mean())


def test_warm_steps_are_run_and_not_counted(source):
    draws = simulation.Draws.of(0, 30, 3, 0.5, 10.0)
    whole, late = (simulation.simulate(simulation.policy_of("budget", None), source, draws, flat(), warm=warm) for warm in (0, 10))
    assert late.tokens.tolist() == whole.tokens[10:].tolist() and len(late.seconds) == 20


def test_every_policy_meets_the_same_random_numbers(source):
    """The whole block twice over, under two names: every number is the same."""
    one, other = (simulated(name, source, steep()) for name in ("fixed-7", "threshold-0"))
    for field in ("tokens", "seconds", "verified"):
        assert getattr(one, field).tolist() == getattr(other, field).tolist()
    assert one.tokens.std() > 0
    assert simulated("fixed-7", source, steep(), seed=4).tokens.tolist() != one.tokens.tolist()
    # A longer block accepts at least as much of the same rounds. (Requests that never end: the slots stay in step.)
    series = [simulated(f"fixed-{k}", source, steep(), mean_tokens=1e9).tokens for k in range(1, 8)]
    assert all((a <= b).all() for a, b in itertools.pairwise(series)) and (series[0] < series[-1]).any()


def test_requests_end_and_the_mix_is_kept():
    """Half of the requests are easy, but the hard ones stay longer: of the rounds, more than half are theirs."""
    sure, never = (torch.full((1, 7), 0.9), torch.tensor([3])), (torch.full((1, 7), 0.9), torch.tensor([0]))
    source = simulation.Source.of([sure, never])
    run = simulated("fixed-7", source, flat(), steps=4000, requests=8, mean_tokens=40.0)
    share = (run.tokens_per_round[0] - 1) / 3  # of rounds that are easy
    assert abs(share - 0.2) < 0.03  # an easy request takes 10 rounds, a hard one 40
    assert simulated("fixed-7", source, flat(), mean_tokens=1e9, steps=9).tokens.std() == 0


@pytest.mark.parametrize("name", ["causal", "causal-convex", "budget"])
def test_where_rows_are_free_everything_is_verified(source, name):
    whole, have = (simulated(n, source, flat()) for n in ("fixed-7", name))
    assert have.tokens.tolist() == whole.tokens.tolist() and have.seconds.tolist() == whole.seconds.tolist()


@pytest.mark.parametrize("name", ["causal", "causal-convex", "budget"])
def test_where_rows_are_dear_nothing_is_verified(source, name):
    """It costs what no speculation costs, and drafting."""
    # Drafting costs next to nothing here: where it is dear, a draft may well pay although rows cost in proportion.
    plain, have = (simulated(n, source, steep(draft=1e-3), mean_tokens=1e9) for n in ("none", name))
    first = simulation.LAG if name == "budget" else 0  # new requests are verified as if they were sure
    assert have.verified[first:].sum() == 0 and have.tokens[first:].tolist() == plain.tokens[first:].tolist()
    assert np.allclose((have.seconds - plain.seconds)[first:], 1e-6, rtol=0, atol=1e-10)


def test_a_bypass_verifies_everything_where_that_is_cheap(source):
    """Rows cost 1 % each: 28 more than 4 are worth 28 % more, and the last of them does not pay by itself."""
    table = table_of([1.0 + n / 100 for n in range(40)])
    careful, bold, shy = (simulated("causal", source, table, bypass=b) for b in (None, 0.3, 0.2))
    assert bold.verified.tolist() == [28] * 60 and careful.verified.mean() < 28 == bold.verified.mean()
    assert shy.verified.tolist() == careful.verified.tolist()


# --- policies ---------------------------------------------------------------------------------------------------------


def test_a_budget_reads_rounds_two_old_and_forgets_with_the_request(monkeypatch):
    """Step t plans with the confidences of step t - 2; where a request came since, with 1 for two steps."""
    seen, plan = [], simulation.plan_budget
    monkeypatch.setattr(simulation, "plan_budget", lambda stale, *a, **k: (seen.append(stale.clone()), plan(stale, *a, **k))[1])
    policy = simulation.Budget()
    policy.start(3, 7, flat())
    policy.reset([0, 1, 2])
    rounds = [torch.full((3, 7), 0.1 * (t + 1)) for t in range(7)]
    for t, confidence in enumerate(rounds):
        if t == 4:
            policy.reset([1])
        policy.lengths(confidence)
    sure = torch.ones(7)
    for t, stale in enumerate(seen):
        for slot in range(3):
            fresh = t < 2 or (slot == 1 and t in (4, 5))
            assert torch.equal(stale[slot], sure if fresh else rounds[t - 2][slot]), (t, slot)


def test_a_simulation_tells_the_policy_who_came():
    """The second slot's request ends in the first step; both slots are new before it."""
    source, draws = by_hand()
    policy, told = simulation.Fixed(1), []
    policy.reset = told.append
    simulation.simulate(policy, source, draws, flat(), warm=0)
    assert told == [[0, 1], [1]]


def test_the_convex_curve_below_a_staircase():
    stairs = CostTable(torch.tensor([9.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 6.0, 6.0, 8.0]) / 8)

    def eighths(first):
        return (8 * simulation.convex_below(stairs, first).seconds).tolist()

    assert eighths(1) == [9.0, 1.0, 1.0, 1.25, 1.5, 1.75, 2.0, 4.0, 6.0, 8.0]
    # From the anchors on: what is cheaper for fewer requests is of no account.
    assert eighths(5) == [9.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 4.0, 6.0, 8.0]
    assert simulation.convex_below(stairs, 20) is stairs  # nothing measured there


def test_a_convex_curve_is_not_stopped_by_the_edge_of_a_graph(source):
    """4 anchors fill a graph; the next one holds 32 rows and costs 10 % more, which no single draft is worth."""
    stairs = table_of([1.0] * 5 + [1.3] * 28)
    stopped, have, best = (simulated(name, source, stairs) for name in ("causal", "causal-convex", "fixed-7"))
    assert stopped.verified.sum() == 0 and have.verified.mean() > 14
    assert have.gain_over(stopped)[0] > 50 and best.gain_over(stopped)[0] > 50


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_standard_errors():
    """Of a mean the jackknife is the textbook's; of a ratio to itself it is nothing."""
    values = np.random.default_rng(0).normal(5, 2, 30)
    mean, error = simulation.jackknife(lambda total, count: total / count, values, np.ones(30))
    assert math.isclose(mean, values.mean()) and math.isclose(error, values.std(ddof=1) / math.sqrt(30))
    assert simulation.jackknife(lambda a, b: a / b, values, values)[1] == 0
    assert math.isnan(simulation.jackknife(lambda a: a, np.ones(1))[1])


def run_of(policy, requests, tokens, seconds):
    tokens, seconds = (np.array([x, x], dtype=np.float64) for x in (tokens, seconds))
    return simulation.Run(policy, requests, tokens, seconds, np.zeros(2, dtype=np.int64))


def test_sentences_by_hand():
    runs = [
        run_of("none", 1, 10, 1), run_of("fixed-1", 1, 20, 1), run_of("fixed-2", 1, 25, 1), run_of("causal", 1, 24, 1),
        run_of("budget", 1, 25, 1), run_of("budget", 64, 80, 1),
        run_of("none", 64, 90, 1), run_of("fixed-1", 64, 80, 1), run_of("fixed-2", 64, 50, 1), run_of("causal", 64, 100, 1),
        run_of("threshold-0.3", 64, 50, 1), run_of("threshold-0.5", 64, 75, 1),
    ]  # fmt: skip
    assert report.sentences(runs) == [
        "At 64 requests causal: +25.0 ±0.0 % against the best fixed K (fixed-1), +100.0 ±0.0 % against 2 drafts always, "
        "+33.3 ±0.0 % against the best static threshold (threshold-0.5), +11.1 ±0.0 % against no speculation.",
        "At 64 requests budget: +0.0 ±0.0 % against the best fixed K (fixed-1), +60.0 ±0.0 % against 2 drafts always, "
        "+6.7 ±0.0 % against the best static threshold (threshold-0.5), -11.1 ±0.0 % against no speculation.",
        "At 1 request the largest loss of scheduling is causal at 1 against fixed-2, -4.00 ±0.00 %.",
    ]
    assert [row["best"] for row in report.records(runs)] == [0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0]


def test_the_model_of_a_gpu_by_hand():
    """Few rows: weights once, 8.04 GB at 4.3 TB/s, and 540 us between kernels. Many: 2 x 4.02e9 x rows / 593 TFLOP/s."""
    model = roofline.Decoder()
    assert abs(model.parameters - 4.02e9) < 0.01e9  # the model card's 4.0 billion
    assert math.isclose(roofline.target_seconds(1, 1, 0), 8.0445e9 / 4.3e12 + 540e-6, rel_tol=1e-3)
    steep = (roofline.target_seconds(4000, 1, 0) - roofline.target_seconds(2000, 1, 0)) / 2000
    assert math.isclose(steep, 2 * model.parameters / (0.6 * 989e12) + 2 * 2 * 151936 / 4.3e12, rel_tol=1e-3)
    # A token of context is 2 x 36 layers x 8 heads x 128 numbers of 2 bytes.
    more = roofline.target_seconds(1, 10, 1000) - roofline.target_seconds(1, 10, 0)
    assert math.isclose(more, 10 * 1000 * 147456 / 4.3e12, rel_tol=1e-6)
    # Drafting streams 5 layers and the head once, and W2 7 times.
    floor = 2 * (5 * model.layer_parameters + 151936 * 2560 + 7 * 151936 * 256) / 4.3e12
    assert floor < roofline.draft_seconds(1, 0) < 1.3 * floor
    table = roofline.table(2, 64)
    assert len(table.seconds) == 514 and table.seconds[9] == table.seconds[16] and table.info["modelled"]
    assert float(table.seconds[513]) > float(table.seconds[512])


# --- measured rounds --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    return acceptance.load()


def test_the_committed_rounds_are_what_the_settings_say(committed):
    rounds, recorded = committed
    assert recorded == acceptance.settings() and list(rounds) == list(acceptance.DOMAINS)
    assert acceptance.FILE.stat().st_size < 200_000
    for domain, found in rounds.items():
        assert len(found) >= 600 and found.drafts == 7
        assert (
            sorted(set(found.prompt.tolist())) == list(range(len(acceptance.texts(domain)))) and len(acceptance.texts(domain)) >= 16
        )
    assert rounds["code"].tokens_per_round > rounds["foreign"].tokens_per_round + 0.3  # easy and hard


@pytest.mark.parametrize("domain, prompt", [("code", 3), ("foreign", 20)])
def test_the_committed_rounds_can_be_measured_again(committed, domain, prompt):
    found = committed[0][domain]
    want, have = found.where(found.prompt == prompt), acceptance.measure(domain, [prompt])
    assert have.accepted.tolist() == want.accepted.tolist() and have.prompt.tolist() == want.prompt.tolist()
    assert torch.allclose(have.logits, want.logits, rtol=0, atol=2e-3)  # stored with 3 digits


def test_rounds_survive_a_file(committed, tmp_path):
    rounds, recorded = committed
    acceptance.save(tmp_path / "rounds.json", rounds, recorded)
    assert (tmp_path / "rounds.json").read_bytes() == acceptance.FILE.read_bytes()


def test_calibration_is_fitted_on_other_texts(committed):
    rounds = {name: committed[0][name] for name in ("code", "foreign")}
    held_out, temperatures = acceptance.calibrate(rounds)
    for name, found in rounds.items():
        odd = found.where(found.prompt % 2 == 1)
        assert held_out[name].accepted.tolist() == odd.accepted.tolist()
        assert torch.allclose(held_out[name].confidence, (odd.logits / temperatures).sigmoid())
        # What is held out has no part in the fit.
        changed = dict(rounds)
        moved = torch.where((found.prompt % 2 == 1)[:, None], -found.logits, found.logits)
        changed[name] = acceptance.Rounds(moved, found.accepted, found.prompt)
        assert torch.equal(acceptance.calibrate(changed)[1], temperatures)
    assert sum(h.after for h in held_out.values()) < sum(h.before for h in held_out.values())


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A short run of the command, in its own process."""
    folder = tmp_path_factory.mktemp("load")
    files = [str(folder / name) for name in ("load.csv", "load.png", "load.svg")]
    command = [sys.executable, "-m", "bench.load", "--concurrency", "1,8", "--rounds", "40", "--threshold", "0.3"]
    command += ["--out", files[0], "--plot", files[1], "--plot", files[2]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, folder


def test_the_table_and_its_sentences(ran):
    text = ran[0].stdout
    assert ran[0].stderr == "", "a progress bar where nobody watches"
    assert "MODELLED, not measured" in text and "TB/s" in text and "TFLOP/s" in text and text.count("before calibration") == 2
    blocks = text.split("\n1 request\n")[1].split("\n8 requests\n")
    for block in (blocks[0], blocks[1].split("\n\n")[0]):
        assert [line.split()[0] for line in block.strip().splitlines()] == list(ALL) and "*" in block
    assert all(name in text for name, _ in report.COLUMNS)
    assert re.search(r"At 8 requests budget: [+-][\d.]+ ±[\d.]+ % against the best fixed K \(fixed-\d\)", text)
    assert re.search(r"At 1 and 8 requests (the largest loss of )?scheduling", text)


def test_files_are_written(ran):
    rows = list(csv.DictReader((ran[1] / "load.csv").open()))
    assert [row["policy"] for row in rows] == [*ALL, *ALL] and tuple(rows[0]) == report.FIELDS
    assert {row["concurrency"] for row in rows} == {"1", "8"} and {row["steps"] for row in rows} == {"40"}
    assert (ran[1] / "load.png").read_bytes().startswith(b"\x89PNG")
    picture = (ran[1] / "load.svg").read_text()
    assert picture.lstrip().startswith("<?xml") and "<svg" in picture


def test_curves_differ_without_colour():
    styles = report._styles([*ALL, "threshold-0.5", "threshold-0.7"])
    assert len({s["marker"] for s in styles.values()}) == len(styles) == len(ALL) + 2
    scheduled = [style for name, style in styles.items() if not name.startswith("fixed-")]
    assert len({str(style["linestyle"]) for style in scheduled}) == len(scheduled)


def test_the_same_runs_give_the_same_picture(tmp_path):
    runs = [run_of(name, n, 10 * n, 1) for n in (1, 2) for name in ("none", "fixed-1", "causal")]
    for name in ("a.svg", "b.svg"):
        report.plot(runs, tmp_path / name, "title")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_matplotlib_is_asked_for_by_name(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["--concurrency", "1", "--rounds", "2", "--policies", "none", "--plot", str(tmp_path / "x.png")]
    assert job.main(arguments) == 2
    assert capsys.readouterr().err == "bench.load: --plot: plotting needs matplotlib: pip install dspark_kernels[plots]\n"


def test_a_supplied_table(tmp_path, capsys):
    file = tmp_path / "cost.json"
    table_of([1.0 * n for n in range(20)]).save(file)
    arguments = ["--cost", str(file), "--concurrency", "2", "--rounds", "20", "--policies", "none,fixed-2,causal"]
    assert job.main(arguments) == 0
    text = capsys.readouterr().out
    assert "drafts are free here" in text and "MODELLED" not in text
    assert re.search(r"^none +1000 ±0\*", text, re.M), text  # two tokens in 2 ms


# --- the committed results --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    return list(csv.DictReader((RESULTS / "load.csv").open()))


def speed(results, policy, requests):
    (row,) = [r for r in results if r["policy"] == policy and r["concurrency"] == str(requests)]
    return float(row["tokens_per_second"])


def fixed(results, requests):
    return max(speed(results, f"fixed-{k}", requests) for k in range(1, 8))


def test_committed_results_are_those_of_a_run_now(results, tmp_path, capsys):
    assert {row["concurrency"] for row in results} == {str(n) for n in job.CONCURRENCY}
    assert all(row["steps"] == str(simulation.steps_for(int(row["concurrency"]))) for row in results)
    file = tmp_path / "load.csv"
    assert job.main(["--concurrency", "256", "--csv", str(file)]) == 0
    assert list(csv.DictReader(file.open())) == [row for row in results if row["concurrency"] == "256"]
    assert {path.name for path in RESULTS.glob("load.*")} == {"load.csv", "load.png", "load.svg"}


@pytest.mark.parametrize("name", ["causal", "causal-convex", "budget"])
def test_scheduling_does_not_lose_at_low_load(results, name):
    for requests in (1, 2, 4, 8, 16):
        assert speed(results, name, requests) > 0.998 * fixed(results, requests), requests


@pytest.mark.parametrize("name", ["causal-convex", "budget"])
def test_scheduling_wins_at_high_load(results, name):
    """Against every fixed length and threshold. Not against no speculation: drafts that nobody verifies are paid for, too."""
    for requests in (64, 128, 256, 512):
        have = speed(results, name, requests)
        assert have > 1.005 * fixed(results, requests)
        assert have > 1.03 * max(speed(results, f"threshold-{t:g}", requests) for t in job.THRESHOLDS)
        assert have > 1.4 * speed(results, "fixed-7", requests) or requests == 64
    assert speed(results, "none", 512) > speed(results, name, 512)


def test_causal_stops_at_the_edge_of_a_graph(results):
    """Known: 128 and 256 anchors fill a captured size, and no single draft is worth the next one."""
    for requests in (128, 256):
        assert speed(results, "causal", requests) < 0.8 * fixed(results, requests)
    assert speed(results, "causal", 512) > 1.01 * fixed(results, 512)  # beyond the largest graph nothing is padded


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--concurrency", "0,4"], "--concurrency: expected numbers from 1 to 4096, got 0 to 4"),
        (["--concurrency", "a"], "--concurrency: expected whole numbers"),
        (["--mix", "1.5"], "--mix: expected a number from 0 to 1"),
        (["--mix", "nan"], "--mix: expected a number from 0 to 1"),
        (["--domains", "code"], "--domains: expected two of code, prose, foreign"),
        (["--domains", "code,poetry"], "--domains: expected two of code, prose, foreign"),
        (["--mean-tokens", "0"], "--mean-tokens: expected a number of at least 1"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--seed", "-1"], "--seed: expected a number from 0"),
        (["--policies", "causal,magic"], "--policies: expected names among none, fixed"),
        (["--policies", "fixed-8"], "--policies: expected names among none, fixed"),
        (["--threshold", "2"], "--threshold: expected a number from 0 to 1"),
        (["--bypass", "-0.1"], "--bypass: expected a number from 0"),
        (["--context", "-1"], "--context: expected a number from 0"),
        (["--cost", "/nowhere.json"], "--cost: "),
        (["--cost", "x", "--measure-cost"], "--cost: expected without --measure-cost"),
        (["--save-cost", "x"], "--save-cost: expected together with --measure-cost"),
        (["--acceptance", "/nowhere.json"], "--acceptance: /nowhere.json: No such file"),
        (["--csv", "/nowhere/load.csv"], "--out: expected a file in a folder that exists"),
        (["--plot", "load.pdf"], "--plot: expected a name that ends in .png or .svg"),
        (["--plot", "/nowhere/load.png"], "--plot: expected a file in a folder that exists"),
    ],
)
def test_bad_arguments_take_one_line(arguments, message, capsys):
    assert job.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"bench.load: {message}") and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "expected JSON"),
        ("[]", "expected 'dspark_kernels rounds'"),
        ({"domains": {}}, "domains: expected at least one"),
        ({"domains": {"code": [[0, 1, 0.5], [0, 1]]}}, "code: expected rows of text, accepted and at least one logit"),
        ({"domains": {"code": [[0, 2, 0.5]]}}, "code: expected finite logits and accepted from 0 to 1"),
        ({"domains": {"code": [[0, 1, 0.5]], "foreign": [[0, 1, 0.5, 0.5]]}}, "expected as many logits per round"),
        ({"domains": {"code": [[0, 1, 0.5]], "foreign": [[0, 1, 0.5]]}}, "code: expected rounds of texts with even and with odd"),
    ],
)
def test_bad_rounds_take_one_line(content, message, tmp_path, capsys):
    file = tmp_path / "rounds.json"
    head = {"format": acceptance.FORMAT, "version": acceptance.VERSION}
    file.write_text(content if isinstance(content, str) else json.dumps(head | content))
    assert job.main(["--acceptance", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench.load: --acceptance: {file}: ") and message in error and error.count("\n") == 1


def test_steps_that_no_table_can_tell_are_refused(tmp_path, capsys):
    file = tmp_path / "cost.json"
    table_of([80.0 * n for n in range(20)]).save(file)  # up to 1.52 s; a step has up to 32 rows
    assert job.main(["--cost", str(file), "--concurrency", "4", "--rounds", "2"]) == 2
    assert "--concurrency: expected steps below 1.68 s" in capsys.readouterr().err


def test_a_cost_file_in_milliseconds_is_refused(tmp_path, capsys):
    file = tmp_path / "cost.json"
    table_of([2.0] * 4).save(file)
    file.write_text(file.read_text().replace(str(float(torch.tensor(2e-3))), "2.0"))
    assert job.main(["--cost", str(file), "--concurrency", "4", "--rounds", "2"]) == 2
    error = capsys.readouterr().err
    assert "--cost" in error and "seconds[1]" in error and "2 seconds; did you give milliseconds?" in error


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        job.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--concurrency --mix --domains --mean-tokens --rounds --seed --policies --threshold --bypass --cost --measure-cost "
        "--save-cost --context --no-graphs --acceptance --measure-rounds --csv --plot"
    ).split():
        assert option in text
    for name, _ in report.COLUMNS:
        assert name in text
