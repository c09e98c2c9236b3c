"""What a request's decision keeps of its nodes between sweeps.

Per node v: P, the probability that the prefix up to it is kept, as a fraction; 1 - P (exact where P is near 1); P when v was
entered. Per rejected child: what the parent's remaining distribution was multiplied by after it, what its draft weights are
multiplied by to be probabilities, and the draft weight that is left for its younger siblings. Symbols: WIDTH nodes of a tree
(padded). Reference: reference/tree.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..primitives.constants import NODE_IDS, NODE_VALUES

# fp32 [NODE_VALUES, WIDTH] and int32 [NODE_IDS, WIDTH] per request.
_NUMERATOR = tl.constexpr(0)
_DENOMINATOR = tl.constexpr(1)
_COMPLEMENT = tl.constexpr(2)
_ENTRY = tl.constexpr(3)
_MULTIPLIER = tl.constexpr(4)
_FACTOR = tl.constexpr(5)
_REJECTED = tl.constexpr(0)
_FOUL = tl.constexpr(1)


class Nodes(NamedTuple):
    """Vectors [WIDTH]."""

    numerator: Any
    denominator: Any
    complement: Any  # 1 - P
    entry: Any
    multiplier: Any
    factor: Any
    rejected: Any
    foul: Any  # could not be accepted
    rest: Any  # int64, in units of 2^-40


@triton.jit
def load_nodes(state, request, i, WIDTH: tl.constexpr):
    values = state.values_ptr + (request.to(tl.int64) * NODE_VALUES) * WIDTH + i
    ids = state.ids_ptr + (request.to(tl.int64) * NODE_IDS) * WIDTH + i
    return Nodes(
        tl.load(values + _NUMERATOR * WIDTH, volatile=True),
        tl.load(values + _DENOMINATOR * WIDTH, volatile=True),
        tl.load(values + _COMPLEMENT * WIDTH, volatile=True),
        tl.load(values + _ENTRY * WIDTH, volatile=True),
        tl.load(values + _MULTIPLIER * WIDTH, volatile=True),
        tl.load(values + _FACTOR * WIDTH, volatile=True),
        tl.load(ids + _REJECTED * WIDTH, volatile=True),
        tl.load(ids + _FOUL * WIDTH, volatile=True),
        tl.load(state.rest_ptr + request.to(tl.int64) * WIDTH + i, volatile=True),
    )


@triton.jit
def store_nodes(state, request, nodes, i, WIDTH: tl.constexpr):
    values = state.values_ptr + (request.to(tl.int64) * NODE_VALUES) * WIDTH + i
    ids = state.ids_ptr + (request.to(tl.int64) * NODE_IDS) * WIDTH + i
    tl.store(values + _NUMERATOR * WIDTH, nodes.numerator)
    tl.store(values + _DENOMINATOR * WIDTH, nodes.denominator)
    tl.store(values + _COMPLEMENT * WIDTH, nodes.complement)
    tl.store(values + _ENTRY * WIDTH, nodes.entry)
    tl.store(values + _MULTIPLIER * WIDTH, nodes.multiplier)
    tl.store(values + _FACTOR * WIDTH, nodes.factor)
    tl.store(ids + _REJECTED * WIDTH, nodes.rejected)
    tl.store(ids + _FOUL * WIDTH, nodes.foul)
    tl.store(state.rest_ptr + request.to(tl.int64) * WIDTH + i, nodes.rest)


class Rejected(NamedTuple):
    """What a sweep needs of the rejected children `taken` of a node that was entered with P = entry."""

    taken: Any
    tokens: Any
    entry: Any  # a scalar
    multiplier: Any
    factor: Any


@triton.jit
def load_rejected(state, request, node, siblings, tokens, i, WIDTH: tl.constexpr):
    """siblings: the node's children [WIDTH]."""
    values = state.values_ptr + request.to(tl.int64) * NODE_VALUES * WIDTH
    rejected = tl.load(state.ids_ptr + (request.to(tl.int64) * NODE_IDS + _REJECTED) * WIDTH + i, volatile=True)
    return Rejected(
        siblings & (rejected > 0),
        tokens,
        tl.load(values + _ENTRY * WIDTH + node, volatile=True),
        tl.load(values + _MULTIPLIER * WIDTH + i, volatile=True),
        tl.load(values + _FACTOR * WIDTH + i, volatile=True),
    )
