"""Where the kernels of this process run: in Triton's interpreter (the default), on a GPU, or compiled on the machine.

- Interpreter, repaired: unless one of the other two is asked for.
- GPU: TRITON_INTERPRET=0 where there is one. Kernels are compiled or interpreted for a whole process, so the tests marked `gpu` run
  in a second pytest process, started when the first one has finished; its result counts.
- Machine (`--compiled`): the tests of ops on the kernels' PTX, executed on the CPU by tests/machine. The default suite runs a
  selection of them in processes of their own (package/test_compiled.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import hypothesis
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
ON_GPU = HAS_GPU and os.environ.get("TRITON_INTERPRET") == "0"

# The same number everywhere, so that sums of floats come out the same everywhere.
torch.set_num_threads(1)

NO_GPU = "needs a GPU"
NO_TRITON = "needs Triton, which is not installed"
NO_TRANSFORMERS = "needs transformers, which is not installed"
NO_MACHINE = "needs the machine that runs compiled kernels"
OTHER_PROCESS = "runs compiled, in a second process"

HERE = Path(__file__).parent

# Test files whose tests launch kernels: what `--compiled` runs. All of tests/ops, and these; stem -> path in tests/.
OPS = {path.stem.removeprefix("test_"): f"ops/{path.name}" for path in sorted((HERE / "ops").glob("test_*.py"))}
OPS |= {stem: f"reference/test_{stem}.py" for stem in ("loop", "loop_sampled", "loop_trees")}
OPS |= {
    stem: f"package/test_{stem}.py"
    for stem in ("dispatcher", "example", "library", "machine", "testing", "testing_tree", "workspace")
}


def pytest_addoption(parser):
    group = parser.getgroup("compiled kernels")
    group.addoption(
        "--compiled", nargs="?", const="plain", metavar="MODES",
        help="run the tests of ops on compiled kernels, executed on the CPU by tests/machine. MODES, separated by commas: plain, or "
        "schedules, race, weak, all: then every launch is run again from the same memory in these modes and must leave the same bits",
    )  # fmt: skip
    group.addoption("--compiled-arch", default="sm_80", help="compile for and launch as on sm_80 (default), sm_89 or sm_90")
    group.addoption("--compiled-record", metavar="FILE", help="what the machine counted and reported, as JSON")
    group.addoption(
        "--compiled-examples", type=int, default=5, metavar="N", help="at most N examples of a hypothesis test (default 5)"
    )


def pytest_configure(config):
    examples = 0
    if config.option.compiled is not None:
        config.stash[MACHINE] = _start_machine(config.option)
        examples = config.option.compiled_examples
    elif not ON_GPU:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which no test module has done yet
        from dspark_kernels.testing import interpreter

        interpreter.repair()
    hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, print_blob=True)
    hypothesis.settings.load_profile("repeatable")
    if examples:
        _bound_examples(examples)


MACHINE = pytest.StashKey()


def _start_machine(option):
    """The machine, ready; or the reason why there is none."""
    from tests import machine

    replays = []
    for name in filter(None, option.compiled.split(",")):
        if name not in machine.GROUPS and name not in machine.MODES:
            known = ", ".join([*machine.GROUPS, *machine.MODES])
            raise pytest.UsageError(f"--compiled: expected some of {known}; got {name!r} (before a path write --compiled=plain)")
        replays += machine.GROUPS.get(name, (name,))
    reason = machine.available() if HAS_TRITON else NO_TRITON
    if reason is None:
        machine.install(option.compiled_arch)
        machine.replay_modes[:] = [mode for mode in dict.fromkeys(replays) if mode != "plain"]
        return machine
    return reason


def _bound_examples(most: int) -> None:
    """A test's own @settings(max_examples=...) is bounded too."""
    stock = hypothesis.settings.__call__

    def bounded(self, test):
        return stock(hypothesis.settings(self, max_examples=most) if self.max_examples > most else self, test)

    hypothesis.settings.__call__ = bounded
    hypothesis.settings.register_profile("bounded", hypothesis.settings.get_profile("repeatable"), max_examples=most)
    hypothesis.settings.load_profile("bounded")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in this process."""
    return torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")


@pytest.fixture(autouse=True)
def _schedule_of_this_test(request):
    """The machine's schedules depend on the test alone, not on those before it."""
    machine = request.config.stash.get(MACHINE, None)
    if machine is not None and not isinstance(machine, str):
        machine.settings.seed = 1 + zlib.crc32(request.node.nodeid.encode())


