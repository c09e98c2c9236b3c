"""What a result depends on: the commit, the machine, its packages."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess

from bench.gpu.steps import has, sanitizer
from bench.shared import timing


def facts() -> int:
    """Print what a result depends on, one "name: value" a line."""
    import torch

    print(f"commit: {timing.commit()}\nsource: {timing.source_digest()}\npython: {platform.python_version()}")
    print(f"torch: {torch.__version__}\ntriton: {timing.triton_version() or 'not here'}\nplatform: {platform.platform()}")
    print(f"cpus: {os.cpu_count()}")
    for name in ("numpy", "pytest", "hypothesis", "xdist", "tqdm", "safetensors", "matplotlib", "flashinfer", "vllm", "sglang"):
        print(f"{name}: {'here' if has(name) else 'not here'}")
    print(f"compute-sanitizer: {sanitizer() or 'not here'}")
    if not torch.cuda.is_available():
        print("gpu: none")
        return 0
    machine = timing.machine(torch.device("cuda", torch.cuda.current_device()))
    for field in dataclasses.fields(machine):
        if field.name not in ("torch", "triton", "commit"):
            print(f"{field.name}: {getattr(machine, field.name)}")
    properties = torch.cuda.get_device_properties(0)
    print(f"memory: {properties.total_memory / 2**30:.1f} GiB\ncapability: {properties.major}.{properties.minor}")
    try:
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout)
    except (OSError, subprocess.TimeoutExpired):
        print("nvidia-smi: not here")
    return 0
