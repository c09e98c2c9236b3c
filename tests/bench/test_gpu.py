"""bench.gpu: steps in order within limits and a budget, done ones skipped, hanging ones killed, at most 8 files, a summary."""

import dataclasses
import json
import os
import re
import sys
import time

import pytest
import torch

from bench.gpu import __main__ as job, running as gpu_running, steps as gpu_steps, summary as gpu_summary, work
from bench.gpu.state import Result
from bench.gpu.steps import Step
from bench.shared import paths, timing


def python(code, **options):
    name = options.pop("name", "step")
    return Step(name, options.pop("limit", 20), (sys.executable, "-c", code), **options)


def appended(path, name, code=0, **options):
    """A step that leaves a line in `path` each time it runs, and exits with `code`."""
    return python(f"open({str(path)!r}, 'a').write('{name}\\n'); raise SystemExit({code})", name=name, **options)


def states(out):
    return {name: result["status"] for name, result in json.loads((out / "state.json").read_text()).items()}


def test_the_steps_and_their_order(tmp_path):
    names = [step.name for step in gpu_steps.steps(tmp_path)]
    important = [n for n in names if n != "kernels: tree_attention"]
    assert important == [
        "environment", "tests", "kernels: draft_block", "kernels: accept_chain", "kernels: schedule_prefixes", "kernels: trees",
        "kernels: layouts", "round", "decode", "memcheck", "racecheck", "launches", "tune", "baselines",
    ]  # fmt: skip
    steps = {step.name: step for step in gpu_steps.steps(tmp_path)}
    assert {"pytest", "gpu"} <= set(steps["tests"].command)
    assert all(("TRITON_INTERPRET", "0") in step.environment for step in steps.values())
    assert ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1") in steps["memcheck"].environment
    assert "--no-baselines" in steps["kernels: draft_block"].command and "--no-baselines" not in steps["baselines"].command
    assert all(0 < step.limit <= 300 for step in steps.values())


def test_every_op_is_timed(tmp_path):
    from bench.shared.cases.registry import registry

    named = [part for step in gpu_steps.steps(tmp_path) for part in step.command if part.startswith("--op=")]
    assert sorted(named) == sorted({f"--op={case.op}" for case in registry()})
    cases = {case.name for case in registry()}
    assert {part.removeprefix("--case=") for part in gpu_steps.steps(tmp_path)[-1].command if part.startswith("--case=")} <= cases


def test_steps_write_eight_files_with_flat_names_at_most(tmp_path):
    assert len(job.FILES) <= 8 and all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in job.FILES)
    written = {step.log for step in gpu_steps.steps(tmp_path) if step.log}
    for step in gpu_steps.steps(tmp_path):
        written |= {os.path.relpath(part, tmp_path) for part in step.command if part.startswith(str(tmp_path))}
    assert written | {"state.json", "summary.md"} == set(job.FILES)


def test_a_run_leaves_only_these_files(tmp_path):
    todo = [python("print('x')", name=name, log=name) for name in job.FILES if name.endswith(".txt")]
    assert gpu_running.run_all([*todo, python("print(1)", name="quiet")], tmp_path, 60) == 0
    assert {p.name for p in tmp_path.iterdir()} <= set(job.FILES)


def test_resuming_skips_what_is_done(tmp_path, monkeypatch, capsys):
    out, seen = tmp_path / "out", tmp_path / "seen"
    out.mkdir()
    todo = [appended(seen, "right"), appended(seen, "wrong", 1)]
    assert gpu_running.run_all(todo, out, 60) == 1
    assert states(out) == {"right": "done", "wrong": "failed"}
    todo[1] = appended(seen, "wrong", 0)
    assert gpu_running.run_all(todo, out, 60) == 0
    assert seen.read_text().split() == ["right", "wrong", "wrong"]
    assert "[1/2] right: done before" in capsys.readouterr().out
    monkeypatch.setattr(timing, "source_digest", lambda: "changed")
    assert gpu_running.run_all(todo[:1], out, 60) == 0
    assert seen.read_text().split()[3:] == ["right"]
    (out / "state.json").write_text("{ broken")
    assert gpu_running.run_all(todo[:1], out, 60) == 0
    assert seen.read_text().split()[4:] == ["right"]


def test_a_step_that_hangs_is_killed_with_all_it_started(tmp_path):
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(p.pid))\n"
        "print('before', flush=True); time.sleep(60)"
    )
    out = tmp_path / "out"
    out.mkdir()
    start = time.monotonic()
    assert gpu_running.run_all([python(code, limit=2, log="tests.txt"), python("print(1)", name="next")], out, 60) == 1
    assert time.monotonic() - start < 15
    assert states(out) == {"step": "killed", "next": "done"}
    assert "before" in (out / "tests.txt").read_text()
    state = json.loads((out / "state.json").read_text())["step"]
    assert state["exit"] is None and state["tail"].strip() == "before"
    assert not running(int(child.read_text()))


