"""What each kernel compiles to on each architecture, without a GPU: registers, spills, memory, matrix instructions.

The launches are the ops' own: every case calls a public op on CPU tensors under another architecture's launch
configuration, and the launch is compiled instead of run. Each row is keyed by two digests: `source`, of the code of the
kernel and all device functions it can call, and `launch`, of everything else that decides the binary (types and
alignment of arguments, constants, options). `--check` computes both again, without compiling, and compares. A third digest,
`ir`, is of the Triton IR without names: rows whose IR is the same are of the same binary, however the source was rearranged.

    python -m bench.compile                    compile everything and write bench/results/compile.csv
    python -m bench.compile --arch sm_90       the same for one architecture; other rows stay
    python -m bench.compile --changed          compile only what has another IR than its row
    python -m bench.compile --check            are the committed rows those of the code as it is?
    python -m bench.compile --compare OLD.csv  which rows of two reports have another IR, other registers or spills?
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import hashlib
import inspect
import io
import multiprocessing
import operator
import os
import re
import subprocess
import sys
import tempfile
import time
import tokenize
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # kernels imported below are to be compiled

import torch

from bench import compile_ir
from bench.compile_cases import CASES
from dspark_kernels.launch import arch as archs

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "bench" / "results" / "compile.csv"
KERNELS = ROOT / "dspark_kernels" / "kernels"

# --- what a launch is -------------------------------------------------------------------------------------------------


@functools.cache
def code_digest(path: Path, root: Path = KERNELS) -> str:
    """Digest of the code (not comments, docstrings, layout) of a module and of all modules under `root` it imports."""
    seen: dict[str, str] = {}

    def visit(file: Path):
        name = str(file.relative_to(root))
        if name in seen:
            return
        text = file.read_text()
        seen[name] = " ".join(_code_tokens(text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                target = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                for found in (target.with_suffix(".py"), *(target / f"{alias.name}.py" for alias in node.names)):
                    if found.is_file():
                        visit(found)

    visit(path)
    return _digest("\n".join(f"{name}: {code}" for name, code in sorted(seen.items())))


def _code_tokens(text: str):
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in skip]
    start = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for i, token in enumerate(tokens):
        alone = token.type == tokenize.STRING and (i == 0 or tokens[i - 1].type in start)
        if alone and tokens[i + 1].type == tokenize.NEWLINE:
            continue  # a docstring
        yield tokenize.tok_name[token.type] if token.type in start else token.string


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _constant(value) -> str:
    value = getattr(value, "value", value) if type(value).__name__ == "constexpr" else value
    if hasattr(value, "fn"):
        return f"{value.fn.__module__}.{value.fn.__qualname__}"
    return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def _argument(value, parameter) -> str:
    """What the compiler sees of an argument: its type, and whether its value is 1 or a multiple of 16; of a tuple, its parts."""
    if parameter.is_constexpr:
        return f"constant {_constant(value)}"
    if value is None:
        return "None"
    if isinstance(value, tuple):
        return f"({', '.join(_argument(part, parameter) for part in value)})"
    if hasattr(value, "fn") or type(value).__name__ == "constexpr":
        return f"constant {_constant(value)}"  # inside a tuple the type says what is constant
    if isinstance(value, torch.Tensor):
        return f"*{value.dtype}" + (":16" if value.data_ptr() % 16 == 0 else "")
    if isinstance(value, tuple):
        return f"({', '.join(_argument(part, parameter) for part in value)})"
    if isinstance(value, int) and not isinstance(value, bool):
        width = "i32" if -(2**31) <= value < 2**31 else "i64"
        if parameter.do_not_specialize:
            return width
        return f"{width}:1" if value == 1 else f"{width}:16" if value % 16 == 0 else width
    return type(value).__name__


@dataclasses.dataclass(frozen=True)
class Launch:
    """One captured launch: what it is compiled from, its IR, and, if it was compiled, the result and the time it took."""

    kernel: str
    source: str
    launch: str
    ir: str = ""
    compiled: object = None
    seconds: float = 0.0


@contextlib.contextmanager
def capture(arch: str, compiled: bool, ir: bool = False):
    """Within it launches are appended to the list it gives instead of being run; they get an IR or a binary only if asked to."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    original, active = JITFunction.run, driver._active
    done, made = _COMPILED.setdefault(arch, {}), _IR.setdefault(arch, {})

    def run(self, *args, grid, warmup, **kwargs):
        names = {p.name for p in self.params}
        bound = self.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in names})
        bound.apply_defaults()
        text = [f"{p.name} {_argument(bound.arguments[p.name], p)}" for p in self.params]
        text += [f"{k}={_constant(v)}" for k, v in sorted(kwargs.items()) if k not in names]
        file = Path(inspect.getfile(self.fn))
        source = code_digest(file, KERNELS if file.is_relative_to(KERNELS) else file.parent)
        launch = _digest("\n".join(text))
        key = f"{self.fn.__qualname__} {source} {launch}"

        def compile_it():
            self.device_caches.clear()  # it is kept per device, and here one device stands for every target
            return original(self, *args, grid=grid, warmup=True, **kwargs)

        if ir and key not in made:
            options = {k: _constant(v) for k, v in sorted(kwargs.items()) if k not in names}
            made[key] = compile_ir.digest(compile_it, self.fn.__name__, str(options))
        if compiled and key not in done:
            started = time.perf_counter()
            done[key] = compile_it(), time.perf_counter() - started
        launches.append(Launch(self.fn.__name__, source, launch, made.get(key, ""), *done.get(key, ())))

    JITFunction.run = run
    if compiled or ir:
        number = arch.removeprefix("sm_")
        target = GPUTarget("cuda", int(number), 32) if number.isdigit() else GPUTarget("hip", arch, 64)
        driver.set_active(_stub_driver(target))
    try:
        with archs.override(arch):
            yield launches
    finally:
        JITFunction.run = original
        driver._active = active


