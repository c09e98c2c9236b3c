"""The best nodes of a growing draft tree: merge the children of a depth into them, score a node, write the finished tree.

    survival(child) = survival(node) c(node) q(child | node),  order: survival, then the parent's number, then the token's id

No child is better than its parent, and the order of two nodes depends on nothing but them and their ancestors. So the best n
nodes of the first d depths hold every node of the first d depths that is among the best n of all, and a node that is not among
them needs no children. Nodes are kept in that order, which is that of a best-first search; node 0 is the anchor. Symbols: NODES
nodes, padded; row = a node that gets children; log2 throughout. Reference: reference/tree_draft.py.
"""

import triton
import triton.language as tl

from ..primitives.constants import LOG2E, NAN, NEG_INF, NONFINITE_ROW, POS_INF, SUMEXP_ONE
from ..primitives.select import ABSENT, ordered_key, select
from ..primitives.sumexp import below_max, log2_scale

# What is kept of a node: rows of int32 [NODE_FIELDS, NODES] per request.
TOKEN = tl.constexpr(0)
PARENT = tl.constexpr(1)
DEPTH = tl.constexpr(2)
SURVIVAL = tl.constexpr(3)  # log2, fp32 bits
SEEN = tl.constexpr(4)  # flags that the distribution of its children showed
ORIGIN = tl.constexpr(5)  # the row that its parent was expanded in
NEW = tl.constexpr(6)  # children about to be merged: key, row, token

LEAST = tl.constexpr(-2139095040)  # the key of the least fp32 number
NOWHERE = tl.constexpr(-9223372036854775808)  # in the order of nodes, behind all of them
SCORE_RANKS = tl.constexpr(64)  # ranks of the confidence head at a time


@triton.jit
def field(kept_ptr, name: tl.constexpr, i, count, NODES: tl.constexpr):
    return tl.load(kept_ptr + name * NODES + i, mask=i < count, other=-1, volatile=True)


@triton.jit
def survivals(kept_ptr, i, count, NODES: tl.constexpr):
    """log2, -inf where there is no node."""
    bits = field(kept_ptr, SURVIVAL, i, count, NODES)
    return tl.where(i < count, bits.to(tl.float32, bitcast=True), NEG_INF)


@triton.jit
def init_tree(kept_ptr, anchor, NODES: tl.constexpr):
    """The tree of the anchor alone. anchor: int64; a token that no table has becomes -1."""
    i = tl.arange(0, NODES)
    first = i == 0
    token = tl.where((anchor >= 0) & (anchor < 2147483647), anchor, -1).to(tl.int32)
    tl.store(kept_ptr + TOKEN * NODES + i, tl.where(first, token, -1), mask=first)
    tl.store(kept_ptr + PARENT * NODES + i, tl.where(first, -1, 0), mask=first)
    for name in tl.static_range(DEPTH, NEW):
        tl.store(kept_ptr + name * NODES + i, tl.zeros([NODES], tl.int32), mask=first)
    tl.debug_barrier()


@triton.jit
def log_confidence(token, live, score, depth, confidence, hidden_size, NODES: tl.constexpr):
    """log2 of the probability that a child of these nodes survives, given that they did: fp32 [NODES], -inf for NaN.

    score: w . h of the depth; confidence: NodeConfidence.
    """
    rank = confidence.rank
    logit = tl.zeros([NODES], tl.float32) + score
    if confidence.w1_ptr is not None:
        known = live & (token >= 0) & (token < confidence.vocab)
        for first in range(0, rank, SCORE_RANKS):
            i = first + tl.arange(0, SCORE_RANKS)
            there = known[:, None] & (i < rank)[None, :]
            e = tl.load(
                confidence.w1_ptr + token.to(tl.int64)[:, None] * confidence.stride_w1 + i[None, :], mask=there, other=0.0
            ).to(tl.float32)  # fmt: skip
            w = tl.load(confidence.weight_ptr + hidden_size + i, mask=i < rank, other=0.0).to(tl.float32)
            logit += tl.sum(e * w[None, :], axis=1)
    if confidence.bias_ptr is not None:
        logit += tl.load(confidence.bias_ptr).to(tl.float32)
    if confidence.sts_ptr is not None:
        logit = logit / tl.load(confidence.sts_ptr + depth)
    decay = tl.exp2(tl.abs(logit) * -LOG2E)
    found = tl.minimum(logit, 0.0) * LOG2E - tl.log2(1.0 + decay)
    return tl.where(logit == logit, found, NEG_INF)


