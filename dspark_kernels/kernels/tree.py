"""Lossless acceptance of draft trees straight from target logits, in one launch.

    walk       y ~ p_v, go to the child whose token is y, else emit y (greedy: y = argmax p_v)
    recursive  accept child c while u q_c(x) < p(x), else p <- norm [p - q_c]+; after the last child y ~ p
    traversal  leaf to root: accept while u < P, then y ~ M; else P M <- [P M - q_c]+ / (Z + 1 - P) at the parent

Symbols: R requests, M nodes, V vocabulary, leaf = 1024 ids, NL leaves; v a node, c a child of it, x its token; p, q target and
draft law; P chance that v's prefix is kept, M its residual law, Z = sum [P M - q_c]+. Oracle: reference/tree.py. Sources:
SpecInfer arXiv 2305.09781, Sequoia arXiv 2402.12374, traversal arXiv 2505.12398.

Wave 1, an item = nodes x leaves of a request, as in accept.py: maximum and integer mass of each leaf. The last item of a node
group merges its rows and, for the walk, draws every node's token at once: each has noise of its own, and nothing has to wait for
the way down. The last group of a request decides. Where a child is rejected, the residual at its parent is summed over the
vocabulary by a sweep, whose last item decides on: sweep s of a request waits for what publishes it, an earlier ticket. A node is
rejected at most once, so M - 1 sweeps suffice; those that are not needed end at once. Siblings are in the order of their nodes.
What lies behind the residual is never stored: an id's remaining weight is computed again from p, q and a few numbers per sibling.
"""

import triton
import triton.language as tl

from .primitives.leaves import (
    SAW_FINITE,
    SAW_NAN,
    draw_rows,
    first_of,
    leaf_masses,
    merge_leaves,
    race_ids,
    race_leaves,
)
from .primitives.mass import LEAF, NEG_INF, ONE, POS_INF, log2_scale, masses, numbers
from .primitives.philox import ACCEPT, coin_words, uniform
from .primitives.slots import state_slots
from .primitives.ticket import arrive

# Bits of `flags`; the public names are dspark_kernels.types.Flag (a test keeps both equal).
NONFINITE_ROW = tl.constexpr(1)
NAN = tl.constexpr(2)
BAD_TOKEN_ID = tl.constexpr(4)
EMPTY_RESIDUAL = tl.constexpr(16)

RESIDUAL_ONE = tl.constexpr(1152921504606846976.0)  # 2^60: residual masses of a row sum to at most 1

# Who has a law's mass: nobody, everybody by softmax, or (any id >= 0) that id alone.
NOBODY = tl.constexpr(-2)
SOFTMAX = tl.constexpr(-1)

WALK = tl.constexpr(0)
RECURSIVE = tl.constexpr(1)
TRAVERSAL = tl.constexpr(2)
DONE = tl.constexpr(1 << 20)  # published instead of the number of sweeps


@triton.jit
def _weight(x, ids, mass_of, reference, factor, scale):
    """exp2((x - reference) * scale) * factor, or a point mass; the same form for target and draft, so that equal laws cancel."""
    soft = tl.exp2((x - reference) * scale) * factor
    return tl.where(mass_of == SOFTMAX, soft, tl.where(ids == mass_of, 1.0, 0.0))


@triton.jit
def _pick(vector, at, i):
    """vector[at] as a scalar, 0 where `at` is none of i."""
    return tl.sum(tl.where(i == at, vector, tl.zeros_like(vector)), axis=0)


@triton.jit
def _next(mask, after, i, WIDTH: tl.constexpr):
    """The first node behind `after` in a mask, or WIDTH."""
    return tl.min(tl.where(mask & (i > after), i, WIDTH), axis=0)


@triton.jit
def _remaining(target_prob, draft_weight, ids, taken, tokens, multiplier, factor, i, WITHOUT: tl.constexpr, WIDTH: tl.constexpr):
    """What the rejected children `taken` leave of a node's law at `ids`, and the draft weights that the next child has there."""
    k = _next(taken, -1, i, WIDTH)
    while k < WIDTH:
        target_prob = tl.maximum(target_prob - draft_weight * _pick(factor, k, i), 0.0) * _pick(multiplier, k, i)
        if WITHOUT:
            draft_weight = tl.where(ids == _pick(tokens, k, i), 0.0, draft_weight)
        k = _next(taken, k, i, WIDTH)
    return target_prob, draft_weight


@triton.jit
def _node_laws(row_values_ptr, row_ids_ptr, rows, inside):
    """Stored facts of rows: target (who has mass, maximum, factor), draft (who has mass, reference)."""
    top = tl.load(row_values_ptr + rows * 3, mask=inside, other=0.0, volatile=True)
    inverse = tl.load(row_values_ptr + rows * 3 + 1, mask=inside, other=0.0, volatile=True)
    reference = tl.load(row_values_ptr + rows * 3 + 2, mask=inside, other=0.0, volatile=True)
    first = tl.load(row_ids_ptr + rows * 4, mask=inside, other=0, volatile=True)
    status = tl.load(row_ids_ptr + rows * 4 + 1, mask=inside, other=0, volatile=True)
    draft_mass_of = tl.load(row_ids_ptr + rows * 4 + 2, mask=inside, other=NOBODY, volatile=True)
    point = (top == POS_INF) | ((status & NONFINITE_ROW) != 0)
    return tl.where(point, first, SOFTMAX), tl.where(point, 0.0, top), inverse, draft_mass_of, reference, first, status


