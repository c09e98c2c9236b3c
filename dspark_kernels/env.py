"""What a result or a fault depends on: versions, GPUs with their launch tables, the interpreter, the environment's variables.

    python -m dspark_kernels.env            one "name: value" a line, for a bug report
    python -m dspark_kernels.env --json     the same for programs

It also answers where torch or Triton is missing or cannot be imported, and says why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType
from typing import Any

# Beside torch, Triton and numpy: what the extras, the tests and engines bring.
PACKAGES = (
    "flashinfer-python", "hypothesis", "matplotlib", "pytest", "pytest-xdist", "safetensors", "sglang", "tqdm", "transformers", "vllm",
)  # fmt: skip
# This project's variables and Triton's, and those that decide which devices and how many threads there are.
VARIABLES = ("DSPARK_", "TRITON_", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "OMP_NUM_THREADS")
MISSING = "missing"

Facts = dict[str, Any]  # of one kind per name, as in JSON


def report() -> Facts:
    """Facts by name, in order: strings and numbers, None or "" for what does not apply; `gpus` is a list of such facts, `packages` and
    `environment` are mappings."""
    from . import __version__

    torch, torch_says = _torch()
    triton_says = _triton()
    gpus, why_none = ([], "") if torch is None else _gpus(torch)
    return {
        "dspark_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch": torch_says,
        "cuda": torch and torch.version.cuda,
        "rocm": torch and torch.version.hip,
        "triton": triton_says,
        "numpy": _version("numpy") or MISSING,
        "interpreter": _interpreter(torch),
        "driver": smi("driver_version")[0],
        "gpus": gpus,
        "no_gpus": why_none,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "environment": {name: _short(value) for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def text(facts: Facts) -> str:
    """One "name: value" a line; a GPU has a line of its own, facts that do not apply have none."""
    lines = []
    for name, value in facts.items():
        if name == "gpus":
            lines += [f"gpu {number}: {_pairs(gpu, ' ')}" for number, gpu in enumerate(value)] or ["gpus: none"]
        elif name == "environment":
            lines.append(f"{name}: {_pairs(value, '=') or 'none of ' + ', '.join(VARIABLES)}")
        elif isinstance(value, dict):
            lines.append(f"{name}: {_pairs(value, ' ') or 'none'}")
        elif value not in (None, ""):
            lines.append(f"{name}: {value}")
    return "\n".join(lines)


def _pairs(values: Facts, between: str) -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in values.items())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> tuple[ModuleType | None, str]:
    """(torch or None, its version or why there is none)."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of the libraries that it loads
        return None, _why("torch", error)
    return torch, torch.__version__


def _triton() -> str:
    try:
        import triton
    except (ImportError, OSError) as error:
        return _why("triton", error)
    return str(triton.__version__)


def _why(package: str, error: Exception) -> str:
    version = _version(package)
    return f"{version}, cannot be imported ({type(error).__name__}: {error})" if version else MISSING


def _interpreter(torch: ModuleType | None) -> str:
    """on or off: whether kernels run in Triton's interpreter in a process with this environment."""
    if torch is None:
        return "off"
    from .testing import interpreter

    return "on" if interpreter.interpreting() else "off"


def _gpus(torch: ModuleType) -> tuple[list[Facts], str]:
    """(the GPUs with what launch configurations see of them, what torch says where it finds none)."""
    from .launch import arch, table

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if not torch.cuda.is_available():
            return [], "; ".join(str(warning.message).split("\n")[0] for warning in said)
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        seen = arch.current(torch.device("cuda", index))
        gpus.append(
            {
                "name": properties.name,
                "architecture": seen.name,
                "launch_table": table.name_for(seen),
                "multiprocessors": seen.multiprocessors,
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return gpus, ""


def smi(*fields: str) -> list[str]:
    """What nvidia-smi answers for fields of the first GPU; "" where it is not here or does not know."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return [""] * len(fields)
    values = [value.strip() for value in done.stdout.strip().split(",")] if done.returncode == 0 else []
    if len(values) != len(fields):
        return [""] * len(fields)
    return [value if value and not value.startswith("[") else "" for value in values]


def _short(value: str) -> str:
    """Without the user's name, which a home directory has."""
    home = os.path.expanduser("~")
    return value.replace(home, "~") if len(home) > 1 else value


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 for a bad argument."""
    parser = argparse.ArgumentParser(prog="python -m dspark_kernels.env", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    facts = report()
    print(json.dumps(facts, indent=1) if arguments.json else text(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
