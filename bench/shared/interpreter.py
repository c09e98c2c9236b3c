"""Whether kernels are compiled or run in Triton's interpreter: decided before the first op of a process."""

from __future__ import annotations

import os

import torch

from bench.shared.command import BadArgument, first_line


def prepare_triton() -> bool:
    """Compiled kernels where there is a GPU; the repaired interpreter where there is none or TRITON_INTERPRET=1 asks for it.

    True for the interpreter. Triton reads the variable when it is imported, so this comes before the first op.
    """
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    os.environ["TRITON_INTERPRET"] = "1"
    from dspark_kernels.testing import interpreter

    try:
        interpreted = interpreter.repair()
    except ImportError as error:
        raise BadArgument(f"needs a GPU or Triton's interpreter: {first_line(error)}") from None
    if not interpreted:
        raise BadArgument(
            "needs a GPU or Triton's interpreter: Triton is not installed, or was imported without TRITON_INTERPRET=1"
        )
    return True
