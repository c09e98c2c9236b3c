"""The machine's library: built by g++ at first use, called through ctypes.

A `Kernel` is a parsed PTX text; `run` executes one launch of it on given memory and says what it did.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .settings import Settings

SOURCES = Path(__file__).resolve().parent / "ptx"
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC")


class MachineError(RuntimeError):
    """A kernel that the machine cannot run, or a launch that went wrong."""


class Parameter(NamedTuple):
    offset: int
    size: int
    is_pointer: bool


class Report(NamedTuple):
    kind: str  # "race.shared", "race.global", "race.within", "bounds", "misaligned", "trap", "uninitialised", "benign", "intra_warp"
    text: str


class Run(NamedTuple):
    """What one launch did. counts: per instruction, how often a warp ran it, then how many threads did."""

    code: int  # 0 = ended well
    error: str
    reports: list[Report]
    counters: dict[str, int]
    warp_classes: dict[str, int]
    thread_classes: dict[str, int]
    counts: ctypes.Array
    seconds: float


# In the order of ptx/machine.h.
COUNTERS = (
    "warp_instructions", "thread_instructions", "load_sectors", "store_sectors", "atomic_sectors", "load_requests", "store_requests",
    "atomic_requests", "load_bytes", "store_bytes", "atomic_threads", "block_barriers", "distinct_read_sectors",
    "distinct_written_sectors", "shared_loads", "shared_stores", "shared_load_conflicts", "shared_store_conflicts", "divergences",
    "benign", "uninitialised", "races", "intra_warp", "races_within", "races_unchecked",
)  # fmt: skip
CLASSES = (
    "int", "fp32", "sfu", "cvt", "mov", "pred", "ld.global", "st.global", "ld.shared", "st.shared", "atom", "mma", "ldmatrix", "shfl",
    "bar", "branch", "cp.async", "param", "other",
)  # fmt: skip
COPIES = ("at_once", "at_the_wait", "either")


class _Config(ctypes.Structure):
    """As `Config` of ptx/machine.h."""

    _fields_ = [
        ("grid", ctypes.c_int32 * 3),
        ("threads", ctypes.c_int32 * 3),
        ("parameters", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("parameter_bytes", "shared", "cooperative")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("quantum", "resident", "bounds", "races", "weak", "uninitialised", "count", "copies")),
        *((name, ctypes.c_int32) for name in ("flush", "evict", "shuffle")),
        *((name, ctypes.c_uint64) for name in ("most_instructions", "stall")),
        *((name, ctypes.c_int32) for name in ("max_reports", "detail")),
        ("ranges", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("range_count", "run_ahead")),
        *((name, ctypes.c_uint64) for name in ("find_storage", "counters", "instruction_counts")),
    ]


_FIND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint64))

# --- the library ------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where the library and compiled kernels are kept."""
    if folder := os.environ.get("DSPARK_MACHINE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspark_kernels" / "machine"


def available() -> str | None:
    """None where the machine can run; else why it cannot."""
    if _path().exists() or shutil.which("g++"):
        return None
    return "g++ is not installed"


@functools.cache
def _path() -> Path:
    """The library of these sources, this compiler and this processor: never stale, never taken to an unlike machine."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted(SOURCES.glob("*.[hc]*")):
        digest.update(source.read_bytes())
    if shutil.which("g++"):
        for question in (["-dumpfullversion"], ["-march=native", "-Q", "--help=target"]):
            digest.update(subprocess.run(["g++", *question], capture_output=True, check=True).stdout)
    return cache_folder() / f"ptx-{digest.hexdigest()[:16]}.so"


@functools.cache
def library() -> ctypes.CDLL:
    path = _path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")  # several processes may build at once: the last rename wins
        command = ["g++", *FLAGS, str(SOURCES / "interface.cpp"), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise MachineError(f"{' '.join(command)}\n{done.stderr}")
        os.replace(partial, path)
    loaded = ctypes.CDLL(str(path))
    loaded.machine_parse.restype = ctypes.c_void_p
    loaded.machine_parse.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
    loaded.machine_info.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    for name in ("machine_error", "machine_reports", "machine_source", "machine_opcodes"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.machine_source.argtypes = [ctypes.c_void_p, ctypes.c_int]
    loaded.machine_opcodes.argtypes = [ctypes.c_void_p]
    loaded.machine_launch.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Config)]
    sizes = (loaded.machine_config_size(), loaded.machine_counter_count())
    if sizes != (ctypes.sizeof(_Config), len(COUNTERS) + 2 * len(CLASSES)):
        raise MachineError(f"binding.py and ptx/machine.h differ: {sizes}")
    return loaded


# --- kernels and launches ---------------------------------------------------------------------------------------------


class Kernel:
    """A parsed kernel. Raises MachineError for an instruction that the machine does not know."""

    def __init__(self, name: str, ptx: str):
        self.name, self.ptx = name, ptx
        error = ctypes.create_string_buffer(4096)
        self.handle = library().machine_parse(ptx.encode(), error, 4096)
        if not self.handle:
            raise MachineError(f"{name}: {error.value.decode()}")
        count = self._info(0)
        self.parameters = [Parameter(self._info(2, i), self._info(3, i), bool(self._info(4, i))) for i in range(count)]
        self.parameter_bytes = self._info(1)
        self.threads = tuple(self._info(5, i) for i in range(3))
        self.size = self._info(6)

    def _info(self, what: int, i: int = 0) -> int:
        return library().machine_info(self.handle, what, i)

    def opcodes(self) -> collections.Counter:
        """How often each opcode stands in the text."""
        found = collections.Counter()
        for line in library().machine_opcodes(self.handle).decode().splitlines():
            opcode, number = line.rsplit(" ", 1)
            found[opcode] += int(number)
        return found

    def lines(self, counts, depth: int = 1) -> collections.Counter:
        """Warp instructions by source line, "file:line"; depth: how many of the calls that led there to name as well."""
        found = collections.Counter()
        for i in range(self.size):
            if counts[i]:
                frames = library().machine_source(self.handle, self._info(11, i)).decode().replace(" ]", "").split(" @")
                where = [frame.strip("[ ").rsplit(":", 1)[0] for frame in frames[:depth]]
                found[" @ ".join(where)] += counts[i]
        return found

    def profile(self, counts, top: int = 25) -> list[tuple[int, int, str]]:
        """The instructions that warps ran most often: (warps, threads, text)."""
        text = self.ptx.split("\n")
        most = sorted(range(self.size), key=lambda i: -counts[i])[:top]
        return [(counts[i], counts[self.size + i], text[self._info(9, i) - 1].strip()) for i in most]


def run(
    kernel: Kernel,
    grid: tuple[int, int, int],
    arguments: list[bytes],
    storages: list[tuple[int, int]],
    settings: Settings,
    *,
    shared: int,
    cooperative: bool,
    find_storage: Callable[[int], tuple[int, int] | None] | None = None,
) -> Run:
    """Execute a launch. arguments: each parameter's bytes. storages: address spans [low, high) that may be touched, ascending and
    apart. find_storage: asked for the span of an address outside them; None where it belongs to nobody."""
    if len(arguments) != len(kernel.parameters):
        raise MachineError(f"{kernel.name}: {len(kernel.parameters)} parameters, {len(arguments)} arguments")
    block = bytearray(kernel.parameter_bytes + 16)
    for parameter, value in zip(kernel.parameters, arguments, strict=True):
        if any(value[parameter.size :]):
            raise MachineError(f"{kernel.name}: an argument of {len(value)} bytes for a parameter of {parameter.size}")
        block[parameter.offset : parameter.offset + min(parameter.size, len(value))] = value[: parameter.size]

    def found(address, low, high):
        span = find_storage(address) if find_storage else None
        if span is None:
            return 0
        low[0], high[0] = span
        return 1

    spans = (ctypes.c_uint64 * (2 * len(storages) + 2))(*(address for span in storages for address in span))
    counters = (ctypes.c_uint64 * (len(COUNTERS) + 2 * len(CLASSES) + 8))()
    counts = (ctypes.c_uint64 * (2 * kernel.size))()
    memory = (ctypes.c_char * len(block)).from_buffer(block)
    callback = _FIND(found)
    config = _Config(
        grid=tuple(grid), threads=kernel.threads, parameters=ctypes.addressof(memory), parameter_bytes=kernel.parameter_bytes,
        shared=shared, cooperative=cooperative, seed=settings.seed, quantum=settings.quantum, resident=settings.resident,
        bounds=settings.bounds, races=settings.races, weak=settings.weak, uninitialised=2 * settings.uninitialised,
        count=2 if settings.bank_conflicts else int(settings.sectors), copies=COPIES.index(settings.copies), flush=settings.flush,
        evict=settings.evict, shuffle=settings.shuffle, most_instructions=1 << 62, stall=settings.stall,
        max_reports=settings.max_reports, detail=3 * settings.detail, ranges=ctypes.addressof(spans), range_count=len(storages),
        run_ahead=settings.run_ahead, find_storage=ctypes.cast(callback, ctypes.c_void_p).value,
        counters=ctypes.addressof(counters), instruction_counts=ctypes.addressof(counts),
    )  # fmt: skip
    started = time.perf_counter()
    code = library().machine_launch(kernel.handle, ctypes.byref(config))
    seconds = time.perf_counter() - started
    lines = library().machine_reports().decode(errors="replace").splitlines()
    first, second = len(COUNTERS), len(COUNTERS) + len(CLASSES)
    return Run(
        code,
        library().machine_error().decode(errors="replace") if code else "",
        [Report(*line.split(": ", 1)) for line in lines],
        dict(zip(COUNTERS, counters[:first], strict=True)),
        dict(zip(CLASSES, counters[first:second], strict=True)),
        dict(zip(CLASSES, counters[second : second + len(CLASSES)], strict=True)),
        counts,
        seconds,
    )