@triton.jit
def log_shares(x, ids, top, sumexp, scale):
    """log2 softmax fp32 [ROWS, N], never above 0, from rows' maxima and sums [ROWS]; all on the first of several +inf."""
    total = tl.log2(tl.maximum(sumexp, 1).to(tl.float32) * (1.0 / SUMEXP_ONE))
    share = tl.minimum(below_max(x, top[:, None]) * scale - total[:, None], 0.0)
    first = tl.min(tl.where(x == POS_INF, ids, 2147483647), axis=1)
    share = tl.where((top == POS_INF)[:, None], tl.where(ids == first[:, None], 0.0, NEG_INF), share)
    return tl.where(x == NEG_INF, NEG_INF, share)


@triton.jit
def merge_children(kept_ptr, count, room, depth, keys, ids, row_nodes, NODES: tl.constexpr):
    """Merge children of `depth` into the best nodes: (how many there are then, at most `room`; row_nodes as they are then).

    keys fp32 [ROWS, N]: log2 survival, at most 0, -inf = no child; ids int32 [ROWS, N], ascending in a row and from one merge of
    a row to the next; row_nodes [NODES]: the node of a row, ascending, -1 = none any more.
    """
    i = tl.arange(0, NODES)
    bits = field(kept_ptr, SURVIVAL, i, count, NODES)
    parent = field(kept_ptr, PARENT, i, count, NODES)
    token = field(kept_ptr, TOKEN, i, count, NODES)
    old_depth = field(kept_ptr, DEPTH, i, count, NODES)
    seen = field(kept_ptr, SEEN, i, count, NODES)
    origin = field(kept_ptr, ORIGIN, i, count, NODES)
    there = i < count
    old_key = ordered_key(tl.where(there, bits.to(tl.float32, bitcast=True), NEG_INF), 0)
    # The last of a full tree is the least that a child must reach.
    least = tl.where(count == room, tl.min(tl.where(there, old_key, 2147483647), axis=0), LEAST)
    words = ordered_key(keys, 0)
    words = tl.where((keys > NEG_INF) & (words >= least), words, ABSENT)
    found = tl.sum((words != ABSENT).to(tl.int32))
    wanted = tl.minimum(found, room - 1)
    if wanted > 0:
        _, selected, place = select(words, wanted, least, None, found)
        row = tl.arange(0, keys.shape[0])[:, None] + tl.zeros_like(ids)
        new_ptr = kept_ptr + NEW * NODES
        tl.store(new_ptr + place, words, mask=selected)
        tl.store(new_ptr + NODES + place, row, mask=selected)
        tl.store(new_ptr + 2 * NODES + place, ids, mask=selected)
        tl.debug_barrier()
        added = i < wanted
        key = tl.load(new_ptr + i, mask=added, other=ABSENT, volatile=True)
        row = tl.load(new_ptr + NODES + i, mask=added, other=0, volatile=True)
        new_token = tl.load(new_ptr + 2 * NODES + i, mask=added, other=0, volatile=True)
        new_parent = tl.gather(row_nodes, row, axis=0)
        place, new_place = _places(old_key, parent, there, key, new_parent, added, NODES)
        tl.debug_barrier()

        stays = there & (place < room)
        to_ptr = kept_ptr + place
        tl.store(to_ptr + TOKEN * NODES, token, mask=stays)
        moved = tl.where(i == 0, -1, tl.gather(place, tl.maximum(parent, 0), axis=0))
        tl.store(to_ptr + PARENT * NODES, moved, mask=stays)
        tl.store(to_ptr + DEPTH * NODES, old_depth, mask=stays)
        tl.store(to_ptr + SURVIVAL * NODES, bits, mask=stays)
        tl.store(to_ptr + SEEN * NODES, seen, mask=stays)
        tl.store(to_ptr + ORIGIN * NODES, origin, mask=stays)
        comes = added & (new_place < room)
        to_ptr = kept_ptr + new_place
        tl.store(to_ptr + TOKEN * NODES, new_token, mask=comes)
        tl.store(to_ptr + PARENT * NODES, tl.gather(place, new_parent, axis=0), mask=comes)
        tl.store(to_ptr + DEPTH * NODES, i * 0 + depth, mask=comes)
        tl.store(to_ptr + SURVIVAL * NODES, tl.where(key < 0, key ^ 0x7FFFFFFF, key), mask=comes)
        tl.store(to_ptr + SEEN * NODES, i * 0, mask=comes)
        tl.store(to_ptr + ORIGIN * NODES, row, mask=comes)
        rest = tl.gather(tl.where(stays, place, -1), tl.maximum(row_nodes, 0), axis=0)
        row_nodes = tl.where(row_nodes < 0, -1, rest)
        count = tl.minimum(count + wanted, room)
        tl.debug_barrier()
    return count, row_nodes


