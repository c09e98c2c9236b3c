"""A call of an op worked out once, to be made again and again with other tensors of the same kind.

`prepare` makes the call without launching anything, and takes down each launch: the launcher, its records of tensors and numbers,
and which of the tensors is which argument. Numbers follow from shapes, strides, dtypes, devices and Python values alone, since no
op reads a tensor on the host. A prepared call compares these, puts its tensors in their places, and launches.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import library
from .checks import check_op

T = TypeVar("T")

# What an op may ask of torch for a call, besides views: memory, which a prepared call keeps.
_ALLOCATIONS = (torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default, torch.ops.aten.full.default)
# And what it may compute, anew in every call: temperatures of 0 and 1, of target rows that are scaled already.
_SIGN = torch.ops.aten.sign.default


def prepare(op: Callable[..., T], /, **example: Any) -> Prepared[T]:
    """Work out a call of `op` for repeated use with other tensors of the same kind, at the least cost on the host.

    Args:
        op: a public op, for example `dspark_kernels.accept_chain`.
        example: the arguments of a call, by name, all of them; those that a later call does not name stay these. Outputs are
            allocated once where there is no `out`, scratch memory where there is no `workspace`. Nothing is launched, and no
            tensor is read or written.

    Returns:
        A function that makes the call with the arguments that it is given by name: tensors, or records with tensors, of the
        example's kind, which is its shapes, strides, dtypes, devices and numbers. It returns the outputs, the same tensors in every
        call that brings no `out` of its own, so that a call overwrites the results of the last. It keeps the example's tensors
        alive, and belongs to one stream, as a `Workspace` does. The result has the bits of the plain call. CUDA graphs can capture
        it, and torch.compile sees the plain call.

    Raises:
        TypeError, ValueError, RuntimeError: what `op` raises for the example.
        NotImplementedError: a call that does more than launch kernels, as on an empty batch; `draft_block_partial`.
        TypeError, ValueError, of the function: an argument, named, that is not of the example's kind, or that the example has
            without tensors or not at all.

    >>> accept = dk.prepare(dk.accept_chain, target_logits=logits, layout=layout, proposal=block.proposal, sampling=sampling)
    >>> acceptance = accept(target_logits=new_logits, layout=new_layout)
    """
    return Prepared(op, example)


class Prepared(Generic[T]):
    """What `prepare` returns. out: where calls without an `out` of their own write."""

    def __init__(self, op: Callable[..., T], example: dict[str, Any]) -> None:
        signature = inspect.signature(check_op(op))
        self._op, self._example, self._names = op, example, frozenset(signature.parameters)
        if "out" in self._names and signature.parameters["out"].annotation != f"{signature.return_annotation} | None":
            raise NotImplementedError(f"prepare: {op.__name__}: expected an op that returns its `out`")
        self._arguments: dict[str, _Argument] = {}  # those with tensors
        self._tensors: list[Tensor] = []  # of the example, in the order of the arguments
        for name, value in example.items():
            argument = _Argument(name, value, len(self._tensors))
            if argument.places:
                self._arguments[name] = argument
                self._tensors += argument.read(value)[0]
        # Tensors are found by identity. So there are launches for every way in which tensors of different places are the same.
        self.out: T
        self.out, launches = _recorded(op, example, self._tensors)
        self._launches = {_repeated(self._tensors): launches}
        held = {id(tensor) for _, tensor in _leaves("out", self.out)} if example.get("out") is None else ()
        self._held = [place for place, tensor in enumerate(self._tensors) if id(tensor) in held]

    def __call__(self, **given: Any) -> T:
        if not library.unseen():
            return self._op(**self._all(given))
        tensors = self._tensors.copy()
        try:
            fits = True
            for name, value in given.items():
                argument = self._arguments[name]
                found, facts = argument.read(value)
                fits = fits and facts == argument.facts and _kinds(found) == argument.kinds
                tensors[argument.start : argument.end] = found
            fits = fits and library.plain(tensors) and all(tensors[place] is self._tensors[place] for place in self._held)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError):  # of reading what is no such record
            fits = False
        if not fits:
            self._refuse(given)
        repeated = _repeated(tensors)
        if repeated not in self._launches:
            _, self._launches[repeated] = _recorded(self._op, self._all(given), tensors)
        self._launches[repeated](tensors)
        result: T = given["out"] if "out" in given else self.out
        return result

    def _all(self, given: dict[str, Any]) -> dict[str, Any]:
        """Every argument of a call."""
        arguments = {**self._example, **given}
        if "out" in self._names and arguments.get("out") is None:
            arguments["out"] = self.out
        return arguments

    def _refuse(self, given: dict[str, Any]) -> NoReturn:
        for name, value in given.items():
            if name not in self._names:
                raise TypeError(f"{name}: expected an argument of {self._op.__name__}, which has none of this name")
            if name not in self._arguments:
                raise ValueError(f"{name}: expected nothing, because it has no tensors in the example, got {type(value).__name__}")
            _check_like(name, value, self._example[name])
            argument = self._arguments[name]
            places = range(argument.start, argument.end)
            for place, inside, tensor in zip(places, argument.places, argument.read(value)[0], strict=True):
                if not library.plain((tensor,)):
                    raise TypeError(f"{inside}: expected a plain torch.Tensor, got {type(tensor).__name__} on {tensor.device}")
                if place in self._held and tensor is not self._tensors[place]:
                    raise ValueError(f"{inside}: expected the tensor of the example, because the outputs hold it, got another")
        raise AssertionError("a call of another kind than the example, of which nothing differs")


def _repeated(tensors: list[Tensor]) -> tuple[int, ...]:
    """Of each tensor its first place in the list; () where all differ."""
    names = list(map(id, tensors))
    if len(set(names)) == len(names):
        return ()
    first: dict[int, int] = {}
    return tuple(first.setdefault(name, place) for place, name in enumerate(names))


def _recorded(op: Callable[..., T], arguments: dict[str, Any], tensors: list[Tensor]) -> tuple[T, Callable[[list[Tensor]], object]]:
    """What a call returns, and a function that makes its launches with a list of tensors in the places of these."""
    recorder = _Recorder(op.__name__, tensors)
    token = library.recording.set(recorder.launch)
    try:
        with recorder:
            result = op(**arguments)
    finally:
        library.recording.reset(token)
    return result, recorder.function()


class _Argument:
    """An argument with tensors: their places, by name and in the list of all, their kinds, and what else the argument says."""

    def __init__(self, name: str, value: object, start: int) -> None:
        leaves = list(_leaves("value", value))
        places = [place for place, leaf in leaves if isinstance(leaf, Tensor)]
        others = [place for place, leaf in leaves if not isinstance(leaf, Tensor)]
        # One expression, as in library.flattener: a value -> (its tensors, its other facts).
        self.read = eval(f"lambda value: ([{', '.join(places)}], [{', '.join(others)}])")
        found, self.facts = self.read(value)
        self.kinds = _kinds(found)
        self.places = [name + place.removeprefix("value") for place in places]
        self.start, self.end = start, start + len(places)


def _leaves(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(expression, value) of everything in an argument: tensors, numbers and words, types of records, lengths of lists."""
    if isinstance(value, (tuple, list)) or dataclasses.is_dataclass(value):
        yield f"{place}.__class__", type(value)
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(f"{place}.{field.name}", getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        yield f"len({place})", len(value)
        for index, element in enumerate(value):
            yield from _leaves(f"{place}[{index}]", element)
    else:
        yield place, value


def _kinds(tensors: list[Tensor]) -> list[tuple[object, ...]]:
    return [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]


def _check_like(place: str, value: Any, like: Any) -> None:
    """Raise what tells `value` from `like`, the example's."""
    kind = Tensor if isinstance(like, Tensor) else type(like)
    if not (isinstance(value, Tensor) if kind is Tensor else type(value) is kind):
        raise TypeError(f"{place}: expected {kind.__name__}, as in the example, got {type(value).__name__}")
    if kind is Tensor:
        if _kinds([value]) != _kinds([like]):
            raise ValueError(f"{place}: expected {_shown(like)}, as in the example, got {_shown(value)}")
    elif dataclasses.is_dataclass(like):
        for field in dataclasses.fields(like):
            _check_like(f"{place}.{field.name}", getattr(value, field.name), getattr(like, field.name))
    elif isinstance(like, (tuple, list)):
        if len(value) != len(like):
            raise ValueError(f"{place}: expected {len(like)} elements, as in the example, got {len(value)}")
        for index, (element, wanted) in enumerate(zip(value, like, strict=True)):
            _check_like(f"{place}[{index}]", element, wanted)
    elif value != like:
        raise ValueError(f"{place}: expected {like!r}, as in the example, got {value!r}")


def _shown(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"


class _Recorder(TorchDispatchMode):
    """Takes down the launches of a call, and the views and signs of tensors that it makes for them."""

    def __init__(self, name: str, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not type it
        self._name, self._tensors = name, {id(tensor): place for place, tensor in enumerate(tensors)}
        self._launches: list[tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]]] = []
        # Of a view or sign: itself, and the function, arguments and options that make it.
        self._views: dict[int, tuple[Any, ...]] = {}
        self._constants: dict[str, object] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is _SIGN:
            result = torch.empty_like(args[0])
        elif func.is_view or func in _ALLOCATIONS:
            result = func(*args, **(kwargs or {}))
        else:
            raise NotImplementedError(f"prepare: {self._name}: this call computes {func} besides its launches, and would not again")
        if func.is_view or func is _SIGN:
            self._views[id(result)] = result, func, args, kwargs or {}
        return result

    def launch(self, launcher: Callable[..., object], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._launches.append((launcher, args, options))

    def function(self) -> Callable[[list[Tensor]], object]:
        calls = [self._call(*launch) for launch in self._launches]
        # One expression, as in library.flattener; what changes no more is a constant of it.
        made: Callable[[list[Tensor]], object] = eval(f"lambda tensors: [{', '.join(calls)}]", self._constants)
        return made

    def _call(self, function: Callable[..., object], args: Iterable[Any], options: dict[str, Any]) -> str:
        parts = [self._text(value) for value in args] + [f"{name}={self._text(value)}" for name, value in options.items()]
        return f"{self._constant(function)}({', '.join(parts)})"

    def _text(self, value: Any) -> str:
        """An expression for a value of a call."""
        if not self._changes(value):
            return self._constant(value)
        if isinstance(value, Tensor):
            place = self._tensors.get(id(value))
            return self._call(*self._views[id(value)][1:]) if place is None else f"tensors[{place}]"
        parts = ", ".join(map(self._text, value))
        return f"{self._constant(type(value))}({parts})" if hasattr(value, "_fields") else f"({parts},)"

    def _changes(self, value: object) -> bool:
        """Whether it has a tensor that a later call may replace."""
        if isinstance(value, Tensor):
            view = self._views.get(id(value))
            return id(value) in self._tensors or (view is not None and self._changes(view[2]))
        return isinstance(value, (tuple, list)) and any(map(self._changes, value))

    def _constant(self, value: object) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants[name] = value
        return name
