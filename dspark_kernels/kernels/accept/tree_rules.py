"""How a tree is verified: the walk from the root, and rules that go from a rejected child to the residual at its parent.

    walk       go to the first child whose token is the one drawn at its parent
    recursive  child c: node <- c while u q_c(x) < p(x), else p <- norm [p - q_c]+ and the next child
    traversal  down to a block; accept while u < P, else P M <- [P M - q_c]+ / (Z + 1 - P) at the parent and the next child

Symbols: WIDTH nodes of a tree (padded), NB blocks of 1024 ids; p, q target and draft distribution, P probability that a node's
prefix is kept, M its residual distribution, Z = sum [P M - q_c]+. What lies behind a residual is never stored: an id's remaining
weight is computed again from p, q and a few numbers per rejected sibling. Siblings are in the order of their nodes. Reference:
reference/tree.py."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..primitives.constants import NEG_INF, NONFINITE_ROW, SUMEXP_ONE, VOCAB_BLOCK
from ..primitives.philox import ACCEPT, acceptance_words, uniform
from ..primitives.sync import stores_done, wait_for
from ..primitives.vocab_blocks import merge_blocks, race_blocks, race_ids
from .requests import release_map
from .rows import SOFTMAX, pick, soft_prob
from .target import read_each, read_rows
from .tree_outputs import write_outputs
from .tree_proposals import next_of
from .tree_rows import blocks_weights, first_token, id_weights, node_distributions, node_status
from .tree_state import Nodes, Rejected, load_nodes, store_nodes

WALK = tl.constexpr(0)
RECURSIVE = tl.constexpr(1)
TRAVERSAL = tl.constexpr(2)
DECIDED = tl.constexpr(1 << 20)  # published instead of the number of sweeps


@triton.jit
def _walk(parent, draft, token, open_nodes, i, WIDTH: tl.constexpr):
    """Follow each node's own token from the root: the last node."""
    # Two values of their own: a loop does not carry a name that holds another one's value before it (Triton up to 3.9).
    node = tl.zeros((), tl.int32)
    child = tl.zeros((), tl.int32)
    while child < WIDTH:
        node = child
        child = next_of(open_nodes & (parent == node) & (draft == pick(token, node, i)), node, i, WIDTH)
    return node


@triton.jit
def _remaining(target_prob, draft_weight, ids, rejected, i, WITHOUT: tl.constexpr, WIDTH: tl.constexpr):
    """What rejected children leave of a node's distribution at `ids`, and the draft weights that the next child has there."""
    k = next_of(rejected.taken, -1, i, WIDTH)
    while k < WIDTH:
        taken = draft_weight * pick(rejected.factor, k, i)
        target_prob = tl.maximum(target_prob - taken, 0.0) * pick(rejected.multiplier, k, i)
        if WITHOUT:
            draft_weight = tl.where(ids == pick(rejected.tokens, k, i), 0.0, draft_weight)
        k = next_of(rejected.taken, k, i, WIDTH)
    return target_prob, draft_weight


