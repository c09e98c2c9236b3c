"""Triton's CPU interpreter (TRITON_INTERPRET=1) made right and fast enough to test kernels in: triton 3.6 to 3.9.

Right, as a GPU computes:
- casts to bf16 and fp8 round to nearest even (fp8 saturates); arithmetic, dot and reductions on bf16 and fp8 use the
  values. The stock interpreter truncates, and otherwise works on the raw bits as unsigned integers.
- loads, stores and atomics take strided and broadcast blocks; the stock ones read past them. A masked-out atomic
  returns 0. A mask may hold numbers, such as a comparison of scalars that was broadcast (triton 3.9 raises).
- loops with a bound known at run time work with numpy >= 2.4 (triton 3.6 raises), and a loop variable is a tensor
  (stock: a Python int, which has no `.to`). minimum and maximum ignore a NaN operand.
Fast:
- a custom `tl.reduce` or `tl.associative_scan` makes log2(n) calls on whole blocks instead of one call per element.
- no integer overflow checks, and triton.language is patched once per launch instead of at every device function call.

`threads(n)` runs the programs of a launch at the same time, which a grid barrier or a wait between programs needs. Not
repaired: fp8e4b15, bf16 atomics, `tl.fma` (rounds twice before triton 3.9). Reference for the casts: torch.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import math
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

try:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter as stock
    from triton.runtime.jit import JITFunction
except ImportError:
    tl = None  # no Triton (or no numpy for its interpreter): there is nothing to repair

# Triton has no types: a block's values with their Triton dtype, a dtype, and a method of the interpreter that is repaired.
Handle = Any
Dtype = Any
Method = Callable[..., Any]


def interpreting() -> bool:
    """Whether kernels run in the interpreter: Triton is there and was imported with TRITON_INTERPRET=1."""
    return tl is not None and not isinstance(tl.cdiv, JITFunction)


def repair() -> bool:
    """Repair the interpreter for this process; True if kernels run in it. Calling it again changes nothing."""
    if interpreting() and not hasattr(stock, "_repaired_by_dspark_kernels"):
        _install()
        stock._repaired_by_dspark_kernels = True
    return interpreting()


# --- numbers in 8 and 16 bits ---------------------------------------------------------------------


@functools.cache
def _torch_dtypes() -> dict[Dtype, torch.dtype]:
    """Formats that the interpreter keeps as raw bits -> the torch dtype with the same bits."""
    return {
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
        tl.float8e4b8: torch.float8_e4m3fnuz,
        tl.float8e5b16: torch.float8_e5m2fnuz,
    }


@functools.cache
def _fp8_values(dtype: Dtype) -> Array:
    bits = torch.arange(256, dtype=torch.uint8)
    values: Array = bits.view(_torch_dtypes()[dtype]).to(torch.float32).numpy()
    return values


def _is_raw(handle: Handle) -> bool:
    """Whether a handle holds bits that numpy takes for integers (booleans may carry their operands' dtype)."""
    return handle.dtype.scalar in _torch_dtypes() and bool(handle.data.dtype != np.bool_)


def _decode(handle: Handle) -> Array:
    """fp32 (bf16, fp8) or unchanged values of a handle."""
    data: Array = handle.data
    if not _is_raw(handle):
        return data
    if handle.dtype.scalar == tl.bfloat16:
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return _fp8_values(handle.dtype.scalar)[data.view(np.uint8)]


def _encode(values: Array, dtype: Dtype) -> Array:
    """Bits of `values` in `dtype`, rounded to nearest even; fp8 saturates, as on GPUs."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == tl.bfloat16:
        bits = values.view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = ((bits + (np.uint32(0x7FFF) + odd)) >> np.uint32(16)).astype(np.uint16)
        nan = np.isnan(values)
        return np.where(nan, np.uint16(0x7FC0), rounded) if nan.any() else rounded
    target = _torch_dtypes()[dtype]
    largest = np.float32(torch.finfo(target).max)
    values = np.where(np.isnan(values), values, np.clip(values, -largest, largest))
    return torch.from_numpy(values).to(target).view(torch.uint8).numpy()


def _handle(values: Array, dtype: Dtype) -> Handle:
    """A handle of `dtype` from decoded values."""
    if values.dtype == np.bool_ and dtype.is_floating():
        return stock.TensorHandle(values, tl.int1)
    return stock.TensorHandle(_encode(values, dtype) if dtype in _torch_dtypes() else values, dtype)


def _boolean(handle: Handle) -> Handle:
    """The handle; of type int1 where its values are true or false, which otherwise become numbers where a scalar is broadcast."""
    if handle.data.dtype == np.bool_ and handle.dtype != tl.int1:
        return stock.TensorHandle(handle.data, tl.int1)
    return handle


def _cast(original: Method) -> Method:
    def cast_impl(self: Any, src: Handle, dst_type: Dtype) -> Handle:
        dst = dst_type.scalar
        if dst in _torch_dtypes():
            return stock.TensorHandle(_encode(_decode(src), dst), dst)
        if _is_raw(src):
            return stock.TensorHandle(_decode(src).astype(stock._get_np_dtype(dst)), dst)
        return original(self, src, dst_type)

    return cast_impl


def _float_cast(original: Method) -> Method:
    def create_fp_to_fp(self: Any, src: Handle, dst_type: Dtype, rounding_mode: Any) -> Handle:
        toward_zero = rounding_mode == stock._ir.ROUNDING_MODE.RTZ
        if toward_zero or not (_is_raw(src) or dst_type.scalar in _torch_dtypes()):
            return original(self, src, dst_type, rounding_mode)
        return self.cast_impl(src, dst_type)

    return create_fp_to_fp


def _elementwise(original: Method, operands: int) -> Method:
    """An operation of `operands` handles and a numpy function.

    The result has the type of the first handle, or of the last of three, because then the first may be a condition.
    """

    def operation(self: Any, *args: Any) -> Handle:
        handles, function = args[:operands], args[operands]
        # A choice moves bits and needs no values.
        if function is np.where or not any(map(_is_raw, handles)):
            return _boolean(original(self, *args))
        kind = handles[-1 if operands == 3 else 0].dtype.scalar
        return _handle(function(*map(_decode, handles)), kind)

    return operation


def _fma(original: Method) -> Method:
    def create_fma(self: Any, x: Handle, y: Handle, z: Handle) -> Handle:
        if not _is_raw(z):
            return original(self, x, y, z)
        return _handle(_decode(x) * _decode(y) + _decode(z), z.dtype.scalar)

    return create_fma


def _dot(original: Method) -> Method:
    def create_dot(self: Any, a: Handle, b: Handle, d: Handle, *options: Any) -> Handle:
        if not (_is_raw(a) or _is_raw(b)):
            return original(self, a, b, d, *options)
        product = np.matmul(_decode(a), _decode(b), dtype=np.float32)
        return stock.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    return create_dot


# --- reductions and scans -------------------------------------------------------------------------


def _combine(operation: Any, left: Sequence[Array], right: Sequence[Array], dtypes: Sequence[Dtype]) -> list[Array]:
    """The combine function on blocks of pairs: lists of arrays in, list of arrays out."""
    wrapped = [operation.to_tensor(x, dtype) for side in (left, right) for x, dtype in zip(side, dtypes, strict=True)]
    out = operation.combine_fn(*wrapped)
    out = out if isinstance(out, (tuple, list, tl.tuple)) else (out,)
    arrays = [np.asarray(o.handle.data if isinstance(o, tl.tensor) else o) for o in out]
    return [np.broadcast_to(a, x.shape).astype(x.dtype) for a, x in zip(arrays, left, strict=True)]


def _generic_reduce(self: Any, input: Any) -> list[Any]:
    """Neighbours are combined until one is left, so the order of operands is kept."""
    whole, rank = self.axis is None, input[0].handle.data.ndim
    input, axis = self.unravel(input, self.axis)
    dtypes = [x.dtype for x in input]
    parts = [np.moveaxis(x.handle.data, axis, 0) for x in input]
    while parts[0].shape[0] > 1:
        parts = _combine(self, [x[0::2] for x in parts], [x[1::2] for x in parts], dtypes)
    out = []
    for part, dtype in zip(parts, dtypes, strict=True):
        part = part[0]
        if self.keep_dims:
            part = part.reshape((1,) * rank) if whole else np.expand_dims(part, axis)
        out.append(self.to_tensor(part if part.shape else part.item(), dtype))
    return out


def _generic_scan(self: Any, input: Any) -> list[Any]:
    """After the step of width w each element covers the 2w elements that end at it."""
    dtypes = [x.dtype for x in input]
    parts = [np.moveaxis(x.handle.data, self.axis, 0) for x in input]
    width = 1
    while width < parts[0].shape[0]:
        # Whole blocks, because a block's sizes are powers of two; the first elements are complete already.
        more = _combine(self, [np.roll(x, width, axis=0) for x in parts], parts, dtypes)
        parts = [np.concatenate([x[:width], y[width:]]) for x, y in zip(parts, more, strict=True)]
        width *= 2
    parts = [np.ascontiguousarray(np.moveaxis(x, 0, self.axis)) for x in parts]
    return [self.to_tensor(x, dtype) for x, dtype in zip(parts, dtypes, strict=True)]


def _values_only(original: Method, generic: Method) -> Method:
    """numpy's own sum, maximum, ... where elements are numbers to numpy; the generic way where they are raw bits."""

    def apply_impl(self: Any, input: Any) -> Any:
        if any(_is_raw(x.handle) for x in input):
            flip = getattr(self, "reverse", False)
            if flip:
                input = [self.to_tensor(np.flip(x.handle.data, self.axis), x.dtype) for x in input]
            out = generic(self, input)
            if flip:
                out = [self.to_tensor(np.flip(x.handle.data, self.axis), x.dtype) for x in out]
            return out
        return original(self, input)

    return apply_impl


# --- memory ---------------------------------------------------------------------------------------


def _memory(native: Any) -> types.SimpleNamespace:
    """The interpreter's native memory operations behind contiguous arguments."""

    def contiguous(*arrays: Array) -> list[Array]:
        return [np.ascontiguousarray(x) for x in arrays]

    def boolean(mask: Array) -> Array:
        return np.ascontiguousarray(mask, dtype=np.bool_)

    def load(pointers: Array, mask: Array, other: Array, dtype: Any) -> Array:
        pointers, other = contiguous(pointers, other)
        loaded: Array = native.load(pointers, boolean(mask), other, dtype)
        return loaded

    def store(pointers: Array, value: Array, mask: Array) -> None:
        native.store(*contiguous(pointers, value), boolean(mask))

    def atomic_rmw(operation: Any, pointers: Array, value: Array, mask: Array, order: Any) -> Array:
        if (group := getattr(_group, "current", None)) and group.stopped:
            raise _Stopped  # where a program waits for another that has failed
        pointers, value = contiguous(pointers, value)
        mask = boolean(mask)
        old: Array = native.atomic_rmw(operation, pointers, value, mask, order)
        return old if mask.all() else np.where(mask, old, np.zeros_like(old))

    def atomic_cas(pointers: Array, expected: Array, value: Array, order: Any) -> Array:
        old: Array = native.atomic_cas(*contiguous(pointers, expected, value), order)
        return old

    members = {name: getattr(native, name) for name in dir(native) if not name.startswith("__")}
    members.update(load=load, store=store, atomic_rmw=atomic_rmw, atomic_cas=atomic_cas)
    return types.SimpleNamespace(**members)


# --- launches -------------------------------------------------------------------------------------

_launches = 0  # launches in progress: triton.language is patched
# .current: the _Programs that a thread belongs to; kept by Triton, whose one repair serves every copy of this package.
_group = threading.local() if tl is None else vars(stock).setdefault("_group_of_dspark_kernels", threading.local())


def _tensor_range(*bounds: Any, **hints: Any) -> Iterator[Any]:
    for i in range(*bounds):
        yield stock.interpreter_semantic.to_tensor(i)


def _loops(original: Any) -> Any:
    """The rewriting of kernel sources, with `range` giving tensors as it does when compiled."""

    class Transformer(original):  # type: ignore[misc]  # a class that is known at run time alone
        def visit_For(self, node: ast.For) -> Any:
            called = node.iter.func if isinstance(node.iter, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "range":
                called.id = _tensor_range.__name__  # found there: a rewritten kernel sees the globals of `stock`
            return self.generic_visit(node)

    return Transformer()


def _patched_language(original: Method) -> Method:
    # Kernels see triton.language as tl, the standard library sees tl.core: both are patched, once for the whole launch.
    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch(fn: Any) -> Any:
        scope = original(everything)
        scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.reshape(())))
        scope.set_attr(tl, "range", _tensor_range)
        return scope

    return patch


