"""A launch of an op, captured on another architecture's configuration instead of being run; compiled, if asked for.

Two digests say what decides the binary: `source`, of the code of the kernel and of all device functions it can call, and `launch`, of
everything else (types and alignment of arguments, constants, options). A third, `ir`, is of the Triton IR without names.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import time
import tokenize
from pathlib import Path

import torch

from bench.shared.offline import ir as irs
from bench.shared.paths import ROOT
from dspark_kernels.launch import arch as archs

KERNELS = ROOT / "dspark_kernels" / "kernels"


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
    if isinstance(value, int) and not isinstance(value, bool):
        width = "i32" if -(2**31) <= value < 2**31 else "i64"
        if parameter.do_not_specialize:
            return width
        return f"{width}:1" if value == 1 else f"{width}:16" if value % 16 == 0 else width
    return type(value).__name__


def _flat(constants: dict) -> dict:
    """Constants with those of a NamedTuple under the names of its fields."""
    found = {}
    for name, value in constants.items():
        found |= _flat(value._asdict()) if hasattr(value, "_asdict") else {name: value}
    return found


@dataclasses.dataclass(frozen=True)
class Launch:
    """One captured launch: what it is compiled from, its grid and constants, its IR, and, if it was compiled, the result and the
    time it took."""

    kernel: str
    source: str
    launch: str
    grid: tuple[int, ...] = ()
    constants: dict = dataclasses.field(default_factory=dict)  # constexprs of the kernel; a record's by the names of its fields
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
            made[key] = irs.digest(compile_it, self.fn.__name__, str(options))
        if compiled and key not in done:
            started = time.perf_counter()
            done[key] = compile_it(), time.perf_counter() - started
        constants = {p.name: bound.arguments[p.name] for p in self.params if p.is_constexpr}
        launches.append(
            Launch(self.fn.__name__, source, launch, tuple(grid), _flat(constants), made.get(key, ""), *done.get(key, ()))
        )

    JITFunction.run = run
    if compiled or ir:
        number = arch.removeprefix("sm_")
        target = GPUTarget("cuda", int(number), 32) if number.isdigit() else GPUTarget("hip", arch, 64)
        driver.set_active(stub_driver(target))
    try:
        with archs.override(arch):
            yield launches
    finally:
        JITFunction.run = original
        driver._active = active


_COMPILED: dict[str, dict[str, tuple]] = {}  # arch -> launch -> (kernel, seconds): cases may share a binary
_IR: dict[str, dict[str, str]] = {}  # arch -> launch -> digest


def stub_driver(target):
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