@triton.jit
def left_in_blocks(
    node, block, target, drawn_from, rejected, view, draft, scales, i,
    PROPOSAL: tl.constexpr, CANDIDATES: tl.constexpr, WITHOUT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What is left in blocks [PAIRS] of a node's distribution and of its children's draft weights: fp32 [PAIRS, VOCAB_BLOCK]."""
    ids = block[:, None] * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)[None, :]
    x = read_rows(view, node + block * 0, ids, ids < view.vocab)
    target_prob = rejected.entry * soft_prob(x, ids, target, scales.target)
    weight = PROPOSAL.block_weights(node, ids, view.slot, view.vocab, draft, drawn_from, scales.draft, PROPOSAL, CANDIDATES)
    return _remaining(target_prob, weight, ids, rejected, i, WITHOUT, WIDTH)


class Resumed(NamedTuple):
    """Where a decision goes on: a node, its rejected child, whether the residual at the node has any probability (1 or 0)."""

    node: Any
    child: Any
    some: Any
    nodes: Nodes


@triton.jit
def _resume(
    request, sweep, tree, view, draft, scratch, scales, num_blocks, i,
    RULE: tl.constexpr, PROPOSAL: tl.constexpr, WITHOUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The state that the last sweep was asked for with, and the sweep's sums in it; at first that of a tree that nobody looked
    at."""
    WIDTH: tl.constexpr = TILE.WIDTH
    numerator = tl.full([WIDTH], 1.0, tl.float32)
    denominator = tl.full([WIDTH], 1.0, tl.float32)
    complement = tl.zeros([WIDTH], tl.float32)
    entry = tl.full([WIDTH], 1.0, tl.float32)
    multiplier = tl.full([WIDTH], 1.0, tl.float32)
    factor = tl.zeros([WIDTH], tl.float32)
    rejected = tl.zeros([WIDTH], tl.int32)
    foul = tl.zeros([WIDTH], tl.int32)
    rest = tl.zeros([WIDTH], tl.int64)
    node = tl.zeros((), tl.int32)
    child = tl.zeros((), tl.int32)
    some = tl.full((), 1, tl.int32)
    if sweep > 0:
        nodes = load_nodes(scratch.state, request, i, WIDTH)
        entry, factor, rejected, foul = nodes.entry, nodes.factor, nodes.rejected, nodes.foul
        numerator, denominator, complement, multiplier = nodes.numerator, nodes.denominator, nodes.complement, nodes.multiplier
        rest = nodes.rest
        node = tl.load(scratch.state.current_ptr + request * 2, volatile=True)
        child = tl.load(scratch.state.current_ptr + request * 2 + 1, volatile=True)
        block = tl.arange(0, TILE.BLOCKS)
        at = request.to(tl.int64) * num_blocks + block
        sums = tl.load(scratch.residual.target_ptr + at, mask=block < num_blocks, other=0, volatile=True)
        total = tl.sum(sums, axis=0)
        residual_prob = total.to(tl.float32) * 8.673617379884035e-19  # 2^-60
        if RULE == RECURSIVE:
            multiplier = tl.where(i == child, 1.0 / tl.where(total > 0, residual_prob, float("inf")), multiplier)
        else:
            below = residual_prob + pick(complement, node, i)
            scale_up = 1.0 / tl.where(below > 0.0, below, float("inf"))
            multiplier = tl.where(i == child, scale_up, multiplier)
            complement = tl.where(i == node, complement * scale_up, complement)
            numerator = tl.where(i == node, residual_prob, numerator)
            denominator = tl.where(i == node, below, denominator)
        some = tl.where(total > 0, 1, 0)
        if WITHOUT:
            if PROPOSAL.sum_left is not None:
                _target, weights = node_distributions(view.row0.to(tl.int64) + node, node >= 0, scratch.stats)
                taken = tree.is_child & (tree.parent == node) & (rejected > 0)
                whole = PROPOSAL.sum_left(
                    node, view.slot, draft, weights, taken, tree.tokens, scales.draft, i, TILE.CANDIDATES, WIDTH
                )
            else:
                lost = tl.load(scratch.residual.draft_ptr + at, mask=block < num_blocks, other=0, volatile=True)
                whole = tl.sum(lost, axis=0)
            rest = tl.where(i == child, whole, rest)
    return Resumed(node, child, some, Nodes(numerator, denominator, complement, entry, multiplier, factor, rejected, foul, rest))


class Found(NamedTuple):
    """final: 1 where `node` is the last accepted one; 0 where `child` is rejected and the residual at its parent `node` is due."""

    final: Any
    node: Any
    child: Any
    nodes: Nodes


@triton.jit
def _search(state, tree, target_prob, draft_weight, row_rest, u, i, RULE: tl.constexpr, WITHOUT: tl.constexpr, WIDTH: tl.constexpr):
    """From where a decision goes on to the next rejection, or to the end. Per node: the probability and the draft weight that its
    token has in its parent's row, the sum of its children's draft weights, its acceptance uniform."""
    nodes = state.nodes
    node, child = state.node, state.child
    numerator, complement, entry = nodes.numerator, nodes.complement, nodes.entry
    factor, foul = nodes.factor, nodes.foul
    final = tl.zeros((), tl.int32)
    swept = tl.zeros((), tl.int32)
    while (final | swept) == 0:
        siblings = tree.is_child & (tree.parent == node)
        taken = siblings & (nodes.rejected > 0)
        child = next_of(siblings & (nodes.rejected == 0), node, i, WIDTH)
        if child < WIDTH:
            weight = pick(draft_weight, child, i)
            prob = pick(entry, node, i) * pick(target_prob, child, i)
            own = pick(tree.tokens, child, i)
            rejected = Rejected(taken, tree.tokens, entry, nodes.multiplier, factor)
            prob, weight = _remaining(prob, weight, own, rejected, i, WITHOUT, WIDTH)
            left = pick(row_rest, node, i)
            if WITHOUT:
                elder = tl.max(tl.where(taken, i, -1), axis=0)
                left = tl.where(elder >= 0, pick(nodes.rest, elder, i), left)
            own_factor = tl.where(left > 0, 1.0 / tl.maximum(left, 1).to(tl.float32) * SUMEXP_ONE, 0.0)
            draft_prob = weight * own_factor
            possible = (pick(tl.where(tree.inside, 1, 0), child, i) > 0) & (draft_prob > 0.0)
            factor = tl.where(i == child, own_factor, factor)
            foul = tl.where((i == child) & (possible == 0), 1, foul)
            if RULE == RECURSIVE:
                passes = possible & (pick(u, child, i) * draft_prob < prob)
                node = tl.where(passes, child, node)
                swept = tl.where(passes, 0, 1)
            else:
                ratio = tl.where(possible, tl.minimum(prob / tl.where(possible, draft_prob, 1.0), 1.0), 0.0)
                short = tl.where(possible, tl.maximum(draft_prob - prob, 0.0) / tl.where(possible, draft_prob, 1.0), 1.0)
                numerator = tl.where(i == child, ratio, numerator)
                entry = tl.where(i == child, ratio, entry)
                complement = tl.where(i == child, short, complement)
                node = child
        else:
            below = pick(nodes.denominator, node, i)
            passes = (node == 0) | (below <= 0.0) | (pick(u, node, i) * below < pick(numerator, node, i))
            if RULE == RECURSIVE:
                passes = passes | (node >= 0)
            final = tl.where(passes, 1, 0)
            swept = tl.where(passes, 0, 1)
            child = node
            node = tl.where(passes, node, pick(tree.parent, node, i))
    after = Nodes(numerator, nodes.denominator, complement, entry, nodes.multiplier, factor, nodes.rejected, foul, nodes.rest)
    return Found(final, node, child, after)


@triton.jit
def _draw(
    request, node, row, position, anchor, seed, from_residual, target, drawn_from, rejected, view, draft, scratch, scales,
    num_blocks, i, PROPOSAL: tl.constexpr, WITHOUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A token from what is left of a node's distribution, or from all of it: int64."""
    BLOCKS: tl.constexpr = TILE.BLOCKS
    one = tl.zeros([1], tl.int32)
    partials = scratch.target
    top, _residual, words, tops = merge_blocks(partials.max_ptr, partials.sumexp_ptr, row + one, num_blocks, scales.target, BLOCKS)
    weight = blocks_weights(tops, words, top, scales.target)
    if from_residual:
        block = tl.arange(0, BLOCKS)[None, :]
        at = request.to(tl.int64) * num_blocks + block
        residual_prob = tl.load(scratch.residual.target_ptr + at, mask=block < num_blocks, other=0, volatile=True)
        weight = tl.where(residual_prob > 0, tl.log2(tl.maximum(residual_prob, 1).to(tl.float32)), NEG_INF)
    position = tl.full([1, 1], 0, tl.int64) + position
    at = tl.zeros([1, 1], tl.int32) + node
    winner = race_blocks(weight, seed, position, anchor, at, 1, BLOCKS)
    inner = id_weights(view, node + one, winner, top, scales.target)
    if from_residual:
        left, _weight = left_in_blocks(node, winner, target, drawn_from, rejected, view, draft, scales, i,
                                       PROPOSAL, TILE.CANDIDATES, WITHOUT, TILE.WIDTH)  # fmt: skip
        inner = tl.where(left > 0.0, tl.log2(tl.where(left > 0.0, left, 1.0)), NEG_INF)
    return tl.sum(race_ids(inner, winner, seed, position, anchor, at, 1), axis=0).to(tl.int64)


class Tree(NamedTuple):
    """A request's nodes as its layout and its parents give them, [WIDTH]."""

    parent: Any
    tokens: Any  # -1 behind the tree
    inside: Any  # whether the token is an id of the vocabulary
    is_child: Any  # whether it can be looked at: a child of a node with a finite logit


@triton.jit
def decide(
    request, sweep, view, layout, links, draft, sampling, outputs, scratch, published_ptr, map_progress, walks, scales, sizes,
    RULE: tl.constexpr, PROPOSAL: tl.constexpr, WITHOUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Decide from what is known after `sweep` sweeps: publish the next one, or write the outputs."""
    WIDTH: tl.constexpr = TILE.WIDTH
    row0, length, slot, num_blocks, stats = view.row0, view.length, view.slot, sizes.num_blocks, scratch.stats
    i = tl.arange(0, WIDTH)
    has_row = i <= length
    rows = (row0 + i).to(tl.int64)
    parent = tl.load(links.parents_ptr + slot * sizes.num_drafts + i, mask=has_row & (i > 0), other=-1)
    forward = tl.load(layout.logits_indices_ptr + rows, mask=has_row, other=0)
    tokens = tl.load(layout.token_ids_ptr + forward, mask=has_row, other=-1)
    inside = has_row & (tokens >= 0) & (tokens < view.vocab)
    linked = has_row & (parent >= 0) & (parent < i)
    parent_at = tl.where(linked, parent, 0)
    parent_rows = row0.to(tl.int64) + parent_at
    is_child = linked & ((node_status(parent_rows, linked, stats) & NONFINITE_ROW) == 0)
    tree = Tree(parent, tokens, inside, is_child)
    sampled = slot < 0
    if sampling.temperature_ptr is not None:
        sampled = tl.load(sampling.temperature_ptr + slot) > 0.0

    final = tl.full((), 1, tl.int32)
    empty = tl.zeros((), tl.int32)
    last = tl.zeros((), tl.int32)
    token = tl.zeros((), tl.int64)
    bad = is_child & (inside == 0)
    if walks > 0:
        drawn = tl.load(stats.token_ptr + rows, mask=has_row, other=-1, volatile=True)
        last = _walk(parent, tokens, drawn, is_child, i, WIDTH)
        token = pick(drawn, last, i).to(tl.int64)
    if RULE != WALK:
        if walks == 0:
            if map_progress is not None:
                wait_for(map_progress.ready_ptr, map_progress.parts)
            seed = tl.load(sampling.seed_ptr + slot)
            depth = tl.load(layout.positions_ptr + forward, mask=has_row, other=0)
            anchor = pick(depth, 0, i)
            u = uniform(acceptance_words(seed, depth, anchor, ACCEPT, i))
            # The parent's row is what verifies a node.
            verified = is_child & inside
            ids = tl.where(inside, tokens, 0)
            target, drawn_from = node_distributions(parent_rows, verified, stats)
            x = read_each(view, parent_at, ids.to(tl.int32), verified)
            target_prob = soft_prob(x, ids, target, scales.target)
            draft_weight = PROPOSAL.weight_at(parent_at, ids, verified, slot, view.vocab, draft, drawn_from, scales.draft, PROPOSAL)
            row_rest = tl.load(stats.draft_sum_ptr + rows, mask=has_row, other=0, volatile=True)
            state = _resume(
                request, sweep, tree, view, draft, scratch, scales, num_blocks, i, RULE, PROPOSAL, WITHOUT, TILE
            )  # fmt: skip
            found = _search(state, tree, target_prob, draft_weight, row_rest, u, i, RULE, WITHOUT, WIDTH)
            final, last, nodes = found.final, found.node, found.nodes
            bad = is_child & (nodes.foul > 0)
            if final == 0:
                # The residual at the rejected child's parent decides what follows.
                tl.debug_barrier()  # every warp has read the state that one of them now writes
                rejected = tl.where(i == found.child, 1, nodes.rejected)
                store_nodes(
                    scratch.state, request,
                    Nodes(nodes.numerator, nodes.denominator, nodes.complement, nodes.entry,
                          nodes.multiplier, nodes.factor, rejected,
                          nodes.foul, nodes.rest),
                    i, WIDTH,
                )  # fmt: skip
                tl.store(scratch.state.current_ptr + request * 2, last)
                tl.store(scratch.state.current_ptr + request * 2 + 1, found.child)
            else:
                row = row0.to(tl.int64) + last
                last_target, last_weights = node_distributions(row, last >= 0, stats)
                taken = is_child & (parent == last) & (nodes.rejected > 0)
                taken_any = tl.max(tl.where(taken, 1, 0), axis=0)
                empty = tl.where((taken_any > 0) & (state.some == 0), 1, 0)
                from_residual = (taken_any > 0) & (state.some > 0)
                token = first_token(row, stats).to(tl.int64)
                if from_residual | (last_target.point == SOFTMAX):
                    rejected = Rejected(taken, tokens, pick(nodes.entry, last, i), nodes.multiplier, nodes.factor)
                    token = _draw(
                        request, last, row, pick(depth, last, i) + 1, anchor, seed, from_residual, last_target, last_weights,
                        rejected, view, draft, scratch, scales, num_blocks, i, PROPOSAL, WITHOUT, TILE,
                    )  # fmt: skip
    if final > 0:
        status = node_status(rows, has_row, stats)
        write_outputs(request, last, parent, token, status, bad, empty, tokens, forward, i, sampled, view, layout, outputs,
                      scratch.raw, stats, scales.target, sizes, WIDTH)  # fmt: skip
        release_map(map_progress, sizes.num_requests)
    if RULE != WALK:
        stores_done()
        tl.atomic_xchg(published_ptr + request, tl.where(final > 0, DECIDED, sweep + 1), sem="release", scope="gpu")
