"""bench.kernels: costs by hand, the check before timing, timing with a fake clock, report and command."""

import csv
import dataclasses
import math

import pytest
import torch

import dspark_kernels as dk
from bench.kernels import __main__ as job, report, work
from bench.shared import baselines, measure, paths, timing
from bench.shared.cases import layout as lc
from bench.shared.cases.accept import Accept
from bench.shared.cases.case import Target
from bench.shared.cases.draft import Draft
from bench.shared.cases.registry import registry
from bench.shared.cases.tensors import nbytes
from reference import schedule

CPU = torch.device("cpu")
CASES = {f"{case.op} {case.name}": case for case in registry()}

pytest.importorskip("triton")


# --- costs ------------------------------------------------------------------------------------------------------------


def test_costs_of_a_draft_block_by_hand():
    spec = Draft(1, drafts=2, vocab=10, rank=4, hidden=3)
    read = 40 + 8 + 8 + 160 + 16  # logits, anchor, position, W2 twice, rows of W1
    read += 12 + 14 + 2 + 8 + 4 + 8  # hidden, w, b, T_k; temperature, seed
    written = 16 + 4 + 16 + 40 + 8  # drafts, flags, confidences, logits, lse
    assert spec.bytes == read + written
    assert spec.flops == 20 * (2 * 4 + 1) + 2 * 2 * 7 + 20 * 4
    assert spec.instructions == 20 * 103
    greedy = dataclasses.replace(spec, sampled=False)
    assert greedy.bytes == spec.bytes - 40 - 8 - 12 and greedy.instructions == 0
    assert dataclasses.replace(spec, rank=0).bytes == 40 + 8 + 8 + 4 + 8 + 16 + 4 + 40 + 8
    gated, rnn = (dataclasses.replace(spec, kind=kind) for kind in ("gated", "rnn"))
    assert gated.bytes == spec.bytes + 2 * 4 * (7 + 1) and gated.flops == spec.flops + 2 * 2 * 7 * 4
    assert rnn.bytes == spec.bytes + 2 * 12 * (11 + 1) + 4 * 4 and rnn.flops == spec.flops + 2 * 2 * 11 * 12
    int8, filtered = dataclasses.replace(spec, w2="int8"), dataclasses.replace(spec, filtered=True)
    assert int8.bytes == spec.bytes - 2 * 10 * 4 + 2 * 10 * 4 and int8.flops == spec.flops + 20
    assert filtered.bytes == spec.bytes + 8


def test_costs_of_acceptance_by_hand():
    spec = Accept(2, drafts=3, vocab=10)
    rows = 8
    read = 2 * rows * 10 + rows * 12 + 2 * 12 + 2 * 8  # logits, ids and logit rows, starts, positions
    read += 2 * 12 + 2 * 2 * 10 + 2 * 3 * 4  # temperature and seed, logits, lse
    written = rows * 8 + rows + 2 * (4 * 4 + 8 + 4 + 8 + 8)
    assert spec.bytes == read + written
    assert spec.flops == 4 * 80 and spec.instructions == 10 * 80
    assert dataclasses.replace(spec, proposal="one_hot").bytes == spec.bytes - 40 - 24
    assert dataclasses.replace(spec, sampled=False).bytes == spec.bytes - 40 - 24 - 24


def test_costs_of_scheduling_and_layouts_by_hand():
    packed = 6 * 32 + 4 + 2 * 28 + 2 * 12  # R = 2, six rows
    assert lc.Fixed(2, drafts=2).bytes == packed + 2 * 4 + 2 * 2 * 8
    assert lc.DraftRows(2, drafts=3).bytes == packed
    assert lc.Tree(2, nodes=3).bytes == packed + 4 * 8 + 6 * 4 + 2 * 4
    assert lc.Schedule(2, "causal", drafts=2).bytes == packed + 4 * 12 + 4 * 7 + 4
    assert lc.Schedule(2, "budget", drafts=2).bytes == packed + 4 * 12 + 4
    assert lc.Schedule(2, "stale", drafts=2).bytes == packed + 4 * 12 + 4 * 7 + 4 + 4 * 4
    assert [lc.Schedule(2, policy, drafts=2).flops for policy in ("causal", "stale")] == [4, 8]


