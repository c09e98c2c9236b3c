"""Kernels as Triton's frontend takes them: faults of a kind that the interpreter, which runs the source as Python, cannot see.

- A loop carries what its body rebinds: wherever kernels are compiled, one that does not is refused (tests/machine/carries.py).
- A name has one type in a function, `_` too: where a branch or a loop that runs or not binds it again, both must agree.
- Memory is ordered: who releases has waited for its warps, who acquired lets its warps wait, and where there is nobody to wait for
  the warps of the program still wait for each other.
"""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "dspark_kernels" / "kernels").rglob("*.py"))

# --- names ------------------------------------------------------------------------------------------------------------


def _functions(text: str):
    return [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.decorator_list]


def _is_constant(test: ast.expr, constants: set[str]) -> bool:
    """Whether the frontend decides a condition itself, so that it takes one branch as if it stood alone."""
    if isinstance(test, ast.BoolOp):
        return all(_is_constant(value, constants) for value in test.values)
    if isinstance(test, ast.UnaryOp):
        return _is_constant(test.operand, constants)
    if isinstance(test, ast.Compare):
        if isinstance(test.ops[0], (ast.Is, ast.IsNot)):
            return True
        return all(_is_constant(side, constants) for side in (test.left, *test.comparators))
    if isinstance(test, ast.Attribute):
        return test.attr == "dtype"
    if isinstance(test, ast.Call):
        return isinstance(test.func, ast.Name) and test.func.id in ("is_cuda", "is_hip")
    return isinstance(test, ast.Constant) or isinstance(test, ast.Name) and test.id in constants


def _bound(target: ast.expr):
    """Names that a target binds."""
    if isinstance(target, ast.Name):
        yield target.id
    elif isinstance(target, (ast.Tuple, ast.List)):
        for part in target.elts:
            yield from _bound(part)


def _type(value: ast.expr, unpacked: bool) -> str:
    """What is certain about a bound value: None, a tuple of so many, something else; nothing of what is unpacked or called for."""
    if unpacked or isinstance(value, ast.Call):
        return "unknown"
    if isinstance(value, ast.Constant) and value.value is None:
        return "None"
    return f"tuple of {len(value.elts)}" if isinstance(value, ast.Tuple) else "something"


def names_of_two_types(text: str) -> list[str]:
    """Names that a branch or loop which runs or not binds again: throwaways, which hold anything, and what is certain to change."""
    found = []
    for function in _functions(text):
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        constants = {a.arg for a in arguments if a.annotation is not None and ast.unparse(a.annotation) == "tl.constexpr"}
        constants |= {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and node.id.isupper()}
        bindings: dict[str, list[tuple[int, tuple, str]]] = {}  # line, regions around it that run or not, type

        def visit(statements, regions, constants=constants, bindings=bindings):
            for statement in statements:
                if isinstance(statement, ast.Assign):
                    for target in statement.targets:
                        for name in set(_bound(target)):
                            kind = _type(statement.value, not isinstance(target, ast.Name))
                            bindings.setdefault(name, []).append((statement.lineno, regions, kind))
                if isinstance(statement, (ast.If, ast.For, ast.While)):
                    always = isinstance(statement, ast.If) and _is_constant(statement.test, constants)
                    for branch in ("body", "orelse"):
                        visit(getattr(statement, branch), regions if always else (*regions, (statement.lineno, branch)))

        visit(function.body, ())
        for name, places in bindings.items():
            for (line, outer, kind), (later, inner, other) in itertools.combinations(places, 2):
                shared = len([1 for a, b in zip(outer, inner, strict=False) if a == b])
                again = shared == len(outer) < len(inner)  # bound before, and inside
                either = shared < min(len(outer), len(inner)) and outer[shared][0] == inner[shared][0]  # in both branches
                if (again or either) and (name.startswith("_") or "unknown" not in (kind, other) and kind != other):
                    found.append(f"{function.name}: {name} bound in lines {line} and {later}")
    return found


def test_names_have_one_type():
    found = [f"{path.relative_to(ROOT)} {place}" for path in KERNELS for place in names_of_two_types(path.read_text())]
    assert not found, "give each a name of its own"


@pytest.mark.parametrize(
    "body, name",
    [
        ("_, a = pair\n    if a > 0:\n        _, b = other", "_"),
        ("_, a = pair\n    for i in range(n):\n        _, b = other", "_"),
        ("if n > 0:\n        _, a = pair\n    else:\n        _, a = other", "_"),
        ("_, a = pair\n    if other is not None:\n        if n > 0:\n            _, b = other", "_"),
        ("a = None\n    while n > 0:\n        a = n", "a"),
        ("a = (n, n)\n    if n > 0:\n        a = (n, n, n)", "a"),
        ("_, a = pair\n    if other is not None:\n        _, b = other", None),
        ("_, a = pair\n    if FORM == 1 and not FLAG:\n        _, b = other", None),
        ("if n > 0:\n        _, a = pair\n    if n > 1:\n        _, a = other", None),
        ("if n > 0:\n        a = None\n        if other is not None:\n            a = n", None),
        ("_, a = pair\n    _, b = other\n    if a > 0:\n        _c, d = other", None),
        ("a = n\n    if n > 0:\n        a = n + 1", None),
    ],
)
def test_a_second_type_is_seen(body, name):
    text = f"@triton.jit\ndef f(x, n, pair, other, FORM: tl.constexpr):\n    {body}\n"
    assert [place.split()[1] for place in names_of_two_types(text)] == ([] if name is None else [name])