def test_a_step_that_will_not_end_is_killed(tmp_path):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    start = time.monotonic()
    result = gpu_running.run_step(python(code), 1.5, tmp_path, "")
    assert result.status == "killed" and result.tail == "deaf\n" and time.monotonic() - start < 10


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_budget_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_running, "RESERVE", 0.5)
    monkeypatch.setattr(gpu_running, "LEAST", 1.0)
    seen = tmp_path / "seen"
    out = tmp_path / "out"
    out.mkdir()
    todo = [python("import time; time.sleep(60)", name="long", limit=50), appended(seen, "late")]
    start = time.monotonic()
    assert gpu_running.run_all(todo, out, 2.0) == 1
    assert time.monotonic() - start < 15
    assert states(out) == {"long": "killed", "late": "no time"} and not seen.exists()
    assert gpu_running.run_all(todo[1:], out, 60) == 0  # and is run when there is time


def test_what_is_missing_is_said(tmp_path, capsys):
    assert gpu_running.run_all([python("print(1)", missing="no such tool")], tmp_path, 60) == 1
    assert "[1/1] step: missing after 0 s: no such tool" in capsys.readouterr().out
    broken = Step("step", 20, ("/nonexistent/tool",))
    result = gpu_running.run_step(broken, 5, tmp_path, "")
    assert result.status == "failed" and result.tail == "/nonexistent/tool: No such file or directory"


def test_without_pytest_every_case_is_compared_instead(monkeypatch):
    for missing in ("pytest", "hypothesis"):
        monkeypatch.setattr(gpu_steps, "has", lambda module, missing=missing: module != missing)
        assert gpu_steps.test_command()[1:] == ("-m", "bench.kernels", "--check")
    monkeypatch.setattr(gpu_steps, "has", lambda module: module != "xdist")
    assert "-n" not in gpu_steps.test_command() and "--continue-on-collection-errors" in gpu_steps.test_command()