def test_the_tensors_of_a_case_have_the_counted_bytes():
    """The same numbers from the tensors themselves, where each is read or written whole."""
    spec = Draft(3).small()
    inputs, result = measure.check(spec, CPU)
    whole = nbytes(inputs) + nbytes(result)
    w1, w2 = inputs["head"].w1.nbytes, inputs["head"].w2.nbytes
    assert spec.bytes == whole - w1 + 2 * 16 * 9 + (spec.drafts - 1) * w2
    spec = Accept(3, "one_hot").small()
    inputs, result = measure.check(spec, CPU)
    layout = inputs["layout"]
    unread = [layout.batch_indices, layout.draft_lens, layout.flags, layout.num_rows, layout.positions]
    assert spec.bytes == nbytes(inputs) + nbytes(result) - sum(t.nbytes for t in unread) + 3 * 8  # a position a request


def test_costs_at_full_size():
    """The floors that the targets were set by: megabytes at V = 151936, K = 7, bf16."""
    assert Draft(1).bytes == pytest.approx(7 * 77.8e6, rel=0.01)
    assert Draft(64).bytes == pytest.approx(544e6 + 2 * 136e6, rel=0.01)
    assert Accept(1).bytes == pytest.approx(2.73e6, rel=0.01) and Accept(64).bytes == pytest.approx(175e6, rel=0.01)
    assert Accept(64, "one_hot").bytes == pytest.approx(156e6, rel=0.01)


def test_targets():
    assert Target(microseconds=12).limit(1.0, 5.0) == 12
    assert Target(floors=1.25).limit(100.0, 500.0) == 125
    issue = Target(floors=1.4, issue=True)
    assert (issue.limit(100.0, 200.0), issue.limit(100.0, 50.0), issue.limit(100.0, None)) == (280, 140, 140)


def test_the_registry():
    names = [(case.op, case.name) for case in registry()]
    assert len(set(names)) == len(names)
    assert {op for op, _ in names} >= {
        "draft_block", "accept_chain", "schedule_prefixes", "fixed_layout", "tree_layout", "draft_layout"
    }  # fmt: skip
    draft = [c.spec for c in registry() if c.op == "draft_block"]
    sizes = [(spec.requests, spec.sampled, spec.rank) for spec in draft[:6]]
    assert [(spec.requests, spec.kind, spec.w2, spec.filtered) for spec in draft[6:]] == [
        (r, *what)
        for what in [("gated", None, False), ("rnn", None, False), ("vanilla", "int8", False), ("vanilla", "fp8", False),
                     ("vanilla", None, True)]
        for r in (1, 64)
    ]  # fmt: skip
    assert sizes == [(1, True, 256), (8, True, 256), (64, True, 256), (1, False, 256), (64, False, 256), (64, True, 0)]
    specs = [c.spec for c in registry() if c.op == "accept_chain"]
    sizes = {(s.proposal, s.sampled, s.requests) for s in specs if (s.rule, s.settings, s.logprobs) == ("token", None, None)}
    assert sizes == {
        *(("dense", True, r) for r in (1, 8, 32, 64)), ("one_hot", True, 1), ("one_hot", True, 64), ("sparse", True, 1),
        ("sparse", True, 64), ("one_hot", False, 1), ("one_hot", False, 8),
    }  # fmt: skip
    assert {(s.proposal, s.rule) for s in specs} >= {("dense", "block"), ("sparse", "block"), ("one_hot", "coupled")}
    assert {s.settings for s in specs} >= {"filters", "adjust"} and {s.logprobs for s in specs} >= {"raw"}


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_right_at_a_small_size(name):
    measure.check(CASES[name].spec.small(), CPU)


@pytest.mark.parametrize("policy", ["causal", "budget", "stale"])
def test_scheduling_cases_admit_some_and_not_all(policy):
    spec = lc.Schedule(64, policy)
    for seed in (1, 2):
        lens = schedule.schedule_prefixes(**spec.make(seed)).draft_lens
        assert 0.2 * 64 * 7 < int(lens.sum()) < 0.95 * 64 * 7


