"""SASS of a cubin as instructions: address, predicate, opcode, operands, class. The disassembler is that of Triton's wheel.

A class says which part of a multiprocessor an instruction keeps busy:

    fp          fp32 and fp16 arithmetic, comparison, packing
    integer     integers, bits, predicates, moves, addresses; the uniform path too
    special     special functions, and conversions that the same slow pipe makes
    global      loads, stores and asynchronous copies of global memory
    shared      loads and stores of shared memory, and of tensor memory
    exchange    between lanes of a warp: shuffles, votes, reductions
    tensor      matrix products
    barrier     barriers of a block
    atomic      atomics and memory fences
    control     branches, calls, reconvergence
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

CLASSES = ("fp", "integer", "special", "global", "shared", "exchange", "tensor", "barrier", "atomic", "control")

_BY_NAME = {
    "fp": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 FHADD FMNMX FMNMX3 FSETP FSEL FSET FCHK FSWZADD F2FP HADD2 HMUL2 HFMA2 HMNMX2 HSETP2"
    " HSET2 DADD DMUL DFMA DSETP",
    "special": "MUFU I2F F2I F2F FRND POPC FLO UFLO UPOPC",
    "global": "LDG STG LD ST LDGSTS UBLKCP UTMALDG UTMASTG LDGDEPBAR LDL STL",
    "shared": "LDS STS LDSM STSM ATOMS LDTM STTM",
    "exchange": "SHFL REDUX CREDUX VOTE VOTEU MATCH ELECT",
    "barrier": "BAR SYNCS UTCBAR",
    "atomic": "ATOM ATOMG RED REDG MEMBAR CCTL CCTLL ERRBAR CGAERRBAR FENCE",
    "control": "BRA BRX JMP EXIT CALL RET BSSY BSYNC BREAK BMOV WARPSYNC ENDCOLLECTIVE NOP NANOSLEEP YIELD KILL DEPBAR WARPGROUP",
}  # fmt: skip
_CLASS = {name: kind for kind, names in _BY_NAME.items() for name in names.split()}
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.M)
_BYTES = 16  # of an instruction
_WIDTH = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """predicate: "" where it is always executed. name: the opcode up to its first dot."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        return "tensor" if "MMA" in self.name else _CLASS.get(self.name, "integer")

    @property
    def target(self) -> int | None:
        """Where a branch leads; the address of a reconvergence point. A call over the one branch behind it is how ptxas leaves a
        loop, and a branch; other calls come back."""
        found = re.findall(r"0x[0-9a-f]+", self.operands) if self.name in ("BRA", "BSSY", "CALL") else []
        address = int(found[-1], 16) if found else None
        return None if self.name == "CALL" and address != self.address + 2 * _BYTES else address

    @property
    def loaded(self) -> int:
        """Bytes that a lane asks global memory for."""
        return self._width if self.name in ("LDG", "LDGSTS", "LD") else 0

    @property
    def stored(self) -> int:
        """Bytes that a lane gives to global memory."""
        return self._width if self.name in ("STG", "ST") else 0

    @property
    def _width(self) -> int:
        return next((_WIDTH[part] for part in self.opcode.split(".") if part in _WIDTH), 4)


def parse(text: str) -> list[Instruction]:
    """The instructions of a listing of one function."""
    found = [Instruction(int(address, 16), p or "", opcode, rest) for address, p, opcode, rest in _LINE.findall(text)]
    return [i for i in found if not (i.name == "BRA" and i.target == i.address)]  # a trap behind the code, and not a loop


def disassemble(cubin: bytes) -> list[Instruction]:
    """Raises RuntimeError where the disassembler gives no instruction."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = parse(text)
    if not found:
        raise RuntimeError(f"{tool}: no instruction in its listing of {len(cubin)} bytes")
    return found
