"""Registration of the ops with torch.library and the way to their kernels.

The namespace is the package's own name, `dspark_kernels`: copies of the package under other names live in one process.

One definition per op: a schema that lists every tensor written, one implementation for all devices, and a fake that does
nothing because outputs are passed in. That passes opcheck and torch.compile(fullgraph=True). Where nothing would see the call
(no compiler, mode or transform, plain tensors only) the implementation is called without torch's dispatcher, which takes longer
to carry forty arguments than the implementation does to launch. An op's arguments stand once, as a NamedTuple:

    class Arguments(NamedTuple):
        logits: Tensor
        seed: Tensor | None
        rule: str
        sampling: Flat              # a record inside: its fields in its place
        tokens: Out[Tensor]         # written

    @register("accept", Arguments)
    def _accept(arguments): ...     # _accept(Arguments(...)); _accept.op is torch.ops.dspark_kernels.accept.default
"""

from __future__ import annotations

import functools
import importlib
import string
import typing
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from .launch import arch

NAMESPACE = (__package__ or "").replace(".", "__")  # a namespace of torch has no dots
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


_T = typing.TypeVar("_T")
Record = typing.TypeVar("Record", bound=tuple[typing.Any, ...])  # a NamedTuple
Out = typing.Annotated[_T, "written"]

_TYPES = {Tensor: "Tensor", str: "str", int: "int", float: "float", bool: "bool"}