class FakeClock:
    """Tells the durations it is given, and notes in which order it was used."""

    def __init__(self, durations=()):
        self.now, self.durations, self.used = 0.0, iter(durations), []
        self.open = False

    def mark(self):
        self.open = not self.open
        if not self.open:
            self.now += next(self.durations, 7.0)
        self.used.append("mark")
        return self.now

    def microseconds(self, start, end):
        return end - start

    def wait(self):
        self.used.append("wait")

    def busy(self):
        self.used.append("busy")


MACHINE = timing.Machine("Fake GPU", "1", "2", "3", "abc", multiprocessors=10, lanes=128, l2_bytes=1000, max_sm_clock="1000")


def bench_of(**changes):
    given = dict(
        device=CPU, clock=FakeClock(), machine=MACHINE, bandwidth=1e9, samples=3, baselines=(), small=True,
        capture=lambda call: call, facts=lambda: dict(gpu="Fake GPU", commit="abc"),
    )  # fmt: skip
    return measure.Bench(**given | changes)


def wrong_draft(what):
    def op(base_logits, **options):
        if what == "base":  # drafts and lse are those of the stored logits, which are wrong
            return right_draft(base_logits + 0.125, **options)
        block = right_draft(base_logits, **options)
        if what == "tokens":  # the last one, on which no other row depends
            block.tokens[0, -1] = (block.tokens[0, -1] + 1) % base_logits.shape[2]
        elif what == "logits":
            block.proposal.logits[0, 1, 3] += 1.0
        elif what == "lse":
            block.proposal.lse[0, 1] += 1e-3
        elif what == "nan":
            block.proposal.lse[0, 1] = math.nan
        elif what == "raw":
            block.confidence_logits[0, 0] += 1e-3
        else:
            block.confidence[0, 0] += 1e-3
        return block

    return op


right_draft, right_accept = dk.draft_block, dk.accept_chain


def wrong_accept(what):
    def op(*arguments, **options):
        result = right_accept(*arguments, **options)
        if what == "anchors":
            options["anchors"][0] += 1
        elif what == "anchor_positions":
            options["anchor_positions"][0] += 1
        elif what == "commit_mask":
            result.commit_mask[0] ^= True
        else:
            getattr(result, what).view(-1)[0] += 1
        return result

    return op


@pytest.mark.parametrize("what", ["tokens", "base", "logits", "lse", "nan", "raw", "confidence"])
def test_a_wrong_draft_turns_the_gate_red(monkeypatch, what):
    monkeypatch.setattr(dk, "draft_block", wrong_draft(what))
    assert_red("draft_block sampled_r1")


@pytest.mark.parametrize(
    "what",
    ["tokens", "num_accepted", "num_emitted", "num_rejected", "next_token", "last_row", "flags", "commit_mask", "anchors",
     "anchor_positions"],
)  # fmt: skip
def test_a_wrong_acceptance_turns_the_gate_red(monkeypatch, what):
    monkeypatch.setattr(dk, "accept_chain", wrong_accept(what))
    assert_red("accept_chain dense_r1")


@pytest.mark.parametrize("name", ["schedule_prefixes causal_r1", "fixed_layout r64", "tree_layout r64", "draft_layout r64"])
@pytest.mark.parametrize("field", ["draft_lens", "token_ids", "slot_mapping", "num_rows", "logits_indices"])
def test_a_wrong_layout_turns_the_gate_red(monkeypatch, name, field):
    op, right = CASES[name].op, getattr(dk, CASES[name].op)

    def wrong(*arguments, **options):
        layout = right(*arguments, **options)
        getattr(layout, field)[0] += 1
        return layout

    monkeypatch.setattr(dk, op, wrong)
    assert_red(name)


def assert_red(name, when_checked=True):
    if when_checked:
        with pytest.raises(AssertionError):
            measure.check(CASES[name].spec.small(), CPU)
    bench = bench_of()
    (row,) = measure.run(CASES[name], bench)
    assert row.status.startswith("red: ") and row.p50_us is row.p20_us is row.p80_us is row.target_us is None and not row.met
    assert not bench.clock.used
    (line,) = report.lines([row])
    assert "red: " in line


