"""A fault of Triton before 3.7, mended where it is met: kernels cannot ask whether a tuple is None if the tuple holds a None."""

from __future__ import annotations


def mend() -> None:
    """Let `x is None` compile for every tuple x; changes nothing where it does (Triton 3.7 and newer). Needs Triton.

    A comparison unwraps its operands. Old versions make the tuple anew from its bare elements and derive its type from theirs, and
    a bare None has none: compiling ends with "'NoneType' object has no attribute 'type'". Newer ones keep the type, as done here.
    """
    from triton.compiler import code_generator
    from triton.language import core

    stock = code_generator._unwrap_if_constexpr

    def unwrap(value):
        if isinstance(value, core.tuple):
            return core.tuple([unwrap(element) for element in value.values], value.type)
        return stock(value)

    try:
        stock(core.tuple([core.constexpr(None)]))
    except AttributeError:
        code_generator._unwrap_if_constexpr = unwrap
