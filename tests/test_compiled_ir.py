"""Kernels as Triton's frontend takes them: faults of a kind that the interpreter, which runs the source as Python, cannot see.

- A loop carries what its body rebinds. The frontend finds the carried names by comparing values before and after one pass over the
  body: a name that holds another one's value before the loop, and takes that one's over in the body, looks unchanged and is dropped.
- A name has one type in a function, `_` too: where a branch or a loop that runs or not binds it again, both must agree.
- Memory is ordered: who releases has waited for its warps, who acquired lets its warps wait, and where there is nobody to wait for
  the warps of the program still wait for each other.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "dspark_kernels" / "kernels").rglob("*.py"))

# --- loops: every launch of bench/compile_cases.py, and a planted one, as far as the first IR -------------------------

PLANTED = '''
import triton
import triton.language as tl


@triton.jit
def follow(next_ptr, out_ptr, ALIAS: tl.constexpr, PAIR: tl.constexpr, FOR: tl.constexpr):
    node = tl.zeros((), tl.int32)
    child = tl.zeros((), tl.int32)
    if ALIAS:
        child = node
    pair = (node, node + 1)
    if PAIR:
        node = child + 2
    if FOR:
        for _ in range(tl.load(next_ptr)):
            node = child
            child = tl.load(next_ptr + child)
    else:
        while child < 8:
            if PAIR:
                pair = (child, pair[1])
            else:
                node = child
            child = tl.load(next_ptr + child)
    tl.store(out_ptr, node + pair[0])
'''


def dropped_carries(run) -> list[str]:
    """Loops met while `run` makes IR that drop a name which their body sets to what another, carried name held."""
    from triton.compiler import code_generator as frontend

    find_carries, set_value = frontend.CodeGenerator._find_carries, frontend.CodeGenerator.set_value
    found = []

    def setting(self, name, value):
        for names in getattr(self, "_names_set", ()):
            names.add(name)
        return set_value(self, name, value)

    def finding(self, node, liveins, ignore=frozenset()):
        stack = self.__dict__.setdefault("_names_set", [])
        stack.append(set())
        try:
            result = find_carries(self, node, liveins, ignore)
        finally:
            assigned = stack.pop()
        carried, handles = result[0], result[1]
        for name in assigned - set(carried) - set(ignore):
            value = liveins.get(name)
            if value is None or not frontend._is_triton_value(value):
                continue
            if any(own == other for own in frontend.flatten_values_to_ir([value]) for other in handles):
                found.append(f"{self.file_name}:{self.begin_line + node.lineno} {name}")
        return result

    frontend.CodeGenerator._find_carries, frontend.CodeGenerator.set_value = finding, setting
    try:
        run()
    finally:
        frontend.CodeGenerator._find_carries, frontend.CodeGenerator.set_value = find_carries, set_value
    return sorted(set(found))


class _Made(Exception):
    """The first IR of a launch is there."""


def scan(folder: str) -> dict:
    """In a process of its own: what is found in a planted kernel and in every launch, and how many launches there were."""
    from triton.compiler import compiler

    from bench import compile as bench_compile
    from dspark_kernels.kernels import schedule  # noqa: F401  (the package before its cases)

    make_ir, made, errors = compiler.ASTSource.make_ir, [], []

    def stop(self, *args, **kwargs):
        make_ir(self, *args, **kwargs)
        made.append(self.fn.__name__)
        raise _Made

    def until_ir(call, name):
        try:
            call()
        except _Made:
            return
        except Exception as error:
            errors.append(f"{name}: {type(error).__name__} {error}"[:500])
        else:
            errors.append(f"{name}: no launch was compiled")

    def every_case():
        for op, cases in bench_compile.CASES.items():
            for case, call in cases.items():
                until_ir(call, f"{op} {case}")

    compiler.ASTSource.make_ir = stop
    with bench_compile.capture("sm_80", True):
        sys.path.insert(0, folder)
        import planted
        import torch

        ints = torch.zeros(16, dtype=torch.int32)
        planted_found = {
            name: dropped_carries(lambda constants=constants: until_ir(lambda: planted.follow[(1,)](ints, ints, *constants), "planted"))
            for name, constants in dict(
                right=(False, False, False), pair_right=(False, True, False), alias=(True, False, False), alias_for=(True, False, True),
                pair=(True, True, False),
            ).items()
        }  # fmt: skip
        planted_made = len(made)
        found = dropped_carries(every_case)
    return dict(planted=planted_found, found=found, launches=len(made) - planted_made, errors=errors)


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.py").write_text(PLANTED)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(scan(sys.argv[1])))