def test_a_red_gate_prints_no_time_and_exits_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(dk, "accept_chain", wrong_accept("tokens"))
    assert job.main(["--op", "accept_chain", "--case", "dense_r1"]) == 1
    assert "RED: " in capsys.readouterr().out
    chosen = [CASES["accept_chain dense_r1"], CASES["fixed_layout r64"]]
    assert report.report(chosen, bench_of(), tmp_path / "k.csv") == 1
    out = capsys.readouterr().out
    assert "not right, so not timed: accept_chain dense_r1" in out
    rows = read(tmp_path / "k.csv")
    assert [(r["op"], r["status"][:4], r["p50_us"] == "") for r in rows] == [("accept_chain", "red:", True)] + 4 * [
        ("fixed_layout", "ok", False)
    ]


def test_a_kernel_that_fails_does_not_hide_the_others(monkeypatch, tmp_path):
    def broken(*arguments, **options):
        raise RuntimeError("no such instruction\nmore")

    monkeypatch.setattr(dk, "fixed_layout", broken)
    chosen = [CASES["fixed_layout r64"], CASES["draft_layout r64"]]
    assert report.report(chosen, bench_of(), tmp_path / "k.csv") == 1
    rows = read(tmp_path / "k.csv")
    assert rows[0]["status"] == "failed: RuntimeError: no such instruction" and rows[-1]["status"] == "ok"


@pytest.mark.parametrize("missing", [False, True])
def test_what_is_timed_is_compared_again(monkeypatch, missing):
    """Right when checked; the call with out= then writes something else, or leaves an element out."""
    right = dk.fixed_layout

    def wrong(*arguments, out=None, **options):
        if out is None:
            return right(*arguments, **options)
        before = out.positions[-1].clone()
        layout = right(*arguments, out=out, **options)
        layout.positions[-1] = before if missing else 1
        return layout

    monkeypatch.setattr(dk, "fixed_layout", wrong)
    assert_red("fixed_layout r64", when_checked=False)


# --- timing -----------------------------------------------------------------------------------------------------------


def test_percentiles():
    assert timing.Timing.of([5.0]) == timing.Timing(5.0, 5.0, 5.0, 1)
    assert timing.Timing.of([40.0, 10.0, 30.0, 20.0, 60.0, 50.0]) == timing.Timing(20.0, 35.0, 50.0, 6)
    with pytest.raises(ValueError, match="^samples: expected at least one"):
        timing.Timing.of([])


def test_measure_takes_turns_and_times_calls_alone():
    clock, order = FakeClock([5.0, 1.0, 9.0, 3.0, 100.0]), []
    calls = [lambda name=name: order.append(name) for name in "ab"]
    found = timing.measure(calls, clock, count=5, queued=True, before=lambda: order.append("-"))
    assert order == list("aba") + list("-a-b-a-b-a")  # three to warm up, then timed ones
    assert found == timing.Timing.of([5.0, 1.0, 9.0, 3.0, 100.0]) and found.p50 == 5.0
    assert clock.used == ["wait"] + 5 * ["busy", "mark", "mark"] + ["wait"]
    clock = FakeClock()
    timing.measure(calls, clock, count=2, queued=False)
    assert clock.used == ["wait"] + 2 * ["wait", "mark", "mark"] + ["wait"]


def test_input_sets_pass_four_caches():
    """(sets, bytes read in between): the other sets and the reading are four L2s."""
    assert timing.input_sets(160, 50) == (3, 0)  # two others of 160 pass 200
    assert timing.input_sets(900, 50) == (2, 0)
    assert timing.input_sets(10, 50) == (8, 130)
    assert timing.input_sets(0, 50) == (8, 200)


