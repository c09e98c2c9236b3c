"""Where tests run: Triton's interpreter, repaired, unless TRITON_INTERPRET=0 is set on a machine with a GPU.

Kernels are compiled or interpreted for a whole process. Where there is a GPU, the tests marked `gpu` therefore run in a
second pytest process with TRITON_INTERPRET=0, started when the first one has finished; its result counts.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import hypothesis
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
COMPILED = HAS_GPU and os.environ.get("TRITON_INTERPRET") == "0"

if not COMPILED:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which no test module has done yet
    from dspark_kernels.testing import interpreter

    interpreter.repair()

# The same number everywhere, so that sums of floats come out the same everywhere.
torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")

NO_GPU = "needs a GPU"
NO_TRITON = "needs Triton, which is not installed"
OTHER_PROCESS = "runs compiled, in a second process"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in this process."""
    return torch.device("cuda", torch.cuda.current_device()) if COMPILED else torch.device("cpu")


def pytest_collection_modifyitems(config, items):
    if COMPILED:
        # Everything else works on CPU tensors, which only the interpreter takes.
        config.hook.pytest_deselected(items=[item for item in items if "gpu" not in item.keywords])
        items[:] = [item for item in items if "gpu" in item.keywords]
        return
    reason = OTHER_PROCESS if HAS_GPU else NO_GPU
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


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
    if COMPILED or worker or not HAS_GPU or not waiting or config.option.collectonly or exitstatus > pytest.ExitCode.TESTS_FAILED:
        return
    print("\n\ntests marked gpu, in a process of their own:", flush=True)
    command = [sys.executable, "-m", "pytest", *config.invocation_params.args, *(["-n", "0"] if directing else [])]
    done = subprocess.run(command, cwd=config.invocation_params.dir, env={**os.environ, "TRITON_INTERPRET": "0"})
    if done.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = done.returncode


def pytest_terminal_summary(terminalreporter):
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    for reason in (NO_GPU, NO_TRITON):
        if reason in reasons:
            terminalreporter.write_line(f"skipped {reasons.count(reason)} tests: {reason}")
