"""Whose rows a work item has: its request, as chains, trees and vocabulary shards take it from the layout, and its output if none.

Symbols: R requests, S request slots, L logit rows. Records: args.py.
"""

import triton
import triton.language as tl

from ..primitives.slots import state_slots
from .args import RequestRows
from .dense import map_used


@triton.jit
def rows_of(request, sampling, layout, num_requests, num_slots, num_rows):
    slot = tl.max(state_slots(sampling.slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
    row0 = tl.load(layout.cu_logits_ptr + request)
    return RequestRows(slot, row0, tl.minimum(tl.load(layout.cu_logits_ptr + request + 1), num_rows) - row0)


@triton.jit
def release_map(map_progress, num_requests):
    """A request needs the inverse of an id map no more, where there is one (dense.map_used)."""
    if map_progress is not None:
        map_used(map_progress, num_requests)
