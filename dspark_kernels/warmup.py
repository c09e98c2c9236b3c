"""Compile everything that serving will launch, before it serves.

A kernel is compiled once per variant: types, optional arguments, and the few sizes that choose a tile. `warmup` makes the calls
that serving will make, on stand-ins for whatever they write or follow, so that all their variants exist afterwards.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import check_op

_INDICES = (torch.int32, torch.int64)
_ALIGNMENT = 16  # bytes: what a variant depends on

# What an op writes besides `out`, by its name.
_WRITTEN: dict[str, tuple[str, ...]] = {
    "accept_chain": ("anchors", "anchor_positions"),
    "accept_finish": ("anchors", "anchor_positions"),
    "accept_tree": ("anchors", "anchor_positions"),
    "draft_block": ("head_state",),
    "draft_block_finish": ("block", "head_state"),
    "draft_block_partial": ("block", "head_state"),
}


def warmup(op: Callable[..., object], shapes: Iterable[Mapping[str, Any]] | Mapping[str, Any], *, progress: bool = False) -> int:
    """Compile what calls of `op` with arguments like these need, so that nothing compiles while serving.

    Args:
        op: a public op, for example `dspark_kernels.draft_block`.
        shapes: the arguments of the calls to come, by name: one mapping for each batch size that will occur (most share a
            variant and cost one launch each). Tensors may be the serving ones: nothing of theirs is written, and integer
            tensors (positions, lengths, ids, layouts, block tables) are not even read, zeros stand in for them (-1 for
            state_indices: no slot is touched; -1 for draft_to_target: no id is there twice). Stand-ins have the same shape, strides
            and alignment.
        progress: say on stderr how far it is.

    Returns:
        The number of calls made.

    Raises:
        TypeError, ValueError: what `op` raises for these arguments; an argument that `op` does not have.

    >>> dk.warmup(dk.draft_block, [dict(base_logits=logits[:r], anchors=anchors, head=head, anchor_positions=positions,
    ...                                 sampling=sampling, state_indices=slots[:r]) for r in range(1, 257)])
    """
    check_op(op)
    if not isinstance(shapes, Iterable):
        raise TypeError(f"shapes: expected a mapping of argument names, or several, got {type(shapes).__name__}")
    calls = [shapes] if isinstance(shapes, Mapping) else list(shapes)
    written = ("out", *_WRITTEN.get(op.__name__, ()))
    for number, call in enumerate(calls, start=1):
        if not isinstance(call, Mapping):
            raise TypeError(f"shapes: expected mappings of argument names, got {type(call).__name__}")
        op(**{name: _stand_in(name, value, name in written) for name, value in call.items()})
        if progress:
            print(f"\rwarmup {op.__name__} {number}/{len(calls)}", end="\n" if number == len(calls) else "", file=sys.stderr)
    return len(calls)


def _stand_in(name: str, value: Any, written: bool) -> Any:
    """`value` with every tensor that is written or that holds indices replaced."""
    if isinstance(value, Tensor):
        if written or value.dtype in _INDICES:
            return _like(value, -1 if name in ("state_indices", "draft_to_target") else 0)
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _stand_in(f.name, getattr(value, f.name), written) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    if isinstance(value, (list, tuple)):
        return type(value)(_stand_in(name, item, written) for item in value)
    return value


def _like(tensor: Tensor, fill: int) -> Tensor:
    """A tensor of the same shape, strides and alignment that shares no memory with it."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if 0 in tensor.shape:
        length = 0
    itemsize = tensor.element_size()
    skip = tensor.data_ptr() % _ALIGNMENT // itemsize if length else 0
    memory = torch.full((length + skip,), fill, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride(), skip)