@triton.jit
def _places(old_key, old_parent, there, key, parent, added, NODES: tl.constexpr):
    """Where old nodes, in order, and new ones, in the order of (parent, id), go: int32 [NODES] each.

    By (key descending, parent); children of one parent by id, in which they come. So one word orders all of them, and old words
    order themselves.
    """
    i = tl.arange(0, NODES)
    old = tl.where(there, (old_key.to(tl.int64) << 32) - (old_parent + 1) * (2 * NODES), NOWHERE)
    new = tl.where(added, (key.to(tl.int64) << 32) - (parent + 1) * (2 * NODES) - 1 - i, NOWHERE)
    # Nodes before a new one, and in the high half new ones before an old one.
    before = (old[None, :] > new[:, None]).to(tl.int32) + (new[None, :] > new[:, None]).to(tl.int32)
    counts = tl.sum(before + ((new[None, :] > old[:, None]).to(tl.int32) << 16), axis=1)
    return i + (counts >> 16), counts & 0xFFFF


@triton.jit
def write_tree(kept_ptr, found, budgets_ptr, slot, anchor, request, flags, out, num_nodes, num_drafts, NODES: tl.constexpr):
    """Every element of a slot's tree: the first nodes found, as many as its budget lets it have, and the survival of all of them.

    out: PathTree. flags: what is known beside the distributions of the nodes that a search for so many expands.
    """
    room = num_nodes
    if budgets_ptr is not None:
        room = tl.minimum(tl.maximum(tl.load(budgets_ptr + request), 1), num_nodes)
    count = tl.minimum(found, room)
    i = tl.arange(0, NODES)
    there = i < count
    token = field(kept_ptr, TOKEN, i, count, NODES)
    parent = field(kept_ptr, PARENT, i, count, NODES)
    depth = field(kept_ptr, DEPTH, i, count, NODES)
    seen = field(kept_ptr, SEEN, i, count, NODES)
    survival = survivals(kept_ptr, i, found, NODES)
    above = parent
    ancestors = tl.full([NODES], 1, tl.int64) << i
    for _ in range(num_drafts):
        above_bit = tl.full([NODES], 1, tl.int64) << tl.maximum(above, 0)
        ancestors |= tl.where(above >= 0, above_bit, 0)
        above = tl.where(above >= 0, tl.gather(parent, tl.maximum(above, 0), axis=0), -1)
    is_child = there[None, :] & (parent[None, :] == i[:, None])
    child = tl.min(tl.where(is_child, i[None, :], NODES), axis=1)
    is_sibling = there[None, :] & (parent[None, :] == parent[:, None]) & (i[None, :] > i[:, None])
    sibling = tl.min(tl.where(is_sibling, i[None, :], NODES), axis=1)
    place = slot * num_nodes + i
    inside = i < num_nodes
    tl.store(out.tokens_ptr + place, tl.where(there, tl.where(i == 0, anchor, token.to(tl.int64)), -1), mask=inside)
    tl.store(out.parents_ptr + place, parent, mask=inside)
    tl.store(out.depths_ptr + place, depth, mask=inside)
    tl.store(out.first_child_ptr + place, tl.where(there & (child < NODES), child, -1), mask=inside)
    tl.store(out.next_sibling_ptr + place, tl.where(there & (sibling < NODES), sibling, -1), mask=inside)
    tl.store(out.ancestors_ptr + place, tl.where(there, ancestors, 0), mask=inside)
    if out.survival_ptr is not None:
        tl.store(out.survival_ptr + place, tl.where(i < found, tl.exp2(survival), 0.0), mask=inside)
    tl.store(out.num_nodes_ptr + slot, count)
    # The search ends when the tree is full, before its last node would be expanded.
    expanded = i < tl.where(count == room, count - 1, count)
    flags |= tl.max(tl.where(expanded & ((seen & NAN) != 0), NAN, 0), axis=0)
    flags |= tl.max(tl.where(expanded & ((seen & NONFINITE_ROW) != 0), NONFINITE_ROW, 0), axis=0)
    tl.store(out.flags_ptr + request, flags)


@triton.jit
def row_scale(temperature_ptr, slot):
    """log2(e) / temperature of a slot; temperatures None: greedy."""
    temperature = tl.zeros((), tl.float32)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + slot)
    return log2_scale(temperature)