def _launch(original: Method) -> Method:
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _launches
        _launches += 1
        try:
            # What an interpreted kernel divides by zero or overflows, a GPU does silently.
            with np.errstate(all="ignore"):
                return original(self, *args, **kwargs)
        finally:
            _launches -= 1

    return run


def _device_call(original: Method) -> Method:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _launches:
            return self.rewrite()(*args, **kwargs)
        return original(self, *args, **kwargs)

    return call


class _PerThread:
    """An attribute of the builder that every thread has for itself."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else getattr(self._local, "value", None)

    def __set__(self, instance: object, value: Any) -> None:
        self._local.value = value


class _Stopped(Exception):
    """Ends a program whose launch has failed already."""


class _Programs:
    """The programs of one launch, each in a thread."""

    def __init__(self, function: Callable[..., object], limit: int, timeout: float) -> None:
        self.function, self.limit, self.timeout = function, limit, timeout
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        self.stopped = False
        functools.update_wrapper(self, function)  # the stock launch inspects what it calls
        self.__signature__ = inspect.signature(function)

    def __call__(self, **arguments: Any) -> None:
        """Start the program the stock launch has come to; after the last one wait for all."""
        builder = stock.interpreter_builder
        total = math.prod(builder.grid_dim)
        if total > self.limit:
            raise RuntimeError(f"threads: a grid of {total} programs does not fit {self.limit} threads")
        self.threads.append(threading.Thread(target=self._run, args=(builder.grid_idx, arguments), daemon=True))
        self.threads[-1].start()
        if len(self.threads) == total:
            self._wait()

    def _run(self, index: Any, arguments: dict[str, Any]) -> None:
        stock.interpreter_builder.grid_idx = index
        _group.current = self
        try:
            with np.errstate(all="ignore"):
                self.function(**arguments)
        except _Stopped:
            pass
        except BaseException as error:
            self.errors.append(error)
            self.stopped = True

    def _wait(self) -> None:
        end = time.monotonic() + self.timeout
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in self.threads):
            self.stopped = True
            raise TimeoutError(f"threads: the programs of a launch did not all end within {self.timeout} s")
        if self.errors:
            raise self.errors[0]


@contextlib.contextmanager
def threads(limit: int, timeout: float = 60.0) -> Iterator[None]:
    """Within it all programs of a launch run at the same time, one thread each.

    Raises InterpreterError from a launch of more than `limit` programs, one that a program fails in, or one that takes
    longer than `timeout` seconds (programs that wait for each other in vain).
    """
    before = stock.GridExecutor.__call__

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.fn = _Programs(self.fn, limit, timeout)
        return before(self, *args, **kwargs)

    stock.GridExecutor.__call__ = run
    try:
        yield
    finally:
        stock.GridExecutor.__call__ = before


def _install() -> None:
    builder = stock.InterpreterBuilder
    for target, name, repaired in (
        (builder, "cast_impl", _cast),
        (builder, "create_fp_to_fp", _float_cast),
        (builder, "unary_op", functools.partial(_elementwise, operands=1)),
        (builder, "binary_op", functools.partial(_elementwise, operands=2)),
        (builder, "ternary_op", functools.partial(_elementwise, operands=3)),
        (builder, "create_fma", _fma),
        (builder, "create_dot", _dot),
        (stock.ReduceOps, "apply_impl", functools.partial(_values_only, generic=_generic_reduce)),
        (stock.ScanOps, "apply_impl", functools.partial(_values_only, generic=_generic_scan)),
        (stock, "_interpreter", _memory),
        (stock, "_patch_lang", _patched_language),
        (stock.GridExecutor, "__call__", _launch),
        (stock.InterpretedFunction, "__call__", _device_call),
    ):
        setattr(target, name, repaired(getattr(target, name)))
    # A bf16 constant beside a bf16 block: triton 3.6 and 3.7 have no way to make one.
    builder.get_bf16 = lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)
    stock._tensor_range = _tensor_range
    stock.FunctionRewriter.ast_transformer = _loops(stock.ASTTransformer)
    stock.ReduceOps.generic_reduce = _generic_reduce
    stock.ScanOps.generic_scan = _generic_scan
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.grid_idx = _PerThread()
    current = stock.interpreter_builder
    current.options = dataclasses.replace(current.options, sanitize_overflow=False)
