"""The machine's core as Python sees it: it is built here at first use, then parses PTX and runs launches.

The core is C++ (core/*.cpp). Its library lies in a cache folder under a name that holds a hash of the sources, of the compiler and of the
CPU it was built for, so it is never stale and never shared by unlike machines.
"""

from __future__ import annotations

import collections
import concurrent.futures
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).with_name("core")
COMPILER = "g++"
FLAGS = "-std=c++17 -O3 -march=native -ffp-contract=off -fno-math-errno -fno-strict-aliasing -Wall -fPIC".split()
CPU_FLAGS = ("avx2", "fma", "f16c")  # what the core uses by name


class MachineError(RuntimeError):
    """PTX that the machine does not know, a launch that went wrong, or no library."""


# --- the library --------------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where the library and compiled kernels are kept: $DSPARK_MACHINE_CACHE, else the user's cache folder."""
    if folder := os.environ.get("DSPARK_MACHINE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspark_kernels" / "machine"


def available() -> str | None:
    """None where the machine can run; else the reason why it cannot."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return f"the machine needs Linux on x86-64, not {platform.system()} on {platform.machine()}"
    if missing := [flag for flag in CPU_FLAGS if flag not in _cpu().split()]:
        return f"the machine needs a CPU with {', '.join(missing)}"
    if shutil.which(COMPILER) is None and _built() is None:
        return f"the machine needs {COMPILER}"
    return None


@functools.cache
def _cpu() -> str:
    """The CPU's flags: code built for this CPU runs on those that have the same."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("flags")), "")


@functools.cache
def _compiler() -> str:
    """The compiler's version, "" without one."""
    if shutil.which(COMPILER) is None:
        return ""
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _source_digest() -> str:
    files = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])
    parts = [part for file in files for part in (file.name.encode(), file.read_bytes())]
    return _digest(*parts, " ".join(FLAGS).encode(), _cpu().encode())


def _built() -> Path | None:
    """The library for these sources and this CPU, if it is there; without a compiler, whichever compiler built it."""
    compiler = _digest(_compiler().encode()) if _compiler() else "*"
    return next(iter(sorted(cache_folder().glob(f"core-{_source_digest()}-{compiler}.so"))), None)


def build() -> Path:
    """The library, built if it is not there. Of several processes at once one builds it, and the others wait for it."""
    if (built := _built()) is not None:
        return built
    if (reason := available()) is not None:
        raise MachineError(reason)
    import fcntl  # Linux has it, and elsewhere there is no machine

    target = cache_folder() / f"core-{_source_digest()}-{_digest(_compiler().encode())}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "building.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _built() is None:
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as folder:
                _compile(Path(folder), target)
    return target


def _compile(folder: Path, target: Path) -> None:
    """Build the library, a file per CPU core at a time."""
    sources = sorted(SOURCES.glob("*.cpp"))
    objects = [str(folder / source.with_suffix(".o").name) for source in sources]
    commands = [[COMPILER, *FLAGS, "-c", str(source), "-o", made] for source, made in zip(sources, objects, strict=True)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(_run_compiler, commands):
            pass
    made = str(folder / target.name)
    _run_compiler([COMPILER, "-shared", *objects, "-o", made])
    os.replace(made, target)


def _run_compiler(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise MachineError(f"{' '.join(command)}\n{done.stderr}")


_FIND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint64))


class _Request(ctypes.Structure):
    """core/machine.h has the same."""

    _fields_ = [
        *((name, ctypes.c_int32 * 3) for name in ("grid", "threads")),
        *((name, ctypes.c_uint64) for name in "parameters storages find_storage counters counts seed stall".split()),
        *((name, ctypes.c_int32) for name in """parameter_bytes storage_count shared cooperative quantum run_ahead resident shuffle
            bounds races uninitialised weak flush evict copies sectors bank_conflicts max_reports detail""".split()),
    ]  # fmt: skip


