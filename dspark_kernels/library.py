"""Registration of the ops with torch.library (namespace `dspark`) and the way to their kernels.

One definition per op: a schema that lists every tensor written, one implementation for all devices, and a fake that does
nothing because outputs are passed in. That passes opcheck and torch.compile(fullgraph=True) at the lowest call overhead.
"""

from __future__ import annotations

import functools
import importlib

import torch

from .launch import arch

_LIBRARY = torch.library.Library("dspark", "DEF")


def register(schema: str):
    """Define `dspark::<schema>` with the decorated function as implementation; returns the op's callable overload."""

    def decorate(implementation):
        name = schema.split("(", 1)[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dspark::{name}", lambda *args, **kwargs: None, lib=_LIBRARY)
        return getattr(torch.ops.dspark, name).default

    return decorate


@functools.cache
def _load(stem: str):
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(
            "dspark_kernels: the kernels need Triton, which is not installed (CUDA builds of torch bring it; "
            "elsewhere: pip install triton, Linux only)"
        ) from error
    mend_tuples()
    return importlib.import_module(f".kernels.{stem}", __package__), triton


def mend_tuples() -> None:
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


def kernels(stem: str, device: torch.device):
    """The module kernels/<stem>.py, ready to launch on `device`.

    RuntimeError where Triton is missing, or for CPU tensors when its interpreter is off.
    """
    module, triton = _load(stem)
    if device.type == "cpu" and not arch.overridden() and not _interpreted(module, triton):
        raise RuntimeError(
            "dspark_kernels: CPU tensors run in Triton's interpreter only; set TRITON_INTERPRET=1 in the environment "
            "before importing triton and dspark_kernels"
        )
    return module


def _interpreted(module, triton) -> bool:
    compiled = triton.runtime.jit.JITFunction
    return not any(isinstance(member, compiled) for member in vars(module).values())