@triton.jit
def _merge_nodes(
    group, slot, row0, length, target_ptr, draft_ptr, temperature_ptr, seed_ptr, positions_ptr, logits_indices_ptr,
    top_ptr, mass_ptr, draft_top_ptr, draft_mass_ptr, row_values_ptr, row_ids_ptr, row_rest_ptr,
    walks, scale, draft_scale, vocab, draft_vocab, num_leaves, stride_t, stride_ds, stride_dm,
    SWEEPS: tl.constexpr, GROUP: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """All leaves of a node group are there: what the decision needs to know of each row, and the walk's draws."""
    i = group * GROUP + tl.arange(0, GROUP)
    rows = tl.where(i <= length, row0 + i, -1).to(tl.int64)
    row_ptrs = target_ptr + tl.maximum(rows, 0) * stride_t
    top, mass, words, tops = merge_leaves(top_ptr, mass_ptr, rows, num_leaves, scale, LEAVES)
    status = tl.where(tl.max(words & SAW_FINITE, axis=1) > 0, 0, NONFINITE_ROW)
    status |= tl.where(tl.max(words & SAW_NAN, axis=1) > 0, NAN, 0)
    sampled = tl.zeros((), tl.int32)
    if temperature_ptr is not None:
        sampled = tl.where(tl.load(temperature_ptr + slot) > 0.0, 1, 0)
    # The arg-max is needed for greedy rows and for rows without a proper law.
    point = (tl.abs(top) == POS_INF) | ((status & NONFINITE_ROW) != 0)
    first = tl.zeros([GROUP], tl.int32)
    if tl.max(tl.where((rows >= 0) & (point | (sampled == 0)), 1, 0), axis=0) > 0:
        first = first_of(row_ptrs, tops, top, vocab, LEAVES)
    token = first
    if temperature_ptr is not None:
        if (sampled > 0) & walks:
            forward = tl.load(logits_indices_ptr + rows, mask=rows >= 0, other=0)
            position = tl.load(positions_ptr + forward, mask=rows >= 0, other=0) + 1
            anchor = tl.load(positions_ptr + tl.load(logits_indices_ptr + row0))
            drawn = draw_rows(row_ptrs, tops, words, top, vocab, scale, tl.load(seed_ptr + slot), position[:, None], anchor,
                              i[:, None], GROUP, LEAVES)  # fmt: skip
            token = tl.where(point, first, drawn)
    tl.store(row_values_ptr + rows * 3, top, mask=rows >= 0)
    tl.store(row_values_ptr + rows * 3 + 1, 1.0 / tl.maximum(mass, 1).to(tl.float32) * ONE, mask=rows >= 0)
    tl.store(row_ids_ptr + rows * 4, first, mask=rows >= 0)
    tl.store(row_ids_ptr + rows * 4 + 1, status, mask=rows >= 0)
    tl.store(row_ids_ptr + rows * 4 + 3, token, mask=rows >= 0)
    if SWEEPS:
        # Rows of nodes without children hold no law: what is stored for them is never asked for.
        top, mass, words, tops = merge_leaves(draft_top_ptr, draft_mass_ptr, rows, num_leaves, draft_scale, LEAVES)
        mass_of = tl.where(top == NEG_INF, NOBODY, tl.full([GROUP], SOFTMAX, tl.int32))
        if tl.max(tl.where((rows >= 0) & (top == POS_INF), 1, 0), axis=0) > 0:
            draft_rows = draft_ptr + slot * stride_ds + tl.where(rows >= 0, i, 0).to(tl.int64) * stride_dm
            mass_of = tl.where(top == POS_INF, first_of(draft_rows, tops, top, draft_vocab, LEAVES), mass_of)
        rest = tl.where(mass_of == SOFTMAX, mass, tl.where(mass_of == NOBODY, 0, 1099511627776))
        tl.store(row_values_ptr + rows * 3 + 2, tl.where(tl.abs(top) == POS_INF, 0.0, top), mask=rows >= 0)
        tl.store(row_ids_ptr + rows * 4 + 2, mass_of, mask=rows >= 0)
        tl.store(row_rest_ptr + rows, rest, mask=rows >= 0)


@triton.jit
def _emit(
    request, slot, row0, length, last, parent, token, flags, draft, forward, i,
    query_start_ptr, positions_ptr, tokens_ptr, accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr, path_ptr,
    source_ptr, commit_ptr, flags_ptr, anchors_ptr, anchor_positions_ptr,
    num_requests, num_forward, num_nodes, stride_a, stride_p, WIDTH: tl.constexpr,
):  # fmt: skip
    """Everything a request gets: the path up to `last`, then `token`."""
    on_path = tl.where(i == last, 1, 0)
    node = last
    while node > 0:
        node = tl.minimum(_pick(parent, node, i), node - 1)
        on_path = tl.where(i == node, 1, on_path)
    rank = tl.cumsum(on_path, axis=0) - 1
    accepted = tl.sum(on_path, axis=0) - 1
    kept = on_path > 0
    base = request.to(tl.int64) * num_nodes
    tl.store(tokens_ptr + base + rank - 1, draft.to(tl.int64), mask=kept & (rank > 0))
    tl.store(tokens_ptr + base + i, tl.where(i == accepted, token, -1).to(tl.int64), mask=(i >= accepted) & (i < num_nodes))
    tl.store(path_ptr + base + rank, i, mask=kept)
    tl.store(path_ptr + base + i, tl.full([WIDTH], -1, tl.int32), mask=(i > accepted) & (i < num_nodes))
    tl.store(source_ptr + base + rank, forward, mask=kept)
    tl.store(source_ptr + base + i, tl.full([WIDTH], -1, tl.int32), mask=(i > accepted) & (i < num_nodes))
    tl.store(accepted_ptr + request, accepted)
    tl.store(emitted_ptr + request, accepted + 1)
    tl.store(rejected_ptr + request, length - accepted)
    tl.store(next_ptr + request, token.to(tl.int64))
    tl.store(last_row_ptr + request, _pick(forward, last, i))
    tl.store(flags_ptr + request, flags)
    if anchors_ptr is not None:
        tl.store(anchors_ptr + slot * stride_a, token)
    if anchor_positions_ptr is not None:
        anchor = tl.load(positions_ptr + _pick(forward, 0, i))
        tl.store(anchor_positions_ptr + slot * stride_p, anchor + accepted + 1)
    # Rows before the anchor's are a prompt's and stay; rows of nodes that are not on the path go.
    tl.store(commit_ptr + forward, kept, mask=i <= length)
    start = tl.load(query_start_ptr + request)
    end = tl.minimum(tl.load(query_start_ptr + request + 1), num_forward)
    root = _pick(forward, 0, i)
    _fill(commit_ptr, start, tl.minimum(root, end), 1)
    _fill(commit_ptr, tl.maximum(root + length + 1, start), end, 0)
    if request == num_requests - 1:
        _fill(commit_ptr, end, num_forward, 0)


@triton.jit
def _fill(commit_ptr, start, end, value):
    for first in range(start, end, 128):
        row = first + tl.arange(0, 128)
        tl.store(commit_ptr + row, row * 0 + value != 0, mask=row < end)


@triton.jit
def _emit_nothing(
    request, slot, tokens_ptr, accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr, path_ptr, source_ptr,
    commit_ptr, flags_ptr, query_start_ptr, num_requests, num_forward, num_nodes, WIDTH: tl.constexpr,
):  # fmt: skip
    """A request without logit rows (a prefill chunk keeps all its rows) or a padding row."""
    i = tl.arange(0, WIDTH)
    base = request.to(tl.int64) * num_nodes
    tl.store(tokens_ptr + base + i, tl.full([WIDTH], -1, tl.int64), mask=i < num_nodes)
    tl.store(path_ptr + base + i, tl.full([WIDTH], -1, tl.int32), mask=i < num_nodes)
    tl.store(source_ptr + base + i, tl.full([WIDTH], -1, tl.int32), mask=i < num_nodes)
    tl.store(accepted_ptr + request, 0)
    tl.store(emitted_ptr + request, 0)
    tl.store(rejected_ptr + request, 0)
    tl.store(next_ptr + request, tl.full((), -1, tl.int64))
    tl.store(last_row_ptr + request, 0)
    tl.store(flags_ptr + request, 0)
    start = tl.load(query_start_ptr + request)
    end = tl.minimum(tl.load(query_start_ptr + request + 1), num_forward)
    _fill(commit_ptr, start, end, tl.where(slot >= 0, 1, 0))
    if request == num_requests - 1:
        _fill(commit_ptr, end, num_forward, 0)


@triton.jit
def _walk(parent, draft, token, open_nodes, i, WIDTH: tl.constexpr):
    """Follow each node's own token from the root: the last node."""
    node = tl.zeros((), tl.int32)
    child = node
    while child < WIDTH:
        node = child
        child = _next(open_nodes & (parent == node) & (draft == _pick(token, node, i)), node, i, WIDTH)
    return node


@triton.jit
def _left_in_leaves(target_row, draft_row, leaf, law, taken, tokens, multiplier, factor, scale, draft_scale, vocab, draft_vocab, i,
                    WITHOUT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """What is left in leaves [PAIRS] of a node's law and of its children's draft weights, fp32 [PAIRS, LEAF].

    law: P on entry; target: who has mass, maximum, factor; draft: who has mass, reference.
    """
    start, mass_of, top, inverse, draft_mass_of, reference = law
    ids = leaf[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
    x = numbers(tl.load(target_row + ids, mask=ids < vocab, other=NEG_INF).to(tl.float32))
    y = numbers(tl.load(draft_row + ids, mask=ids < draft_vocab, other=NEG_INF).to(tl.float32))
    target_prob = start * _weight(x, ids, mass_of, top, inverse, scale)
    draft_weight = _weight(y, ids, draft_mass_of, reference, 1.0, draft_scale)
    return _remaining(target_prob, draft_weight, ids, taken, tokens, multiplier, factor, i, WITHOUT, WIDTH)


@triton.jit
def _decide(
    request, slot, row0, length, sweep,
    target_ptr, token_ids_ptr, logits_indices_ptr, positions_ptr, query_start_ptr, parents_ptr, draft_ptr, temperature_ptr,
    seed_ptr, tokens_ptr, accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr, path_ptr, source_ptr, commit_ptr,
    flags_ptr, anchors_ptr, anchor_positions_ptr, published_ptr,
    top_ptr, mass_ptr, residual_ptr, rest_ptr, row_values_ptr, row_ids_ptr, row_rest_ptr,
    node_values_ptr, node_ids_ptr, node_rest_ptr, record_ptr,
    walks, scale, draft_scale, num_requests, num_forward, num_nodes, vocab, draft_vocab, num_leaves,
    stride_t, stride_ds, stride_dm, stride_a, stride_p,
    RULE: tl.constexpr, WITHOUT: tl.constexpr, LEAVES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Decide from what is known after `sweep` sweeps: publish the next one, or emit."""
    i = tl.arange(0, WIDTH)
    has_row = i <= length
    rows = (row0 + i).to(tl.int64)
    parent = tl.load(parents_ptr + slot * num_nodes + i, mask=has_row & (i > 0), other=-1)
    forward = tl.load(logits_indices_ptr + rows, mask=has_row, other=0)
    draft = tl.load(token_ids_ptr + forward, mask=has_row, other=-1)
    inside = has_row & (draft >= 0) & (draft < vocab)
    mass_of, top, inverse, draft_mass_of, reference, first, status = _node_laws(row_values_ptr, row_ids_ptr, rows, has_row)
    # Children of a node without a finite logit are not looked at.
    stops = (status & NONFINITE_ROW) != 0
    parent_at = tl.where((parent >= 0) & (parent < i), parent, 0)
    stopped = tl.gather(tl.where(stops, 1, 0), parent_at, axis=0) > 0
    is_child = has_row & (parent >= 0) & (parent < i) & (stopped == 0)

    last = tl.zeros((), tl.int32)
    final = tl.full((), 1, tl.int32)
    bad = is_child & (inside == 0)
    if RULE == WALK:
        drawn = tl.load(row_ids_ptr + rows * 4 + 3, mask=has_row, other=-1, volatile=True)
        last = _walk(parent, draft, drawn, is_child, i, WIDTH)
        token = _pick(drawn, last, i).to(tl.int64)
    else:
        token = tl.zeros((), tl.int64)
        drawn = tl.load(row_ids_ptr + rows * 4 + 3, mask=has_row, other=-1, volatile=True)
        if walks > 0:
            last = _walk(parent, draft, drawn, is_child, i, WIDTH)
            token = _pick(drawn, last, i).to(tl.int64)
    taken_any = tl.zeros((), tl.int32)
    empty = tl.zeros((), tl.int32)
    if RULE != WALK:
        if walks == 0:
            seed = tl.load(seed_ptr + slot)
            depth = tl.load(positions_ptr + forward, mask=has_row, other=0)
            anchor = _pick(depth, 0, i)
            coin = uniform(coin_words(seed, depth, anchor, ACCEPT, i))
            ids = tl.where(inside, draft, 0)
            # The parent's row is what judges a node: its facts, by node.
            parent_rows = row0.to(tl.int64) + parent_at
            x = numbers(tl.load(target_ptr + parent_rows * stride_t + ids, mask=is_child & inside, other=NEG_INF).to(tl.float32))
            in_draft = is_child & inside & (draft < draft_vocab)
            draft_rows = draft_ptr + slot * stride_ds + parent_at.to(tl.int64) * stride_dm
            y = numbers(tl.load(draft_rows + ids, mask=in_draft, other=NEG_INF).to(tl.float32))
            target_prob = _weight(x, ids, tl.gather(mass_of, parent_at, axis=0), tl.gather(top, parent_at, axis=0),
                                  tl.gather(inverse, parent_at, axis=0), scale)  # fmt: skip
            draft_weight = _weight(y, ids, tl.gather(draft_mass_of, parent_at, axis=0), tl.gather(reference, parent_at, axis=0),
                                   1.0, draft_scale)  # fmt: skip
            draft_weight = tl.where(in_draft, draft_weight, 0.0)
            row_rest = tl.load(row_rest_ptr + rows, mask=has_row, other=0, volatile=True)

            # Per node: P as numerator and denominator, 1 - P, P on entry. Per rejected child: what its parent's law was multiplied
            # by, what draft weights were, and the draft mass that its younger siblings share.
            values = node_values_ptr + (request.to(tl.int64) * 6) * WIDTH + i
            states = node_ids_ptr + (request.to(tl.int64) * 2) * WIDTH + i
            rests = node_rest_ptr + request.to(tl.int64) * WIDTH + i
            numerator = tl.full([WIDTH], 1.0, tl.float32)
            denominator = tl.full([WIDTH], 1.0, tl.float32)
            lack = tl.zeros([WIDTH], tl.float32)
            entry = tl.full([WIDTH], 1.0, tl.float32)
            multiplier = tl.full([WIDTH], 1.0, tl.float32)
            factor = tl.zeros([WIDTH], tl.float32)
            rejected = tl.zeros([WIDTH], tl.int32)
            foul = tl.zeros([WIDTH], tl.int32)
            rest = tl.zeros([WIDTH], tl.int64)
            node = tl.zeros((), tl.int32)
            child = node
            some = tl.full((), 1, tl.int32)
            if sweep > 0:
                numerator = tl.load(values, volatile=True)
                denominator = tl.load(values + WIDTH, volatile=True)
                lack = tl.load(values + 2 * WIDTH, volatile=True)
                entry = tl.load(values + 3 * WIDTH, volatile=True)
                multiplier = tl.load(values + 4 * WIDTH, volatile=True)
                factor = tl.load(values + 5 * WIDTH, volatile=True)
                rejected = tl.load(states, volatile=True)
                foul = tl.load(states + WIDTH, volatile=True)
                rest = tl.load(rests, volatile=True)
                node = tl.load(record_ptr + request * 2, volatile=True)
                child = tl.load(record_ptr + request * 2 + 1, volatile=True)
                # The sweep's result.
                leaf = tl.arange(0, LEAVES)
                total = tl.sum(tl.load(residual_ptr + request.to(tl.int64) * num_leaves + leaf, mask=leaf < num_leaves, other=0,
                                       volatile=True), axis=0)  # fmt: skip
                some = tl.where(total > 0, 1, 0)
                if WITHOUT:
                    whole = tl.sum(tl.load(rest_ptr + request.to(tl.int64) * num_leaves + leaf, mask=leaf < num_leaves, other=0,
                                           volatile=True), axis=0)  # fmt: skip
                    rest = tl.where(i == child, whole, rest)
                mass = total.to(tl.float32) * 8.673617379884035e-19  # 2^-60
                if RULE == RECURSIVE:
                    multiplier = tl.where(i == child, 1.0 / tl.where(total > 0, mass, float("inf")), multiplier)
                else:
                    below = mass + _pick(lack, node, i)
                    scale_up = 1.0 / tl.where(below > 0.0, below, float("inf"))
                    multiplier = tl.where(i == child, scale_up, multiplier)
                    lack = tl.where(i == node, lack * scale_up, lack)
                    numerator = tl.where(i == node, mass, numerator)
                    denominator = tl.where(i == node, below, denominator)
            final = tl.zeros((), tl.int32)
            swept = tl.zeros((), tl.int32)
            while (final | swept) == 0:
                siblings = is_child & (parent == node)
                taken = siblings & (rejected > 0)
                child = _next(siblings & (rejected == 0), node, i, WIDTH)
                if child < WIDTH:
                    weight = _pick(draft_weight, child, i)
                    prob = _pick(entry, node, i) * _pick(target_prob, child, i)
                    own = _pick(draft, child, i)
                    prob, weight = _remaining(prob, weight, own, taken, draft, multiplier, factor, i, WITHOUT, WIDTH)
                    left = _pick(row_rest, node, i)
                    if WITHOUT:
                        elder = tl.max(tl.where(taken, i, -1), axis=0)
                        left = tl.where(elder >= 0, _pick(rest, elder, i), left)
                    own_factor = tl.where(left > 0, 1.0 / tl.maximum(left, 1).to(tl.float32) * ONE, 0.0)
                    draft_prob = weight * own_factor
                    possible = (_pick(tl.where(inside, 1, 0), child, i) > 0) & (draft_prob > 0.0)
                    factor = tl.where(i == child, own_factor, factor)
                    foul = tl.where((i == child) & (possible == 0), 1, foul)
                    if RULE == RECURSIVE:
                        passes = possible & (_pick(coin, child, i) * draft_prob < prob)
                        node = tl.where(passes, child, node)
                        swept = tl.where(passes, 0, 1)
                    else:
                        chance = tl.where(possible, tl.minimum(prob / tl.where(possible, draft_prob, 1.0), 1.0), 0.0)
                        short = tl.where(possible, tl.maximum(draft_prob - prob, 0.0) / tl.where(possible, draft_prob, 1.0), 1.0)
                        numerator = tl.where(i == child, chance, numerator)
                        entry = tl.where(i == child, chance, entry)
                        lack = tl.where(i == child, short, lack)
                        node = child
                else:
                    below = _pick(denominator, node, i)
                    passes = (node == 0) | (below <= 0.0) | (_pick(coin, node, i) * below < _pick(numerator, node, i))
                    if RULE == RECURSIVE:
                        passes = passes | (node >= 0)
                    final = tl.where(passes, 1, 0)
                    swept = tl.where(passes, 0, 1)
                    child = node
                    node = tl.where(passes, node, _pick(parent, node, i))
            last = node
            taken = is_child & (parent == node) & (rejected > 0)
            bad = foul > 0
            if final == 0:
                # `child` is rejected: the residual at its parent decides what follows.
                tl.store(values, numerator)
                tl.store(values + WIDTH, denominator)
                tl.store(values + 2 * WIDTH, lack)
                tl.store(values + 3 * WIDTH, entry)
                tl.store(values + 4 * WIDTH, multiplier)
                tl.store(values + 5 * WIDTH, factor)
                tl.store(states, tl.where(i == child, 1, rejected))
                tl.store(states + WIDTH, foul)
                tl.store(rests, rest)
                tl.store(record_ptr + request * 2, node)
                tl.store(record_ptr + request * 2 + 1, child)
            else:
                row = row0.to(tl.int64) + node
                target_row = target_ptr + row * stride_t
                law = (_pick(entry, node, i), _pick(mass_of, node, i), _pick(top, node, i), _pick(inverse, node, i),
                       _pick(draft_mass_of, node, i), _pick(reference, node, i))  # fmt: skip
                is_point = _pick(mass_of, node, i) != SOFTMAX
                taken_any = tl.max(tl.where(taken, 1, 0), axis=0)
                empty = tl.where((taken_any > 0) & (some == 0), 1, 0)
                position = tl.full([1, 1], 0, tl.int64) + _pick(depth, node, i) + 1
                at = tl.full([1, 1], 0, tl.int32) + node
                token = _pick(first, node, i).to(tl.int64)
                if (taken_any > 0) & (some > 0):
                    draft_row = draft_ptr + slot * stride_ds + node.to(tl.int64) * stride_dm
                    leaf = tl.arange(0, LEAVES)[None, :]
                    mass = tl.load(residual_ptr + request.to(tl.int64) * num_leaves + leaf, mask=leaf < num_leaves, other=0,
                                   volatile=True)  # fmt: skip
                    weight = tl.where(mass > 0, tl.log2(tl.maximum(mass, 1).to(tl.float32)), NEG_INF)
                    winner = race_leaves(weight, seed, position, anchor, at, 1, LEAVES)
                    left, _ = _left_in_leaves(target_row, draft_row, winner, law, taken, draft, multiplier, factor, scale,
                                              draft_scale, vocab, draft_vocab, i, WITHOUT, WIDTH)  # fmt: skip
                    weight = tl.where(left > 0.0, tl.log2(tl.where(left > 0.0, left, 1.0)), NEG_INF)
                    token = tl.sum(race_ids(weight, winner, seed, position, anchor, at, 1), axis=0).to(tl.int64)
                elif is_point == 0:
                    one = tl.full([1], 0, tl.int64) + row
                    row_top, _, words, tops = merge_leaves(top_ptr, mass_ptr, one, num_leaves, scale, LEAVES)
                    plain = draw_rows(target_ptr + one * stride_t, tops, words, row_top, vocab, scale, seed, position, anchor, at,
                                      1, LEAVES)  # fmt: skip
                    token = tl.sum(plain, axis=0).to(tl.int64)
    if final > 0:
        path = tl.where(i == last, 1, 0)
        node = last
        while node > 0:
            node = tl.minimum(_pick(parent, node, i), node - 1)
            path = tl.where(i == node, 1, path)
        flags = tl.where(tl.max(tl.where(path > 0, status & NAN, 0), axis=0) > 0, NAN, 0)
        flags |= _pick(status & NONFINITE_ROW, last, i)
        flags |= tl.where(tl.max(tl.where(bad & is_child & (parent == last), 1, 0), axis=0) > 0, BAD_TOKEN_ID, 0)
        flags |= tl.where(empty > 0, EMPTY_RESIDUAL, 0)
        _emit(
            request, slot, row0, length, last, parent, token, flags, draft, forward, i,
            query_start_ptr, positions_ptr, tokens_ptr, accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr,
            path_ptr, source_ptr, commit_ptr, flags_ptr, anchors_ptr, anchor_positions_ptr,
            num_requests, num_forward, num_nodes, stride_a, stride_p, WIDTH,
        )  # fmt: skip
    if RULE != WALK:
        tl.debug_barrier()
        tl.atomic_xchg(published_ptr + request, tl.where(final > 0, DONE, sweep + 1), sem="release", scope="gpu")


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "num_forward"])
def accept_tree_kernel(
    target_ptr,  # [L, V]
    query_start_ptr, cu_logits_ptr,  # [R+1]
    logits_indices_ptr,  # [L]
    token_ids_ptr, positions_ptr,  # [N_max]
    parents_ptr,  # [S, M]
    draft_ptr, draft_temperature_ptr,  # [S, M, Vd], [S] or None
    temperature_ptr, seed_ptr,  # [S]; temperature None = every row greedy
    slots_ptr,  # [R] or None
    tokens_ptr,  # [R, M]
    accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr,  # [R]
    path_ptr, source_ptr,  # [R, M]
    commit_ptr,  # [N_max]
    flags_ptr,  # [R]
    anchors_ptr, anchor_positions_ptr,  # [S] or None, advanced in place
    ticket_ptr, group_count_ptr, request_count_ptr, sweep_count_ptr, item_count_ptr, published_ptr,  # int32, zero before and after
    top_ptr, mass_ptr, draft_top_ptr, draft_mass_ptr,  # [L, NL]
    residual_ptr, rest_ptr,  # [R, NL]
    row_values_ptr, row_ids_ptr, row_rest_ptr,  # [L, 3], [L, 4], [L]
    node_values_ptr, node_ids_ptr, node_rest_ptr,  # [R, 6, WIDTH], [R, 2, WIDTH], [R, WIDTH]
    record_ptr,  # [R, 2]
    num_requests, num_slots, num_rows, num_forward, num_nodes, vocab, draft_vocab, num_leaves,
    stride_t, stride_ds, stride_dm, stride_a, stride_p,
    RULE: tl.constexpr, WITHOUT: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr, LEAVES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = GROUP * CHUNK
    SWEEPS: tl.constexpr = RULE != WALK
    chunks = tl.cdiv(num_leaves, CHUNK)
    groups = tl.cdiv(num_nodes, GROUP)
    first_wave = groups * chunks
    parts = tl.cdiv(num_leaves, PAIRS * SPAN)
    sweeps = 0
    if SWEEPS:
        sweeps = num_nodes - 1

    # Tickets, not program ids, order the work: a sweep waits for items with earlier tickets alone.
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")
    if ticket == num_requests * (first_wave + sweeps * parts) - 1:
        tl.store(ticket_ptr, 0)
    number = -1
    request = ticket // first_wave
    item = ticket % first_wave
    if SWEEPS:
        if ticket >= num_requests * first_wave:
            behind = ticket - num_requests * first_wave
            number = behind // (num_requests * parts)
            request = behind // parts % num_requests
            item = behind % parts

    slot = tl.max(state_slots(slots_ptr, request + tl.arange(0, 1), num_requests, num_slots), axis=0)
    row0 = tl.load(cu_logits_ptr + request)
    length = tl.minimum(tl.minimum(tl.load(cu_logits_ptr + request + 1), num_rows) - row0, num_nodes) - 1
    if slot < 0:
        length = length * 0 - 1
    scale = tl.full((), 1.4426950408889634, tl.float32)
    draft_scale = scale
    walks = tl.full((), 1, tl.int32)
    if length >= 0:
        if temperature_ptr is not None:
            temperature = tl.load(temperature_ptr + slot)
            scale = log2_scale(temperature)
            if SWEEPS:
                draft_temperature = temperature
                if draft_temperature_ptr is not None:
                    draft_temperature = tl.load(draft_temperature_ptr + slot)
                draft_scale = log2_scale(draft_temperature)
                walks = tl.where((temperature > 0.0) & (draft_temperature > 0.0), 0, 1)

    decides = 0
    sweep = 0
    if number < 0:
        if length < 0:
            if item == 0:
                _emit_nothing(request, slot, tokens_ptr, accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr,
                              path_ptr, source_ptr, commit_ptr, flags_ptr, query_start_ptr, num_requests, num_forward, num_nodes,
                              WIDTH)  # fmt: skip
        else:
            group = item // chunks
            if group * GROUP <= length:
                # Leaves of this item: PAIRS (node, leaf) pairs.
                pair = tl.arange(0, PAIRS)
                i = group * GROUP + pair // CHUNK
                leaf = (item % chunks) * CHUNK + pair % CHUNK
                keep = (i <= length) & (leaf < num_leaves)
                row = (row0 + i).to(tl.int64)
                ids = leaf[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
                inside = keep[:, None] & (ids < vocab)
                raw = tl.load(target_ptr + row[:, None] * stride_t + ids, mask=inside, other=NEG_INF).to(tl.float32)
                x = numbers(raw)
                top, mass = leaf_masses(x, scale, PAIRS)
                mass |= tl.where(tl.max(tl.where(raw != raw, 1, 0), axis=1) > 0, SAW_NAN, 0)
                mass |= tl.where(tl.max(tl.where(tl.abs(x) < POS_INF, 1, 0), axis=1) > 0, SAW_FINITE, 0)
                tl.store(top_ptr + row * num_leaves + leaf, top, mask=keep)
                tl.store(mass_ptr + row * num_leaves + leaf, mass, mask=keep)
                if SWEEPS:
                    # The law of a node that has children.
                    m = tl.arange(0, WIDTH)
                    parent = tl.load(parents_ptr + slot * num_nodes + m, mask=(m > 0) & (m <= length), other=-1)
                    inner = tl.max(tl.where(i[:, None] == parent[None, :], 1, 0), axis=1) > 0
                    inside = (keep & inner)[:, None] & (ids < draft_vocab)
                    rows = draft_ptr + slot * stride_ds + i.to(tl.int64)[:, None] * stride_dm
                    x = numbers(tl.load(rows + ids, mask=inside, other=NEG_INF).to(tl.float32))
                    top, mass = leaf_masses(x, draft_scale, PAIRS)
                    tl.store(draft_top_ptr + row * num_leaves + leaf, top, mask=keep)
                    tl.store(draft_mass_ptr + row * num_leaves + leaf, mass, mask=keep)
                if arrive(group_count_ptr + request * groups + group, chunks):
                    _merge_nodes(
                        group, slot, row0, length, target_ptr, draft_ptr, temperature_ptr, seed_ptr, positions_ptr,
                        logits_indices_ptr, top_ptr, mass_ptr, draft_top_ptr, draft_mass_ptr, row_values_ptr, row_ids_ptr,
                        row_rest_ptr, walks > 0, scale, draft_scale, vocab, draft_vocab, num_leaves, stride_t, stride_ds,
                        stride_dm, SWEEPS, GROUP, LEAVES,
                    )  # fmt: skip
                    if arrive(request_count_ptr + request, length // GROUP + 1):
                        decides = 1
    elif SWEEPS:
        state = tl.full((), DONE, tl.int32)
        if length >= 0:
            state = tl.atomic_add(published_ptr + request, 0, sem="acquire", scope="gpu")
            while state <= number:
                state = tl.atomic_add(published_ptr + request, 0, sem="acquire", scope="gpu")
            tl.debug_barrier()
        if state < DONE:
            m = tl.arange(0, WIDTH)
            has_row = m <= length
            rows = (row0 + m).to(tl.int64)
            node = tl.load(record_ptr + request * 2, volatile=True)
            parent = tl.load(parents_ptr + slot * num_nodes + m, mask=has_row & (m > node), other=-1)
            forward = tl.load(logits_indices_ptr + rows, mask=has_row, other=0)
            draft = tl.load(token_ids_ptr + forward, mask=has_row, other=-1)
            values = node_values_ptr + (request.to(tl.int64) * 6) * WIDTH + m
            rejected = tl.load(node_ids_ptr + (request.to(tl.int64) * 2) * WIDTH + m, volatile=True)
            taken = has_row & (parent == node) & (rejected > 0)
            entry = tl.load(values + 3 * WIDTH, volatile=True)
            multiplier = tl.load(values + 4 * WIDTH, volatile=True)
            factor = tl.load(values + 5 * WIDTH, volatile=True)
            mass_of, top, inverse, draft_mass_of, reference, _, _ = _node_laws(row_values_ptr, row_ids_ptr, rows, has_row)
            law = (_pick(entry, node, m), _pick(mass_of, node, m), _pick(top, node, m), _pick(inverse, node, m),
                   _pick(draft_mass_of, node, m), _pick(reference, node, m))  # fmt: skip
            target_row = target_ptr + (row0.to(tl.int64) + node) * stride_t
            draft_row = draft_ptr + slot * stride_ds + node.to(tl.int64) * stride_dm
            for span in range(SPAN):
                leaf = (item * SPAN + span) * PAIRS + tl.arange(0, PAIRS)
                left, weight = _left_in_leaves(target_row, draft_row, leaf, law, taken, draft, multiplier, factor, scale,
                                               draft_scale, vocab, draft_vocab, m, WITHOUT, WIDTH)  # fmt: skip
                mass = masses(left, PAIRS, LEAF, RESIDUAL_ONE)
                tl.store(residual_ptr + request.to(tl.int64) * num_leaves + leaf, mass, mask=leaf < num_leaves)
                if WITHOUT:
                    mass = masses(weight, PAIRS, LEAF, ONE)
                    tl.store(rest_ptr + request.to(tl.int64) * num_leaves + leaf, mass, mask=leaf < num_leaves)
            if arrive(sweep_count_ptr + request, parts):
                decides = 1
                sweep = number + 1
    if decides > 0:
        _decide(
            request, slot, row0, length, sweep,
            target_ptr, token_ids_ptr, logits_indices_ptr, positions_ptr, query_start_ptr, parents_ptr, draft_ptr,
            temperature_ptr, seed_ptr, tokens_ptr, accepted_ptr, emitted_ptr, rejected_ptr, next_ptr, last_row_ptr, path_ptr,
            source_ptr, commit_ptr, flags_ptr, anchors_ptr, anchor_positions_ptr, published_ptr,
            top_ptr, mass_ptr, residual_ptr, rest_ptr, row_values_ptr, row_ids_ptr, row_rest_ptr, node_values_ptr, node_ids_ptr,
            node_rest_ptr, record_ptr,
            walks, scale, draft_scale, num_requests, num_forward, num_nodes, vocab, draft_vocab, num_leaves,
            stride_t, stride_ds, stride_dm, stride_a, stride_p, RULE, WITHOUT, LEAVES, WIDTH,
        )  # fmt: skip
    if SWEEPS:
        if number >= 0:
            if length >= 0:
                if arrive(item_count_ptr + request, sweeps * parts):
                    tl.store(published_ptr + request, 0)


def launch_accept_tree(items, args, *, rule, without_replacement, leaves, width, config):
    """Launch one program per item (a wave-1 part of a request, or a part of a sweep)."""
    accept_tree_kernel[(items,)](
        *args,
        RULE=rule,
        WITHOUT=without_replacement,
        GROUP=config.group,
        CHUNK=config.chunk,
        SPAN=config.span,
        LEAVES=leaves,
        WIDTH=width,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
    )
