"""Tests of the kernel as `kernels` loads it. Those marked kernels_ci take less than a minute together."""

import os
import re
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

FOLDER = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels_ci: run by kernel-builder's CI")


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def dk():
    """The kernel: what is built beside the tests, else what the loader finds under the name in build.toml."""
    kernels = pytest.importorskip("kernels")
    if (FOLDER / "build").is_dir():
        return kernels.get_local_kernel(FOLDER)
    described = (FOLDER / "build.toml").read_text(encoding="utf-8")
    repo_id = re.search(r'^repo-id = "(.*)"', described, re.M)[1]
    version = int(re.search(r"^version = (\d+)", described, re.M)[1])
    return kernels.get_kernel(repo_id, version=version, trust_remote_code=True)
