"""Registration of the ops with torch.library (namespace `dspark`) and the way to their kernels.

One definition per op: a schema that lists every tensor written, one implementation for all devices, and a fake that does
nothing because outputs are passed in. That passes opcheck and torch.compile(fullgraph=True) at the lowest call overhead. An op's
arguments stand once, as a NamedTuple:

    class Arguments(NamedTuple):
        logits: Tensor
        seed: Tensor | None
        rule: str
        sampling: Flat              # a record inside: its fields in its place
        tokens: Out[Tensor]         # written

    @register("accept", Arguments)
    def _accept(arguments): ...     # _accept(*flat(Arguments(...)))
"""

from __future__ import annotations

import functools
import importlib
import string
import typing
from collections.abc import Callable

import torch
from torch import Tensor

from .launch import arch

_LIBRARY = torch.library.Library("dspark", "DEF")


_T = typing.TypeVar("_T")
Out = typing.Annotated[_T, "written"]

_TYPES = {Tensor: "Tensor", str: "str", int: "int", float: "float", bool: "bool"}


def schema_of(record: type) -> str:
    """The arguments of an op as torch.library writes them."""
    letters = iter(string.ascii_lowercase)
    parts = []
    for name, annotation in _leaves(record):
        written = typing.get_origin(annotation) is typing.Annotated
        kind = typing.get_args(annotation)[0] if written else annotation
        optional = type(None) in typing.get_args(kind)
        if optional:
            (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
        listed = typing.get_origin(kind) is list
        if listed:
            (kind,) = typing.get_args(kind)
        text = _TYPES[kind] + (f"({next(letters)}!)" if written else "") + ("[]" if listed else "") + ("?" if optional else "")
        parts.append(f"{text} {name}")
    return ", ".join(parts)


def _leaves(record: type):
    """(name, annotation) of a record's fields, those of records inside it in their place."""
    for name, annotation in typing.get_type_hints(record, include_extras=True).items():
        if hasattr(annotation, "_fields"):
            yield from _leaves(annotation)
        else:
            yield name, annotation


def flat(arguments: tuple) -> tuple:
    """A record's values in the order of the schema."""
    values = []
    for value in arguments:
        if isinstance(value, tuple):
            values += flat(value)
        else:
            values.append(value)
    return tuple(values)


def _rebuilder(record: type) -> Callable:
    """The function from an iterator of flat values to the record."""
    inner = [
        _rebuilder(annotation) if hasattr(annotation, "_fields") else next
        for annotation in typing.get_type_hints(record, include_extras=True).values()
    ]
    return lambda values: record(*[make(values) for make in inner])


def register(name: str, record: type):
    """Define `dspark::<name>`, its arguments the record's fields, with the decorated function, which takes the record, as
    implementation; returns the op's callable overload."""
    rebuild = _rebuilder(record)

    def decorate(implementation):
        _LIBRARY.define(f"{name}({schema_of(record)}) -> ()")
        _LIBRARY.impl(name, lambda *values: implementation(rebuild(iter(values))), "CompositeExplicitAutograd")
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
    patch_tuples()
    return importlib.import_module(f".kernels.{stem}", __package__), triton


def patch_tuples() -> None:
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