# --- order of memory --------------------------------------------------------------------------------------------------

WAITS = ("tl.debug_barrier", "stores_done", "grid_barrier")  # after them every warp of the program has come this far
PROGRAM_ENDS = ("finish_item",)  # nothing is read behind it


def _events(node: ast.AST):
    """(what, line) of a function's calls in the order of the source, arguments first: wait, load, store, relaxed, release, acquire,
    acq_rel, or call, of anything that may do some of these."""
    for child in ast.iter_child_nodes(node):
        yield from _events(child)
    if not isinstance(node, ast.Call):
        return
    name = ast.unparse(node.func)
    if name in WAITS:
        yield "wait", node.lineno
    elif name.startswith("tl.atomic_"):
        yield next((k.value.value for k in node.keywords if k.arg == "sem"), "acq_rel"), node.lineno
    elif name in ("tl.load", "tl.store"):
        yield name.removeprefix("tl."), node.lineno
    elif isinstance(node.func, ast.Name) and name not in ("range", "len"):
        yield "call", node.lineno


def _by_grid_size(function: ast.FunctionDef):
    """Conditions on how many programs there are, but for calls, which have waits of their own."""
    sizes = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("tl.num_programs")
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.If) and "call" not in {what for what, _ in _events(node.test)}:
            if any(isinstance(n, ast.Name) and n.id in sizes or ast.unparse(n) == "tl.num_programs" for n in ast.walk(node.test)):
                yield node


def unordered(text: str) -> list[str]:
    """Where a release may pass what other warps stored, where other warps may read before what was acquired, and where a program
    whose grid is small goes on without its warps having waited."""
    found = []
    for function in _functions(text):
        events = list(_events(function))
        for number, (what, line) in enumerate(events):
            before, behind = [e for e, _ in events[:number]], [e for e, _ in events[number + 1 :]]
            if what in ("release", "acq_rel") and before[-1:] != ["wait"]:
                found.append(f"{function.name}, line {line}: no wait directly before a release")
            if what in ("acquire", "acq_rel"):
                # The loop that asks again, and counters put back by the last to arrive, may come between.
                first = next((e for e in behind if e not in ("acquire", "store")), "end")
                if first != "wait" and not (first == "end" and function.name in PROGRAM_ENDS):
                    found.append(f"{function.name}, line {line}: no wait between an acquire and what is read after it")
        for condition in _by_grid_size(function):
            inside, otherwise = (
                [e for statement in branch for e, _ in _events(statement)] for branch in (condition.body, condition.orelse)
            )
            before = [e for e, line in events if line < condition.lineno]
            if {"wait", "release", "acquire"} & set(inside) and before[-1:] != ["wait"] and "wait" not in otherwise:
                found.append(f"{function.name}, line {condition.lineno}: no wait where there is no other program")
    return found


def test_memory_is_ordered_around_releases_and_acquires():
    found = [f"{path.relative_to(ROOT)} {place}" for path in KERNELS for place in unordered(path.read_text())]
    assert not found


def test_every_atomic_names_its_order():
    for path in KERNELS:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if ast.unparse(call.func).startswith("tl.atomic_"):
                assert "sem" in {keyword.arg for keyword in call.keywords}, f"{path.relative_to(ROOT)}:{call.lineno}"


END = "# end"


def _without(file: str, line: str, behind: str) -> str:
    """Source without the one line that comes right before `behind`, or before the end of the file."""
    text = (ROOT / "dspark_kernels" / "kernels" / file).read_text() + END
    assert text.count(line + behind) == 1, (file, line)
    return text.replace(line + behind, behind).removesuffix(END)


def test_a_missing_wait_is_seen():
    sync, fence, wait = "primitives/sync.py", "    stores_done()\n", "    tl.debug_barrier()\n"
    inside = _without(sync, fence, "    if programs > 1:").replace("if programs > 1:\n", f"if programs > 1:\n    {fence}")
    found = {
        "left out for a grid of one": unordered(inside),
        "before a release": unordered(_without("accept/dense.py", fence, "    tl.atomic_add(ready_ptr, 1")),
        "before an arrival": unordered(_without(sync, fence, "    last = ")),
        "behind an arrival": unordered(_without(sync, wait, "    return last")),
        "behind a wait for items": unordered(_without(sync, wait, "    return now")),
        "behind a grid barrier": unordered(_without(sync, f"    {wait}", END)),
    }
    # Two acquires are before a missing wait: the first try, and those of the loop.
    expected = dict.fromkeys(found, 1) | {"behind a wait for items": 2}
    assert {name: len(places) for name, places in found.items()} == expected, found