def test_a_case_is_timed_on_cold_and_warm_inputs(monkeypatch):
    """Rows of a case: cold replays go through all sets, warm ones through one; the target is for cold replays."""
    used = []
    right = dk.fixed_layout

    def watched(*arguments, **options):
        if options.get("out") is not None:
            used.append((options["draft_lens"].data_ptr(), options["out"].token_ids.data_ptr()))
        return right(*arguments, **options)

    monkeypatch.setattr(dk, "fixed_layout", watched)
    case = dataclasses.replace(CASES["fixed_layout r64"], target=Target(microseconds=6.5))
    clock = FakeClock([6.0] * 3 + [2.0] * 3)
    rows = measure.run(case, bench_of(clock=clock))
    assert [(r.call, r.cache, r.p50_us) for r in rows] == [
        ("graph", "cold", 6.0), ("graph", "warm", 2.0), ("eager", "cold", 7.0), ("eager", "warm", 7.0)
    ]  # fmt: skip
    assert [(r.target_us, r.met) for r in rows] == [(6.5, "yes"), (None, ""), (None, ""), (None, "")]
    first = rows[0]
    bytes_ = case.spec.small().bytes
    assert (first.bytes, first.samples, first.input_sets, first.gpu, first.commit) == (bytes_, 3, 2, "Fake GPU", "abc")
    assert first.floor_us == pytest.approx(bytes_ / 1e3) and first.share_of_floor == pytest.approx(first.floor_us / 6.0)
    assert [r.input_sets for r in rows] == [2, 1, 2, 1]
    assert len(set(used)) == 2 and len({given for given, _ in used}) == len({out for _, out in used}) == 2
    slow = measure.run(case, bench_of(clock=FakeClock([6.6] * 3)))
    assert slow[0].met == "no"


def test_few_requests_have_inputs_of_several_seeds():
    spec = Accept(1).small()
    inputs = measure.inputs_of(spec, 1, CPU)
    assert not torch.equal(measure._another(spec, inputs, 2, CPU)["target_logits"], inputs["target_logits"])
    spec = dataclasses.replace(spec, requests=8)
    inputs = measure.inputs_of(spec, 1, CPU)
    other = measure._another(spec, inputs, 2, CPU)["target_logits"]
    assert torch.equal(other, inputs["target_logits"]) and other.data_ptr() != inputs["target_logits"].data_ptr()


def test_a_run_from_the_command_line(monkeypatch, tmp_path, capsys):
    """Everything but the device itself: its clock, copy, graphs and facts are stand-ins."""
    captured = []
    monkeypatch.setattr(timing, "DeviceClock", FakeClock)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda clock, device: 2e9)
    monkeypatch.setattr(timing, "machine", lambda device: dataclasses.replace(MACHINE, sm_clock="777"))
    monkeypatch.setattr(timing, "graph_of", lambda call: captured.append(call) or call)
    monkeypatch.setattr(work, "QUICK_SAMPLES", 2)
    path = tmp_path / "k.csv"
    arguments = job.parser().parse_args(["--quick", "--small", "--out", str(path)])
    assert work.time_all([CASES["fixed_layout r64"], CASES["draft_layout r64"]], arguments, CPU) == 0
    rows = read(path)
    assert [(r["op"], r["contender"]) for r in rows] == [
        (op, name) for op in ("fixed_layout", "draft_layout") for name in 4 * ["kernel"] + 4 * ["pytorch"]
    ]
    assert {(r["gpu"], r["driver"], r["torch"], r["triton"], r["commit"], r["sm_clock_mhz"]) for r in rows} == {
        ("Fake GPU", "1", "2", "3", "abc", "777")
    }
    assert {(r["copy_gb_per_s"], r["samples"]) for r in rows} == {("2", "2")} and len(captured) == 8
    out = capsys.readouterr().out
    assert "[2/2] draft_layout r64\n" in out and "a device copy moves 2 GB/s" in out and f"written to {path}" in out


def test_copy_bandwidth_counts_reading_and_writing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40_000, 0))
    assert timing.copy_bandwidth(FakeClock([5.0] * 20), CPU) == pytest.approx(2 * 10_000 / 5e-6)


