"""Loops that drop a variable, found while Triton's frontend makes the first IR.

A loop must carry what its body rebinds. The frontend finds the carried names by comparing values before and after one pass over the
body: a name that holds another one's value before the loop, and takes that one's over in the body, looks unchanged and is dropped.
The interpreter, which runs the source as Python, cannot see it. Give each loop variable a value of its own before the loop.
"""

from __future__ import annotations


class DroppedCarry(RuntimeError):
    """A loop does not carry what its body rebinds."""


_found: list[str] = []


def refuse() -> None:
    """From now on, in this process, making IR with such a loop raises DroppedCarry."""
    from triton.compiler import code_generator as frontend, compiler

    if hasattr(compiler.ASTSource.make_ir, "refuses"):
        return
    make_ir = compiler.ASTSource.make_ir

    def make_checked_ir(self, *arguments, **options):
        _found.clear()
        module = make_ir(self, *arguments, **options)
        if _found:
            places = ", ".join(sorted(set(_found)))
            raise DroppedCarry(f"{self.fn.__name__}: Triton drops loop variables that the body rebinds: {places}")
        return module

    make_checked_ir.refuses = True
    compiler.ASTSource.make_ir = make_checked_ir
    _watch(frontend)


def _watch(frontend) -> None:
    """Keep in `_found` each loop variable that is dropped: the body sets it, and it held what another, carried name held."""
    find_carries, set_value = frontend.CodeGenerator._find_carries, frontend.CodeGenerator.set_value

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
                _found.append(f"{self.file_name}:{self.begin_line + node.lineno} {name}")
        return result

    frontend.CodeGenerator._find_carries, frontend.CodeGenerator.set_value = finding, setting