_COMPILED: dict[str, dict[str, tuple]] = {}  # arch -> launch -> (kernel, seconds): cases may share a binary
_IR: dict[str, dict[str, str]] = {}  # arch -> launch -> digest


def _stub_driver(target):
    """A driver for a GPU that is not there, enough to compile."""
    from triton.backends.driver import DriverBase

    answers = {
        "is_active": True,
        "get_current_target": target,
        "get_active_torch_device": torch.device("cpu"),
        "get_current_device": 0,
        "get_current_stream": 0,
        "set_current_device": None,
        "map_python_to_cpp_type": "",
        "get_device_interface": torch.cpu,
        "get_benchmarker": None,
        "get_empty_cache_for_benchmark": None,
        "clear_cache": None,
    }
    methods = {name: (lambda self, *args, answer=answer: answer) for name, answer in answers.items()}
    return type("OfflineDriver", (DriverBase,), {"__init__": lambda self: None, **methods})()


# --- what a binary is -------------------------------------------------------------------------------------------------


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


# --- the report -------------------------------------------------------------------------------------------------------

KEY = ("op", "case", "kernel", "arch")
DIGESTS = ("source", "launch")
COLUMNS = (
    *KEY, "registers", "spill_stores", "spill_loads", "scalar_spills", "stack", "shared", "shared_limit",
    "matrix_instructions", "binary_bytes", "num_warps", "num_stages", "compile_seconds", *DIGESTS, "ir", "triton",
)  # fmt: skip


def rows_of(arch: str, op: str, compiled: bool, cases: list[str] | None = None, ir: bool = False) -> list[dict]:
    """The report's rows of one op on one architecture, without the measured columns if nothing is compiled."""
    rows = []
    for case, call in CASES[op].items():
        if cases is not None and case not in cases:
            continue
        with capture(arch, compiled, ir or compiled) as launches:
            call()
        # A form of several launches runs one binary again and again.
        if len({(launch.kernel, launch.launch) for launch in launches}) != 1:
            raise RuntimeError(f"{op} {case}: expected one binary, got {[launch.kernel for launch in launches]}")
        launch = launches[0]
        row = dict(op=op, case=case, kernel=launch.kernel, arch=arch, source=launch.source, launch=launch.launch, ir=launch.ir)
        if compiled:
            import triton

            metadata = launch.compiled.metadata
            row.update(inspect_binary(launch.compiled))
            row.update(
                shared=metadata.shared,
                shared_limit=archs.KNOWN[arch].shared_memory,
                num_warps=metadata.num_warps,
                num_stages=metadata.num_stages,
                compile_seconds=f"{launch.seconds:.2f}",
                triton=triton.__version__,
            )
        rows.append({name: str(value) for name, value in row.items()})
    return rows


def problems(row: dict) -> list[str]:
    """What a row may not show: registers kept in memory, or more shared memory than there is.

    AMD's scalar registers (kernels with many arguments run out of them) spill into lanes of vector registers, not into
    memory, as long as the stack is empty; they are reported and not judged.
    """
    where = " ".join(row[name] for name in KEY)
    found = []
    for name in ("spill_stores", "spill_loads", "stack"):
        if int(row[name]):
            found.append(f"{where}: {name} is {row[name]}, must be 0")
    if int(row["shared"]) > int(row["shared_limit"]):
        found.append(f"{where}: {row['shared']} bytes of shared memory, {row['shared_limit']} are there")
    return found


def stale(expected: list[dict], committed: list[dict]) -> list[str]:
    """Where the committed rows are not those of the code."""
    have = {tuple(row[name] for name in KEY): row for row in committed}
    want = {tuple(row[name] for name in KEY): row for row in expected}
    found = [f"{' '.join(key)}: not in the report" for key in want if key not in have]
    found += [f"{' '.join(key)}: in the report, but no such launch" for key in have if key not in want]
    for key in want.keys() & have.keys():
        changed = [name for name in DIGESTS if want[key][name] != have[key][name]]
        if changed:
            found.append(f"{' '.join(key)}: {' and '.join(changed)} changed since it was compiled")
    return sorted(found)


