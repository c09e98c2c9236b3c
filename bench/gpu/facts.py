"""What a result depends on: the commit, the machine, its packages."""

from __future__ import annotations

import dataclasses
import subprocess

from bench.gpu.steps import sanitizer
from bench.shared import timing
from dspark_kernels import env


def facts() -> int:
    """Print what a result depends on, one "name: value" a line: the source, the environment, the GPU as timing sees it."""
    import torch

    print(f"commit: {timing.commit()}\nsource: {timing.source_digest()}")
    print(env.text(env.report()))
    print(f"compute-sanitizer: {sanitizer() or 'not here'}")
    if not torch.cuda.is_available():
        print("gpu: none")
        return 0
    machine = timing.machine(torch.device("cuda", torch.cuda.current_device()))
    for field in dataclasses.fields(machine):
        if field.name not in ("torch", "triton", "commit", "driver"):
            print(f"{field.name}: {getattr(machine, field.name)}")
    try:
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout)
    except (OSError, subprocess.TimeoutExpired):
        print("nvidia-smi: not here")
    return 0