def test_modules_that_cannot_be_collected_are_reported(tmp_path):
    """The command of the step itself, on a folder with one such module."""
    (tmp_path / "test_a.py").write_text("import no_such_package\n")
    (tmp_path / "test_b.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_b(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    command = [str(tmp_path) if part == "tests" else part for part in gpu_steps.test_command()]
    at = command.index("-n") if "-n" in command else len(command)
    step = Step("tests", 60, (*command[:at], *command[at + 2 :], "-c", str(tmp_path / "pytest.ini")), "tests.txt")
    out = tmp_path / "out"
    out.mkdir()
    assert gpu_running.run_all([step], out, 60) == 1
    assert "ERROR" in (out / "tests.txt").read_text() and "no_such_package" in (out / "tests.txt").read_text()
    assert gpu_summary.test_counts(out / "tests.txt") == {"passed": 1, "error": 1}


@pytest.mark.parametrize(
    "text, counts",
    [
        ("##### tests: x\n= 2 failed, 31 passed, 1 skipped, 900 deselected, 1 error in 61.20s (0:01:01) =\n",
         {"passed": 31, "failed": 2, "skipped": 1, "error": 1, "deselected": 900}),
        ("##### tests: x\n[gw0] [ 3%] PASSED tests/a.py::b\n[gw1] [ 4%] FAILED tests/a.py::c\ntests/a.py::d PASSED\n",
         {"passed": 2, "failed": 1}),
        ("\n##### tests: x\n= 1 failed in 1.00s =\n\n##### tests: x\n= 5 passed in 1.00s =\n", {"passed": 5}),
        ("", {}),
    ],
)  # fmt: skip
def test_counts_of_tests(tmp_path, text, counts):
    (tmp_path / "tests.txt").write_text(text)
    assert gpu_summary.test_counts(tmp_path / "tests.txt") == counts


CSV = """op,case,contender,call,cache,status,p20_us,p50_us,p80_us,copy_gb_per_s,floor_us,share_of_floor,target_us,met
accept_chain,dense_r64,kernel,graph,cold,ok,50,51.5,53,3000,58.3,0.9,72.9,yes
accept_chain,dense_r64,kernel,graph,warm,ok,40,41.5,43,3000,58.3,0.9,,
accept_chain,dense_r64,pytorch,graph,cold,ok,900,901,902,3000,58.3,0.06,,
accept_chain,dense_r1,kernel,graph,cold,ok,13,14,15,3000,0.9,0.06,12,no
draft_block,greedy_r1,kernel,,,red: request 0 | differs,,,,,,,,
"""
ROUND = """requests,context,layers,op,predicted_us,p50_us,share_of_round
8,2048,36,draft_block,4,5,0.01
8,2048,36,one graph,10,11.5,0.025
"""


def test_the_summary_lists_steps_and_numbers_beside_targets(tmp_path):
    (tmp_path / "kernels.csv").write_text(CSV)
    (tmp_path / "round.csv").write_text(ROUND)
    (tmp_path / "launches.csv").write_text((paths.ROOT / "bench" / "results" / "launches.csv").read_text())
    (tmp_path / "tests.txt").write_text("= 4 passed in 2.00s =\n")
    (tmp_path / "log.txt").write_text(
        "##### environment: x\ngpu: Old\n##### environment: x: y\ngpu: Fake\ndriver: 1\ncommit: abc\nother: 3\n"
        "##### memcheck: x\nnoise\n========= ERROR SUMMARY: 0 errors\n"
        "##### tune: x\n[1/9] layout requests 256: 3.10 us, 4.00 us before, 5 timed, block 128 -> 64\n    noise\n"
    )
    todo = [python("", name=name) for name in ("a", "b")]
    text = gpu_summary.summary(todo, {"a": Result("killed", 3.0, 4.0, None, "last | line\n")}, tmp_path)
    for line in (
        "gpu Fake, driver 1, commit abc",
        "| a | killed | 3 | 4 | last / line |",
        "| b | not yet | 0 | 20 |  |",
        "Tests marked gpu: 4 passed.",
        "Kernel times, us, graph replays on cold inputs; a copy moves 3000 GB/s.",
        "| accept_chain | dense_r64 | 50 | 51.5 | 53 | 58.3 | 0.9 | 72.9 | yes |",
        "| draft_block | greedy_r1 | red: request 0 / differs | | | | | | |",
        "Targets met: 1 of 2.",
        "| accept_chain | dense_r64 | pytorch | 901 |",
        "| 8 | one graph | 11.5 | 10 | 2.5% |",
        "| **together, sampled** | **3** | **210** |",
        "[1/9] layout requests 256: 3.10 us, 4.00 us before, 5 timed, block 128 -> 64",
        "========= ERROR SUMMARY: 0 errors",
    ):
        assert line in text.splitlines(), f"{line}\n\n{text}"
    assert "41.5" not in text
    assert "noise" not in text and "Old" not in text and "| accept_chain | dense_r1 | kernel |" not in text


def test_the_last_thing_printed_is_the_summary(tmp_path, capsys):
    gpu_running.run_all([python("print('hello')")], tmp_path, 60)
    assert capsys.readouterr().out.endswith((tmp_path / "summary.md").read_text() + "\n")
    assert "| step | done | " in (tmp_path / "summary.md").read_text()


def test_a_dry_run_lists_all_steps_and_runs_the_quick_ones(monkeypatch, capsys):
    made = gpu_steps.steps
    asked = ("-m", "bench.kernels", "--op=draft_layout", "--check")

    def few(out):
        """All steps, of which the facts, one op and a wrong command are run."""
        found = []
        for step in made(out):
            dry = {"environment": step.dry, "kernels: layouts": (gpu_steps.PYTHON, *asked)}
            dry["decode"] = (gpu_steps.PYTHON, "-c", "raise SystemExit(3)")
            found.append(dataclasses.replace(step, dry=dry.get(step.name)))
        return found

    monkeypatch.setattr(work, "steps", few)
    assert job.main(["--dry-run"]) == 1
    out = capsys.readouterr().out
    listed = [line.split("  ")[0] for line in out.splitlines()[1 : 1 + len(made(paths.ROOT))]]
    assert listed == [step.name for step in made(paths.ROOT)] and "200 s" in out
    assert "environment: done" in out and "kernels: layouts: done" in out and "decode: failed" in out
    quick = {step.name for step in made(paths.ROOT) if step.dry}
    others = {"environment", "round", "launches", "tune"}
    assert quick == others | {step.name for step in made(paths.ROOT) if step.name.startswith("kernels: ")}


def test_facts(capsys):
    assert job.main(["--facts"]) == 0
    found = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert found["torch"] == torch.__version__ and found["source"] == timing.source_digest() and len(found["commit"]) >= 12


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so_and_exits_2(tmp_path, capsys):
    assert job.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("bench.gpu: no GPU here (--dry-run ") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message", [(["--minutes", "0"], "--minutes: expected more than 0, got 0"), (["--bogus"], "unrecognized arguments")]
)
def test_bad_arguments_are_one_line_and_exit_2(capsys, arguments, message):
    assert job.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench.gpu: {message}") and error.count("\n") == 1
