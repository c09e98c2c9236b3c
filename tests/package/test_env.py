"""The report of the environment: what it says here, of GPUs that are not here, and where torch or Triton is missing or broken."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels import env
from dspark_kernels.launch import arch

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments, path="", **environment):
    path = os.pathsep.join(map(str, filter(None, [path, ROOT])))
    return subprocess.run(
        [sys.executable, "-m", "dspark_kernels.env", *arguments],
        cwd="/", env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_the_command_says_what_this_process_knows():
    done = command(TRITON_PRINT_AUTOTUNING="1")
    assert (done.returncode, done.stderr) == (0, "")
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert (found["dspark_kernels"], found["torch"]) == (dk.__version__, torch.__version__)
    assert "TRITON_PRINT_AUTOTUNING=1" in found["environment"]
    assert found["interpreter"] == env.report()["interpreter"]


BROKEN = {
    "missing": (
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
        "ModuleNotFoundError: No module named 'torch'",
    ),
    "a library is missing": ("raise OSError('libcudart.so.13: not found')", "OSError: libcudart.so.13: not found"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_it_answers_where_torch_and_triton_cannot_be_imported(tmp_path, how):
    code, why = BROKEN[how]
    for name in ("torch", "triton"):
        (tmp_path / f"{name}.py").write_text(code)
    done = command("--json", path=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    version = env._version("torch")
    assert facts["torch"] == (f"{version}, cannot be imported ({why})" if version else "missing")
    assert facts["dspark_kernels"] == dk.__version__ and facts["gpus"] == [] and facts["interpreter"] == "off"
    done = subprocess.run(
        [sys.executable, "-c", "import dspark_kernels"], env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and why in done.stderr, "importing the package fails as before"


def test_a_package_that_is_not_installed_is_missing(monkeypatch):
    monkeypatch.setattr(env, "_version", lambda package: None)
    assert env._why("torch", ImportError("x")) == "missing"


def test_gpus_and_the_launch_table_of_each(monkeypatch):
    cards = {0: ("NVIDIA H200", 9, 0, 132, 141 * 2**30), 1: ("Another", 8, 7, 16, 2**35)}

    def properties(index):
        name, major, minor, count, memory = cards[index]
        return types.SimpleNamespace(name=name, multi_processor_count=count, total_memory=memory, gcnArchName="")

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: len(cards),
        "get_device_properties": properties,
        "get_device_capability": lambda index: cards[index][1:3],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "hip", None)
    arch._of_device.cache_clear()
    facts = env.report()
    arch._of_device.cache_clear()
    assert [(gpu["architecture"], gpu["launch_table"]) for gpu in facts["gpus"]] == [("sm_90", "sm_90"), ("sm_87", "sm_86")]
    lines = env.text(facts).splitlines()
    assert "gpu 0: name NVIDIA H200, architecture sm_90, launch_table sm_90, multiprocessors 132, memory_gib 141.0" in lines


def test_what_torch_says_of_a_driver_and_no_home_directory(monkeypatch):
    def is_available():
        import warnings

        warnings.warn("The NVIDIA driver is too old\nUpdate it", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/home/ada/cache")
    lines = env.text(env.report()).splitlines()
    assert {"gpus: none", "no_gpus: The NVIDIA driver is too old"} <= set(lines) and "TRITON_CACHE_DIR=~/cache" in lines[-1]


def test_what_nvidia_smi_does_not_know_is_empty(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '580.1, 1980, [N/A], 2000'\n")
    tool.chmod(0o755)
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert env.smi(*fields) == ["580.1", "1980", "", "2000"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert env.smi(*fields) == ["", "", "", ""]