def kept(rows: list[dict], committed: list[dict]) -> tuple[list[dict], list[dict]]:
    """Of rows with an IR and nothing measured: those whose IR is the committed one, with what was measured then; and the others."""
    have = {tuple(row[name] for name in KEY): row for row in committed}
    same, other = [], []
    for row in rows:
        old = have.get(tuple(row[name] for name in KEY), {})
        if old.get("ir") == row["ir"]:
            same.append(old | row)
        else:
            other.append(row)
    return same, other


COMPARED = ("registers", "spill_stores", "spill_loads", "scalar_spills", "stack", "shared", "binary_bytes")


def compare(new: list[dict], old: list[dict]) -> list[str]:
    """Rows of two reports that differ, and last a line of counts. A kernel may have another name."""
    key_of = operator.itemgetter("op", "case", "arch")
    have = {key_of(row): row for row in old}
    found, equal = [], 0
    for row in new:
        before = have.pop(key_of(row), None)
        if before is None:
            found.append(f"{' '.join(key_of(row))}: not in the old report")
        elif before["ir"] and before["ir"] == row["ir"]:
            equal += 1
        else:
            changes = [f"{name} {before[name]} -> {row[name]}" for name in COMPARED if before[name] != row[name]]
            found.append(f"{' '.join(key_of(row))}: another IR; {', '.join(changes) or 'the same registers, spills and sizes'}")
    found += [f"{' '.join(key)}: in the old report alone" for key in have]
    return [*found, f"{len(new)} rows: {equal} with the same IR, {len(found)} others"]


def read(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict]) -> None:
    order = [(op, case) for op in CASES for case in CASES[op]]
    rank = {name: i for i, name in enumerate(archs.KNOWN)}
    rows = sorted(rows, key=lambda row: (order.index((row["op"], row["case"])), rank[row["arch"]]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _compile(arch: str, op: str, cached: bool, cases: list[str] | None, committed: list[dict]) -> list[dict]:
    """Rows of one op on one architecture; those of `committed` that have the same IR are taken from there."""
    import triton

    torch.set_num_threads(1)
    triton.knobs.compilation.always_compile = not cached
    if not committed:
        return rows_of(arch, op, True, cases)
    same, other = kept(rows_of(arch, op, False, cases, ir=True), committed)
    return same + (rows_of(arch, op, True, [row["case"] for row in other]) if other else [])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=archs.KNOWN, help="architecture (repeatable; default: all)")
    parser.add_argument("--op", action="append", choices=CASES, help="op (repeatable; default: all)")
    every_case = sorted({case for op in CASES.values() for case in op})
    parser.add_argument("--case", action="append", choices=every_case, metavar="CASE", help="case (default: all)")
    parser.add_argument("--check", action="store_true", help="compare the report with the code; compile nothing")
    parser.add_argument("--changed", action="store_true", help="compile only launches whose IR is not that of their row")
    parser.add_argument("--compare", type=Path, metavar="OLD.csv", help="compare the report with another one; compile nothing")
    parser.add_argument("--output", type=Path, default=REPORT, metavar="FILE", help="the report (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time (default %(default)s)")
    parser.add_argument("--cached", action="store_true", help="take binaries from Triton's cache where it has them")
    options = parser.parse_args(arguments)
    selected = options.arch or list(archs.KNOWN)
    ops = options.op or list(CASES)

    def is_selected(row):
        return row["arch"] in selected and row["op"] in ops and (not options.case or row["case"] in options.case)

    committed = read(options.output)
    if options.check:
        expected = [row for arch in selected for op in ops for row in rows_of(arch, op, False, options.case)]
        chosen = [row for row in committed if is_selected(row)]
        found = stale(expected, chosen) + [text for row in chosen for text in problems(row)]
        print("\n".join(found) or f"{len(chosen)} rows are fresh")
        return 1 if found else 0

    if options.compare:
        found = compare(*([row for row in rows if is_selected(row)] for rows in (committed, read(options.compare))))
        print("\n".join(found))
        return 1 if len(found) > 1 else 0

    rows, found = [], []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(1, options.jobs), mp_context=context) as pool:
        pending = {
            pool.submit(_compile, arch, op, options.cached, options.case, committed if options.changed else []): (op, arch)
            for arch in selected
            for op in ops
        }
        for future in concurrent.futures.as_completed(pending):
            try:
                new = future.result()
            except Exception as error:
                found.append(f"{' '.join(pending[future])}: {type(error).__name__}: {error}")
                continue
            rows += new
            for row in new:
                print(" ".join(f"{row[name]:>{width}}" for name, width in _SHOWN.items()), flush=True)
                found += problems(row)
    # Rows of cases that are gone go too.
    others = [row for row in committed if not is_selected(row) and row["case"] in CASES.get(row["op"], ())]
    write(options.output, others + rows)
    print("\n".join(found) or f"{len(rows)} launches: no spill, shared memory within limits", file=sys.stderr)
    return 1 if found else 0


_SHOWN = dict(
    op=12, case=22, arch=7, registers=4, spill_stores=5, scalar_spills=4, stack=5, shared=7, matrix_instructions=4,
    binary_bytes=7, num_warps=2, num_stages=2, compile_seconds=6,
)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