def test_a_tree_without_git_is_known_by_its_source(monkeypatch, tmp_path):
    for folder in ("dspark_kernels", "bench"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(timing, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    before = timing.commit()
    assert before == "source " + timing.source_digest()
    (tmp_path / "bench" / "a.py").write_text("x = 2\n")
    assert timing.commit() != before


def test_issue_time():
    measured = timing.Timing(1, 2, 3, 4)
    row = measure._row(CASES["accept_chain dense_r1"], Accept(1), "kernel", "graph", "warm", measured, 1, bench_of())
    assert row.issue_us == pytest.approx(1e6 * 10 * 8 * 151936 / (128 * 10 * 1e9))
    assert dataclasses.replace(MACHINE, lanes=0).lanes_per_second is None
    assert dataclasses.replace(MACHINE, max_sm_clock="").lanes_per_second is None


def test_baselines_are_timed_beside_the_op_and_may_fail(monkeypatch):
    rows = measure.run(CASES["fixed_layout r64"], bench_of(baselines=("pytorch",)))
    assert [(r.contender, r.call, r.cache, r.status) for r in rows] == [
        (name, call, cache, "ok") for name in ("kernel", "pytorch") for call in ("graph", "eager") for cache in ("cold", "warm")
    ]

    def refused(*arguments):
        raise AssertionError("not captured")

    broken = dataclasses.replace(baselines.BASELINES["fixed_layout"], function=refused)
    monkeypatch.setitem(baselines.BASELINES, "fixed_layout", broken)
    rows = measure.run(CASES["fixed_layout r64"], bench_of(baselines=("pytorch",)))
    assert [r.status for r in rows] == 4 * ["ok"] + 2 * ["failed: AssertionError: not captured"]
    assert [report.lines([r]) for r in rows[4:]] == [
        ["  pytorch graph              failed: AssertionError: not captured"],
        ["  pytorch eager              failed: AssertionError: not captured"],
    ]


# --- report and command -----------------------------------------------------------------------------------------------


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_report_has_these_columns_and_keeps_other_cases(tmp_path):
    path = tmp_path / "deep" / "k.csv"
    row = measure.Row("op", "a", "kernel", "graph", "cold", "ok", 1.0, 2.0, 3.0, 9)
    other = dataclasses.replace(row, case="b")
    report.write(path, [row, dataclasses.replace(row, cache="warm")])
    report.write(path, [other])
    report.write(path, [dataclasses.replace(row, p50_us=2.5, met="no")])
    assert path.read_text().splitlines()[0] == (
        "op,case,contender,call,cache,status,p20_us,p50_us,p80_us,samples,input_sets,bytes,flops,copy_gb_per_s,floor_us,issue_us,"
        "share_of_floor,target_us,met,gpu,driver,torch,triton,commit,sm_clock_mhz,memory_clock_mhz,max_sm_clock_mhz"
    )
    assert [(r["case"], r["p50_us"], r["met"]) for r in read(path)] == [("b", "2", ""), ("a", "2.5", "no")]
    assert [p.name for p in path.parent.iterdir()] == ["k.csv"]


def test_the_name_of_the_report():
    assert paths.result_file("kernels", "NVIDIA H100 80GB HBM3") == paths.RESULTS / "kernels-nvidia-h100-80gb-hbm3.csv"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--op", "nope"], "--op: expected one of draft_block, accept_chain, schedule_prefixes"),
        (["--case", "nope"], "--case: expected one of sampled_r1, sampled_r8"),
        (["--op", "accept_chain", "--case", "causal_r1"], "--case: expected one of dense_r1, dense_r8"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--op"], "argument --op: expected one argument"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(capsys, arguments, message):
    assert job.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench.kernels: {message}") and error.count("\n") == 1


def test_in_the_interpreter_no_times_are_taken(capsys, tmp_path):
    assert job.main(["--op", "draft_layout", "--out", str(tmp_path / "k.csv")]) == 0
    out = capsys.readouterr().out
    assert "[2/2] draft_layout r256: equals the reference\n" in out
    assert "2 of 2 equal the reference; no times were taken" in out and not list(tmp_path.iterdir())


def test_the_list(capsys):
    assert job.main(["--list", "--case", "greedy_r8"]) == 0
    assert capsys.readouterr().out.split() == ["accept_chain", "greedy_r8", "19,449,640", "bytes", "9,723,904", "flops"]
