"""Which work item a program has, and whose rows: its place in the order of work, and its request as the layout has it.

Symbols: R requests, S request slots, L logit rows. Records: args.py.
"""

import triton
import triton.language as tl

from ..primitives.slots import state_slots
from ..primitives.sync import take_item
from .dense import map_used
from .values import RequestRows


@triton.jit
def take_place(ticket_ptr, map_progress, num_requests, first_items, later_items, PHASES: tl.constexpr):
    """(ticket, tickets before the first that is a request's): those of an id map's parts come before all others.

    Tickets, not program ids, order the work of items that wait: each has a later ticket than the items it waits for. Without later
    PHASES and without a map nobody waits, and nobody asks for a ticket.
    """
    ticket = tl.program_id(0)
    before = 0
    if map_progress is not None:
        before = map_progress.parts
    if PHASES or map_progress is not None:
        ticket = take_item(ticket_ptr)
        if ticket == before + num_requests * (first_items + later_items) - 1:
            tl.store(ticket_ptr, 0)
    return ticket, before


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