def pytest_collection_modifyitems(config, items):
    machine = config.stash.get(MACHINE, None)

    def here(item):
        if ON_GPU:  # everything else works on CPU tensors, which only the interpreter and the machine take
            return "gpu" in item.keywords
        if machine is not None:
            return "/".join(item.path.parts[-2:]) in OPS.values()
        return "compiled_only" not in item.keywords

    config.hook.pytest_deselected(items=[item for item in items if not here(item)])
    items[:] = [item for item in items if here(item)]
    if ON_GPU:
        return
    if machine is None:
        _spread(items)
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=OTHER_PROCESS if HAS_GPU else NO_GPU))
        if isinstance(machine, str):
            item.add_marker(pytest.mark.skip(reason=f"{NO_MACHINE}: {machine}"))


def _spread(items) -> None:
    """The parts of test_compiled.py, which take long, evenly among the others: with pytest-xdist no process is left with many."""
    parts = [item for item in items if item.path.stem == "test_compiled"]
    others = [item for item in items if item.path.stem != "test_compiled"]
    step = len(others) // (len(parts) + 1)
    for number, part in enumerate(parts):
        others.insert(number * (step + 1), part)
    items[:] = others


def _missing_triton(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ImportError) and (error.name or "").split(".")[0] == "triton":
            return True
        error = error.__cause__ or error.__context__
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except Exception as error:
        if not HAS_TRITON and _missing_triton(error):
            pytest.skip(NO_TRITON)
        raise


def pytest_sessionfinish(session, exitstatus):
    """The tests marked gpu, compiled, in a process of their own."""
    config = session.config
    # With pytest-xdist (-n) its workers hold the tests, and the process that directs them does not see which there are.
    directing, worker = bool(getattr(config.option, "numprocesses", None)), hasattr(config, "workerinput")
    waiting = directing or any("gpu" in item.keywords for item in session.items)
    here = ON_GPU or config.option.compiled is not None
    if here or worker or not HAS_GPU or not waiting or config.option.collectonly or exitstatus > pytest.ExitCode.TESTS_FAILED:
        return
    print("\n\ntests marked gpu, in a process of their own:", flush=True)
    command = [sys.executable, "-m", "pytest", *config.invocation_params.args, *(["-n", "0"] if directing else [])]
    done = subprocess.run(command, cwd=config.invocation_params.dir, env={**os.environ, "TRITON_INTERPRET": "0"})
    if done.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = done.returncode


def pytest_terminal_summary(terminalreporter, config):
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    for reason in (NO_GPU, NO_TRITON, NO_TRANSFORMERS, NO_MACHINE):
        if count := sum(text.startswith(reason) for text in reasons):
            terminalreporter.write_line(f"skipped {count} tests: {reason}")
    parts = [dict(report.user_properties).get("compiled") for report in terminalreporter.stats.get("passed", [])]
    if any(parts):
        tests, launches = (sum(part[i] for part in parts if part) for i in range(2))
        terminalreporter.write_line(
            f"compiled kernels: {tests} tests of ops passed in processes of their own, {launches} launches in all modes"
        )
    machine = config.stash.get(MACHINE, None)
    if machine is not None and not isinstance(machine, str):
        terminalreporter.write_line(machine.summary())
        if config.option.compiled_record:
            Path(config.option.compiled_record).write_text(json.dumps(machine.record(), indent=1))