def schema_of(record: type) -> str:
    """The arguments of an op as torch.library writes them."""
    letters = iter(string.ascii_lowercase)
    parts = []
    for name, annotation in _flat_fields(record):
        written = typing.get_origin(annotation) is typing.Annotated
        kind = typing.get_args(annotation)[0] if written else annotation
        optional = type(None) in typing.get_args(kind)
        if optional:
            (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
        is_list = typing.get_origin(kind) is list
        if is_list:
            (kind,) = typing.get_args(kind)
        text = _TYPES[kind] + (f"({next(letters)}!)" if written else "") + ("[]" if is_list else "") + ("?" if optional else "")
        parts.append(f"{text} {name}")
    return ", ".join(parts)


def _flat_fields(record: type) -> Iterator[tuple[str, typing.Any]]:
    """(name, annotation) of a record's fields; a record inside is replaced by its own fields."""
    for name, annotation in typing.get_type_hints(record, include_extras=True).items():
        if hasattr(annotation, "_fields"):
            yield from _flat_fields(annotation)
        else:
            yield name, annotation


def flattener(record: type[Record]) -> Callable[[Record], tuple[object, ...]]:
    """The function from a record to its values in the order of the schema."""
    # One expression, `lambda record: (record[0], record[1][0], ...)`: a walk over forty values takes ten times as long.
    made: Callable[[Record], tuple[object, ...]] = eval(f"lambda record: ({', '.join(_places(record, 'record'))},)")
    return made


def _places(record: type, place: str) -> Iterator[str]:
    for index, annotation in enumerate(typing.get_type_hints(record, include_extras=True).values()):
        inside = f"{place}[{index}]"
        if hasattr(annotation, "_fields"):
            yield from _places(annotation, inside)
        else:
            yield inside


def _rebuilder(record: type[Record]) -> Callable[[Iterator[object]], Record]:
    """The function from an iterator of values in the order of the schema to the record."""
    inner: list[Callable[[Iterator[object]], typing.Any]] = [
        _rebuilder(annotation) if hasattr(annotation, "_fields") else next
        for annotation in typing.get_type_hints(record, include_extras=True).values()
    ]
    return lambda values: record(*[make(values) for make in inner])


# Who takes down launches instead of making them: a function of a launcher, its arguments and its options (`prepare`).
Recording = Callable[[Callable[..., object], tuple[typing.Any, ...], dict[str, typing.Any]], object]
recording: ContextVar[Recording | None] = ContextVar("recording", default=None)

# What the values of a call may be for torch's dispatcher to have nothing to add.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, str, int, float, bool, type(None)))


def unseen() -> bool:
    """Whether no compiler, mode or transform of torch sees what is called now."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or (torch._C._len_torch_function_stack() and not _default_device_alone())
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _default_device_alone() -> bool:
    """Whether the only modes of functions are default devices, which ops, naming theirs, do not heed."""
    return all(isinstance(mode, DeviceContext) for mode in torch.overrides._get_current_function_mode_stack())


def plain(values: Sequence[object]) -> bool:
    """Whether they are numbers, words, and tensors of no subclass (fake, distributed, ...) that have memory."""
    kinds = set(map(type, values))
    if list in kinds:
        kinds.remove(list)
        kinds.update(type(element) for value in values if type(value) is list for element in value)
    tensor = next(value for value in values if isinstance(value, Tensor))  # checked: all are on one device
    return kinds <= _PLAIN and not tensor.is_meta


class Registered(typing.Protocol[Record]):
    """An op as a function of its record. op: torch's callable overload, a function of the values. values: of a record, in their order."""

    op: Callable[..., None]
    values: Callable[[Record], tuple[object, ...]]

    def __call__(self, arguments: Record, /) -> None: ...


def register(name: str, record: type[Record]) -> Callable[[Callable[[Record], None]], Registered[Record]]:
    """Decorator: define `NAMESPACE::<name>` with the record's fields as arguments and the decorated function, which takes the record,
    as implementation. Returns a function of the record; its `op` is torch's callable overload, a function of the values that its
    `values` makes of a record.
    """
    flatten, rebuild = flattener(record), _rebuilder(record)

    def decorate(implementation: Callable[[Record], None]) -> Registered[Record]:
        _LIBRARY.define(f"{name}({schema_of(record)}) -> ()")
        _LIBRARY.impl(name, lambda *values: implementation(rebuild(iter(values))), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args, **kwargs: None, lib=_LIBRARY)
        op = getattr(getattr(torch.ops, NAMESPACE), name).default

        @functools.wraps(implementation)
        def call(arguments: Record) -> None:
            values = flatten(arguments)
            direct = unseen() and plain(values)
            if direct or (not torch.compiler.is_compiling() and recording.get() is not None):
                implementation(arguments)
            else:
                op(*values)

        registered = typing.cast(Registered[Record], call)
        registered.op, registered.values = op, flatten
        return registered

    return decorate


_TURN_ON = "set TRITON_INTERPRET=1 in the environment before importing triton and dspark_kernels"
_CHANGED = (
    "dspark_kernels: TRITON_INTERPRET was changed after triton was imported, so that Triton's own functions and these kernels do not "
    f"fit together; {_TURN_ON}, or leave it unset for a GPU"
)


@functools.cache
def _load(stem: str) -> tuple[ModuleType, ModuleType]:
    """kernels/<stem>.py, and Triton."""
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(
            "dspark_kernels: the kernels need Triton, which is not installed (CUDA builds of torch bring it; "
            "elsewhere: pip install triton, Linux only)"
        ) from error
    if triton.knobs.runtime.interpret == isinstance(triton.language.cdiv, triton.runtime.jit.JITFunction):
        raise RuntimeError(_CHANGED)  # what is imported now would not fit what Triton has defined already
    patch_tuples()
    module = importlib.import_module(f".kernels.{stem}", __package__)
    if _interpreted(module, triton):
        from .testing import interpreter

        interpreter.repair()
    return module, triton


def patch_tuples() -> None:
    """Let `x is None` compile for every tuple x in the kernels of this package; changes nothing where it does (Triton 3.7 and newer).

    A comparison unwraps its operands. Old versions make the tuple anew from its bare elements and derive its type from theirs, and
    a bare None has none: compiling ends with "'NoneType' object has no attribute 'type'". Newer ones keep the type, as done here.
    Functions of other packages are compiled as before. Needs Triton.
    """
    from triton.compiler import code_generator
    from triton.language import core

    stock, visit = code_generator._unwrap_if_constexpr, code_generator.CodeGenerator.visit
    if hasattr(stock, "packages"):  # patched, perhaps by another copy of this package
        stock.packages.add(__package__)
        return
    try:
        stock(core.tuple([core.constexpr(None)]))
        return
    except AttributeError:
        packages, ours = {__package__}, ContextVar("ours", default=False)

    def unwrap(value: object) -> object:
        if ours.get() and isinstance(value, core.tuple):
            return core.tuple([unwrap(element) for element in value.values], value.type)
        return stock(value)

    @functools.wraps(visit)
    def visit_and_say_whose(self: typing.Any, node: object) -> object:
        # A call inside a function is compiled by a generator of its own, so this follows who is called.
        module = self.jit_fn.__module__
        before = ours.set(any(module == package or module.startswith(f"{package}.") for package in packages))
        try:
            return visit(self, node)
        finally:
            ours.reset(before)

    unwrap.packages = packages  # type: ignore[attr-defined]  # a function takes attributes, which its type cannot say
    code_generator._unwrap_if_constexpr = unwrap
    code_generator.CodeGenerator.visit = visit_and_say_whose


def kernels(stem: str, device: torch.device) -> typing.Any:
    """The module kernels/<stem>.py, ready to launch on `device`; its functions launch_* do.

    Where Triton's interpreter is on, its known faults are repaired before the first launch (testing.interpreter). RuntimeError
    where Triton is missing, for CPU tensors when its interpreter is off, or where it was turned on after Triton was imported.
    """
    module, triton = _load(stem)
    if device.type == "cpu" and not arch.overridden() and not _interpreted(module, triton):
        raise RuntimeError(f"dspark_kernels: CPU tensors run in Triton's interpreter only; {_TURN_ON}")
    record = recording.get()
    return module if record is None else _Recorded(module, record)


class _Recorded:
    """A module of kernels whose launches are taken down."""

    def __init__(self, module: ModuleType, record: Recording) -> None:
        self._module, self._record = module, record

    def __getattr__(self, name: str) -> typing.Any:
        member = getattr(self._module, name)
        if not name.startswith("launch_"):
            return member
        return lambda *args, **options: self._record(member, args, options)


def _interpreted(module: ModuleType, triton: ModuleType) -> bool:
    compiled = triton.runtime.jit.JITFunction
    return not any(isinstance(member, compiled) for member in vars(module).values())