@functools.cache
def _library():
    library = ctypes.CDLL(str(build()))
    integer, text, handle = ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p
    for name, result, arguments in (
        ("machine_parse", handle, [text, text, integer]),
        ("machine_free", None, [handle]),
        ("machine_number", integer, [handle, integer, integer]),
        ("machine_source", text, [handle, integer]),
        ("machine_opcodes", text, [handle]),
        ("machine_counter", text, [integer]),
        ("machine_class", text, [integer]),
        ("machine_request_bytes", integer, []),
        ("machine_run", integer, [handle, ctypes.POINTER(_Request)]),
        ("machine_error", text, []),
        ("machine_reports", text, []),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    assert library.machine_request_bytes() == ctypes.sizeof(_Request)
    return library


@functools.cache
def _names(function: str) -> list[str]:
    names = []
    while name := getattr(_library(), function)(len(names)):
        names.append(name.decode())
    return names


# --- kernels ------------------------------------------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    offset: int
    size: int
    is_pointer: bool


# What machine_number answers.
_PARAMETERS, _PARAMETER_BYTES, _OFFSET, _SIZE, _IS_POINTER, _THREADS, _INSTRUCTIONS, _LINE, _SOURCE, _REGISTER_BYTES = range(10)


class Kernel:
    """A kernel, parsed. Raises MachineError for PTX that the machine does not know, naming line and instruction."""

    def __init__(self, name: str, ptx: str):
        self.name, self.ptx = name, _with_folders(ptx)
        self._handle = None
        error = ctypes.create_string_buffer(4096)
        self._handle = _library().machine_parse(self.ptx.encode(), error, len(error))
        if not self._handle:
            raise MachineError(f"{name}: {error.value.decode(errors='replace')}")
        kinds = (_OFFSET, _SIZE, _IS_POINTER)
        rows = [[self._number(kind, i) for kind in kinds] for i in range(self._number(_PARAMETERS))]
        self.parameters = [Parameter(offset, size, bool(is_pointer)) for offset, size, is_pointer in rows]
        self.parameter_bytes = self._number(_PARAMETER_BYTES)
        self.threads = tuple(self._number(_THREADS, axis) for axis in range(3))
        self.size = self._number(_INSTRUCTIONS)
        self.register_bytes = self._number(_REGISTER_BYTES)  # of a warp

    def __del__(self):
        if self._handle:
            _library().machine_free(self._handle)

    def _number(self, what: int, index: int = 0) -> int:
        return _library().machine_number(self._handle, what, index)

    def opcodes(self) -> collections.Counter:
        """How often the text has each opcode."""
        pairs = (line.rsplit(" ", 1) for line in _library().machine_opcodes(self._handle).decode().splitlines())
        return collections.Counter({opcode: int(number) for opcode, number in pairs})

    def lines(self, counts, depth: int = 1) -> collections.Counter:
        """Warp instructions by source line (file:line, the innermost `depth` frames), of a Run's counts."""
        found = collections.Counter()
        for i in range(self.size):
            if counts[i]:
                frames = _library().machine_source(self._handle, i).decode().replace(" ]", "").split(" @")
                found[" @ ".join(frame.strip("[ ").rsplit(":", 1)[0] for frame in frames[:depth])] += counts[i]
        return found

    def profile(self, counts, top: int = 25) -> list[tuple[int, int, int, str]]:
        """The instructions that warps ran most: (warp instructions, thread instructions, line of the PTX, its text)."""
        text = self.ptx.split("\n")
        rows = []
        for i in sorted(range(self.size), key=lambda i: -counts[i])[:top]:
            line = self._number(_LINE, i)
            rows.append((counts[i], counts[self.size + i], line, text[line - 1].strip()))
        return rows


# --- launches -----------------------------------------------------------------------------------------------------------------------


class Report(NamedTuple):
    kind: str  # race.shared, race.global, race.within, race.proxy, misaligned, bounds, trap, uninitialised, benign, intra_warp, ...
    text: str


def _with_folders(ptx: str) -> str:
    """The text with the folder of a source file before its name in comments of .loc: names alone occur twice."""
    folders = {number: path.split("/")[-2] for number, path in re.findall(r'^\t\.file\t(\d+) "([^"]*/[^"]*)"', ptx, re.M)}
    return re.sub(
        r"(\.loc\t(\d+) .*?// )(?=\w)", lambda found: f"{found[1]}{folders[found[2]]}/" if found[2] in folders else found[0], ptx
    )


class Run(NamedTuple):
    """What a launch did."""

    code: int  # 0: it ended well
    error: str
    reports: list[Report]
    counters: dict[str, int]
    warp_classes: dict[str, int]  # warp instructions by class
    thread_classes: dict[str, int]
    counts: ctypes.Array  # per instruction, warp instructions; then the same for thread instructions
    seconds: float


_COPIES = ("at_once", "at_the_wait", "either")


def run(kernel: Kernel, grid, arguments, storages, settings, *, shared: int, cooperative: bool, find_storage=None) -> Run:
    """Run a launch to its end, or to the fault that stops it.

    arguments: the bytes of every parameter. storages: (low, high) of all memory that the launch may touch. find_storage: is asked for
    addresses outside, and returns the (low, high) around one, or None.
    """
    block = _parameter_block(kernel, arguments)
    spans = (ctypes.c_uint64 * (2 * len(storages) + 1))(*[bound for span in sorted(storages) for bound in span])
    names, classes = _names("machine_counter"), _names("machine_class")
    counters = (ctypes.c_uint64 * (len(names) + 2 * len(classes)))()
    counts = (ctypes.c_uint64 * (2 * kernel.size))()
    failed = []

    def find(address, low, high):
        try:
            span = find_storage(address)
        except BaseException as error:  # it cannot pass through C++: raised again below
            failed.append(error)
            return 0
        if span is None:
            return 0
        low[0], high[0] = span
        return 1

    callback = _FIND(find) if find_storage is not None else None
    request = _Request(
        grid=tuple(grid), threads=kernel.threads, parameters=ctypes.addressof(block), parameter_bytes=kernel.parameter_bytes,
        storages=ctypes.addressof(spans), storage_count=len(storages), counters=ctypes.addressof(counters),
        counts=ctypes.addressof(counts), shared=shared, cooperative=cooperative,
        find_storage=ctypes.cast(callback, ctypes.c_void_p).value if callback else 0, copies=_COPIES.index(settings.copies),
    )  # fmt: skip
    for name, _ in _Request._fields_:
        if name != "copies" and hasattr(settings, name):
            setattr(request, name, getattr(settings, name))
    started = time.perf_counter()
    code = _library().machine_run(kernel._handle, ctypes.byref(request))
    seconds = time.perf_counter() - started
    if failed:
        raise failed[0]
    numbers = list(counters)
    totals = dict(zip(names, numbers[: len(names)], strict=True))
    of_warps = dict(zip(classes, numbers[len(names) : -len(classes)], strict=True))
    of_threads = dict(zip(classes, numbers[-len(classes) :], strict=True))
    return Run(code, _library().machine_error().decode(errors="replace"), _reports(), totals, of_warps, of_threads, counts, seconds)


def _parameter_block(kernel: Kernel, arguments):
    if len(arguments) != len(kernel.parameters):
        raise MachineError(f"{kernel.name}: {len(kernel.parameters)} parameters, {len(arguments)} arguments")
    block = bytearray(kernel.parameter_bytes + 16)
    for (offset, size, _), value in zip(kernel.parameters, arguments, strict=True):
        if any(value[size:]):
            raise MachineError(f"{kernel.name}: an argument of {len(value)} bytes for a parameter of {size}")
        block[offset : offset + min(size, len(value))] = value[:size]
    return (ctypes.c_char * len(block)).from_buffer(block)


def _reports() -> list[Report]:
    text = _library().machine_reports().decode(errors="replace")
    return [Report(*record.split("\x1f", 1)) for record in text.split("\x1e") if record]
