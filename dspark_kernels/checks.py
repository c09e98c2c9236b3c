"""Host-side argument checks: every message names the argument, what was expected and what came.

Only facts that need no device synchronisation are checked here (dtype, shape, device, strides, Python numbers). What only
the device knows is handled in the kernels and reported in `flags`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
C = TypeVar("C", bound="Checked")
Size = int | str | None

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT_DTYPES = (torch.int32, torch.int64)


def _dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_tensor(
    name: str,
    value: object,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    shape: Sequence[Size] | None = None,
    device: torch.device | None = None,
    last_contiguous: bool = False,
    contiguous: bool = False,
) -> Tensor:
    """Check one tensor argument and return it.

    dtype: a dtype or a tuple of them. shape: a tuple whose entries are an int (that size), a str (any size; the message uses it as
    a name) or None (any size). Raises TypeError for another type or dtype, ValueError for another shape, device or stride.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if dtype is not None:
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        if value.dtype not in dtypes:
            raise TypeError(f"{name}: expected dtype {_dtype_names(dtypes)}, got {_dtype_names((value.dtype,))}")
    if shape is not None:
        have = value.shape
        fits = len(have) == len(shape)
        for size, want in zip(have, shape, strict=False):
            if isinstance(want, int) and size != want:
                fits = False
        if not fits:
            wanted = ", ".join("*" if s is None else str(s) for s in shape)
            raise ValueError(f"{name}: expected shape [{wanted}], got {list(have)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")
    if contiguous and not value.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(value.stride())}")
    if last_contiguous and value.stride(-1) != 1 and value.shape[-1] > 1 and value.numel():
        raise ValueError(f"{name}: expected the last dimension to be contiguous, got strides {list(value.stride())}")
    return value


def check_optional(name: str, value: object, **rules: Any) -> Tensor | None:
    """`check_tensor` for an argument that may be None."""
    return None if value is None else check_tensor(name, value, **rules)


def check_distinct(name: str, ids: Tensor | None, targets: int, count: int | None = None) -> None:
    """Raise ValueError where two columns of a map of ids have the same one of `targets` ids, if the map is on the host.

    ids: int64 [Vd] or None; count: its columns that are looked at, None = all. What a compiler or a mode of torch stands for has no
    values yet, and those on a device would have to be waited for.
    """
    if ids is None or ids.device.type != "cpu" or type(ids) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return
    repeated_id(name, ids.tolist()[:count], targets)  # tolist reads memory: no mode, nor a call that is being prepared, sees an op


def repeated_id(name: str, ids: list[int], targets: int) -> None:
    """Raise ValueError at the first id from 0 to targets - 1 that was there before."""
    first: dict[int, int] = {}
    for draft, target in enumerate(ids):
        if 0 <= target < targets and first.setdefault(target, draft) != draft:
            raise ValueError(f"{name}: expected each target id once, got {target} for draft ids {first[target]} and {draft}")


def check_choice(name: str, value: T, choices: Sequence[T]) -> T:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(repr(c) for c in choices)}, got {value!r}")
    return value


def check_int(name: str, value: object, *, low: int | None = None, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f">= {low}" if high is None else f"<= {high}" if low is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}: expected {bounds}, got {value}")
    return value


def check_number(name: str, value: object, *, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not low <= value <= high:  # NaN, too
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}], got {value}")
    return value


def check_type(name: str, value: T, kinds: type | tuple[type, ...]) -> T:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, kinds):
        raise TypeError(f"{name}: expected {' or '.join(k.__name__ for k in kinds)}, got {type(value).__name__}")
    return value


def check_device(name: str, device: torch.device | str | int | None) -> torch.device:
    """The device that an argument means, once torch has made a tensor there.

    None, the default of every such argument, is the current CUDA device, or the CPU where there is none. Raises TypeError for what
    names no device, ValueError for a device that torch does not have here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise TypeError(f"{name}: expected a torch.device, its name or None, got {type(device).__name__}")
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # torch has another exception for every kind of device that it lacks
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: expected a device that torch has here, got {str(device)!r} ({why})") from None


def check_op(op: Callable[..., T]) -> Callable[..., T]:
    """`op`, once it is a function of the package that launches kernels."""
    if not getattr(op, "__module__", "").startswith(f"{__package__}.ops.") or not callable(op):
        shown = repr(op) if isinstance(op, str) else getattr(op, "__name__", type(op).__name__)
        raise TypeError(f"op: expected an op of {__package__}, such as {__package__}.draft_block, got {shown}")
    return op


class Checked:
    """Base of the frozen dataclasses of tensors: `_check` runs when an instance is made."""

    def to(self: C, device: torch.device | str | int | None) -> C:
        """The same record with its tensors on `device`, those of records inside too; what lies there already is not copied."""
        device = check_device("device", device)
        fields = [field.name for field in dataclasses.fields(self) if field.init]  # type: ignore[arg-type]  # a dataclass, always
        return dataclasses.replace(self, **{name: _moved(getattr(self, name), device) for name in fields})  # type: ignore[type-var]

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        """Raise TypeError or ValueError for a field that cannot be."""
        raise NotImplementedError

    def _tensor(self, field: str, **rules: Any) -> Tensor:
        return check_tensor(f"{type(self).__name__}.{field}", getattr(self, field), **rules)

    def _optional(self, field: str, **rules: Any) -> Tensor | None:
        return check_optional(f"{type(self).__name__}.{field}", getattr(self, field), **rules)

    def _name(self, field: str) -> str:
        return f"{type(self).__name__}.{field}"


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, (Tensor, Checked)):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(element, device) for element in value)
    return value


def not_yet(op: str, name: str, what: str) -> NoReturn:
    """Raise NotImplementedError for a variant of the documented interface that this version does not support."""
    raise NotImplementedError(f"{op}: {name}: {what} not supported by this version")
