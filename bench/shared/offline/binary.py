"""What a compiled kernel is: registers, spills, memory, matrix instructions, from cubin or AMD assembly."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path


def inspect_binary(kernel) -> dict:
    """Registers, spills (bytes of spill code on NVIDIA, registers on AMD), stack, matrix instructions, size."""
    if "cubin" in kernel.asm:
        return _inspect_cubin(kernel.asm["cubin"])
    text = kernel.asm["amdgcn"]

    def field(name):
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    spilled = field("vgpr_spill_count")
    return dict(
        registers=field("vgpr_count"),
        spill_stores=spilled,
        spill_loads=spilled,
        scalar_spills=field("sgpr_spill_count"),
        stack=field("private_segment_fixed_size"),
        matrix_instructions=len(re.findall(r"^\s*v_(?:s?mfmac?|wmma)_", text, re.M)),
        binary_bytes=len(kernel.asm["hsaco"]),
    )


_WIDTH = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


def _inspect_cubin(cubin: bytes) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )

    def local(instruction):
        found = re.findall(rf"\b{instruction}((?:\.\w+)*)\s", sass)
        return sum(next((_WIDTH[part] for part in suffix.split(".") if part in _WIDTH), 4) for suffix in found)

    resource = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    return dict(
        registers=resource["REG"],
        spill_stores=local("STL"),
        spill_loads=local("LDL"),
        scalar_spills=0,
        stack=resource["STACK"],
        matrix_instructions=len(re.findall(r"\b(?:[A-Z]MMA|[A-Z]GMMA|UTC[A-Z]*MMA)\b", sass)),
        binary_bytes=len(cubin),
    )
