"""Draft trees of a static shape, all depths in one launch: the rows of a depth's nodes, then their children, depth by depth.

    top_k                the best logits of a row
    without_replacement  the best keys logit / T - ln E of one race per row
    iid                  draws in two races: leaf by its mass, then id inside it (kernels/draft_tree/append.py)

Symbols: R requests, S state slots, M nodes, V vocabulary, leaf = 1024 ids, F nodes of a depth at most, B children of each.
Oracle: reference/tree_draft.py. Sources: EAGLE arXiv 2401.15077, SpecInfer arXiv 2305.09781, Sequoia arXiv 2402.12374.

Every depth is up to three waves (primitives/waves.py): latents of a gated or rnn head for its nodes; rows, an item = 16 (request,
node) pairs of the batch x a leaf of ids, so that W2 is read once for 16 nodes, whoever they belong to; children, an item =
a request. An item of rows leaves the B best words of its leaf for each row, sorted, and what is needed of a law.
"""

import triton
import triton.language as tl

from ..draft.heads import DOT_ROWS, gated_rows, hoist_rows, low_rank_bias, rnn_rows, w2_tile
from ..primitives.adjust import adjusted, no_path
from ..primitives.leaves import leaf_masses
from ..primitives.mass import LEAF, NEG_INF, POS_INF, log2_scale, numbers
from ..primitives.philox import DRAFT, lane_words, log2_exponential, words_at
from ..primitives.race import pack
from ..primitives.slots import state_slots
from ..primitives.waves import finish_item, take_item, wait_for
from ..primitives.widen import by_cast, fp8_by_bits, fp8_by_cast
from .append import IID, NAN, SAW_FINITE, TOP_K, WITHOUT_REPLACEMENT, append, frontier

DEPTHS_PER_WORD = tl.constexpr(5)  # numbers below 64 in an int32
NO_ENTRY = tl.constexpr((1 << 63) - 1)  # above every word


@triton.jit
def _children_of(branching, depth):
    """How many children nodes of a depth get, from words of 5 numbers."""
    word = tl.zeros((), tl.int32)
    for i in tl.static_range(len(branching)):
        word = tl.where(depth // DEPTHS_PER_WORD == i, branching[i], word)
    return (word >> (depth % DEPTHS_PER_WORD * 6)) & 63


@triton.jit
def _best_so_far(running, words):
    """running [ROWS, KEEP], the best words seen in no order, after words [ROWS, N] of which none is there already."""
    best = tl.max(words, axis=1)
    least = tl.min(running, axis=1)
    while tl.max(tl.where(best > least, 1, 0), axis=0) > 0:
        better = best > least
        running = tl.where((running == least[:, None]) & better[:, None], best[:, None], running)
        words = tl.where((words == best[:, None]) & better[:, None], 0, words)
        best = tl.max(words, axis=1)
        least = tl.min(running, axis=1)
    return running


@triton.jit
def _store_best(lists_ptr, rows, inside, running, wanted, KEEP: tl.constexpr):
    """The first `wanted` of running [ROWS, KEEP] in descending order to lists [., wanted]; 0 where there is no word."""
    running = tl.where((running >= KEEP) & (running < NO_ENTRY), running, 0)
    for j in range(wanted):
        best = tl.max(running, axis=1)
        tl.store(lists_ptr + rows * wanted + j, best, mask=inside)
        running = tl.where(running == best[:, None], 0, running)


@triton.jit
def _tokens_of(slots, node, live, state, tree, num_nodes):
    """Token of each node, the anchor from where the engine keeps it."""
    anchors_ptr, stride_a = state[0], state[1]
    anchor = tl.load(anchors_ptr + slots * stride_a, mask=live & (node == 0), other=-1).to(tl.int64)
    token = tl.load(tree[0] + slots * num_nodes + node, mask=live & (node > 0), other=-1, volatile=True)
    return tl.where(node == 0, anchor, token)


@triton.jit
def _latents_item(
    item, depth, width, state, head, mixer, tree, scratch, num_requests, num_slots, num_nodes, depths,
    MIX: tl.constexpr, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_S: tl.constexpr, MIX_TYPE: tl.constexpr,
):  # fmt: skip
    """BLOCK_J latents of 16 rows; a node's state goes on from its parent's."""
    rank = head[6]
    tiles = tl.cdiv(rank, BLOCK_J)
    j = item % tiles * BLOCK_J + tl.arange(0, BLOCK_J)
    columns = item // tiles * DOT_ROWS + tl.arange(0, DOT_ROWS)
    requests = columns // width
    slots = state_slots(state[4], requests, num_requests, num_slots)
    start, count, at_depth, total = frontier(requests, slots, depth, None, width, state, tree, scratch, num_nodes, WIDTH)
    live = columns % width < count
    if tl.max(tl.where(live, 1, 0), axis=0) > 0:
        node = tl.where(live, start + columns % width, 0).to(tl.int64)
        previous = _tokens_of(slots, node, live, state, tree, num_nodes)
        known = live & (previous >= 0) & (previous < head[5])
        parent = tl.load(tree[1] + slots * num_nodes + node, mask=live & (node > 0), other=-1, volatile=True)
        own = requests.to(tl.int64) * num_nodes
        state_row = tl.where(parent >= 0, own + parent, -1)
        row = requests.to(tl.int64) * depths + depth
        latent = MIX(mixer, head, j, live, previous, known, row, state_row, own + node, BLOCK_S, MIX_TYPE)
        latent_ptr = mixer[6]
        at = latent_ptr + columns.to(tl.int64)[None, :] * rank + j[:, None]
        tl.store(at, latent.to(latent_ptr.dtype.element_ty), mask=(j < rank)[:, None] & live[None, :])


@triton.jit
def _weigh_leaf(
    group, chunk, depth, width, state, tree, law, scratch, level, num_requests, num_slots, num_nodes, vocab, chunks,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Maximum and mass of a leaf of the 16 laws that this program has just stored."""
    law_ptr, stride_ls, stride_lm = law
    ids = chunk * LEAF + tl.arange(0, LEAF)
    for first in range(0, DOT_ROWS, PAIRS):
        columns = group * DOT_ROWS + first + tl.arange(0, PAIRS)
        requests = columns // width
        slots = state_slots(state[4], requests, num_requests, num_slots)
        start, count, at_depth, total = frontier(requests, slots, depth, level, width, state, tree, scratch, num_nodes, WIDTH)
        live = columns % width < count
        row_ptrs = law_ptr + slots * stride_ls + (start + columns % width).to(tl.int64) * stride_lm
        inside = live[:, None] & (ids < vocab)[None, :]
        x = tl.load(row_ptrs[:, None] + ids[None, :], mask=inside, other=NEG_INF, volatile=True).to(tl.float32)
        scale = log2_scale(tl.load(state[5] + slots, mask=live, other=0.0))
        top, mass = leaf_masses(x, scale[:, None], PAIRS)
        row = columns.to(tl.int64) * chunks + chunk
        tl.store(scratch[4] + row, top, mask=live)
        tl.store(scratch[5] + row, mass, mask=live)


@triton.jit
def _rows_item(
    group, chunk, depth, width, wanted, tile, base, state, head, mixer, choice, tree, law, scratch, row_status_ptr, level,
    num_requests, num_slots, num_nodes, vocab, chunks,
    METHOD: tl.constexpr, WIDEN: tl.constexpr, KEEP: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """One leaf of ids of 16 rows. tile: of W2, for the first ids."""
    base_ptr, stride_br, stride_bk = base
    positions_ptr, stride_p, slots_ptr, temperature_ptr, seed_ptr = state[2], state[3], state[4], state[5], state[6]
    map_ptr, num_targets, adjust = choice
    columns = group * DOT_ROWS + tl.arange(0, DOT_ROWS)
    requests = columns // width
    f = columns % width
    slots = state_slots(slots_ptr, requests, num_requests, num_slots)
    start, count, at_depth, total = frontier(requests, slots, depth, level, width, state, tree, scratch, num_nodes, WIDTH)
    live = f < count
    node = tl.where(live, start + f, 0).to(tl.int64)
    if tl.max(tl.where(live, 1, 0), axis=0) > 0:
        offsets = requests.to(tl.int64) * stride_br
        if level is None:
            offsets += tl.cast(depth, tl.int64) * stride_bk
        else:
            offsets += f.to(tl.int64) * stride_bk
        known = live
        if head is not None:
            if mixer is None:
                token = _tokens_of(slots, node, live, state, tree, num_nodes)
                known = live & (token >= 0) & (token < head[5])
                latent_ptr = head[0]
                latents = token * head[3]
            else:
                latent_ptr = mixer[6]
                latents = columns.to(tl.int64) * head[6]
        scale = tl.full([DOT_ROWS], 1.4426950408889634, tl.float32)
        sampled = live & (slots < 0)
        if METHOD != TOP_K:
            temperature = tl.load(temperature_ptr + slots, mask=live, other=0.0)
            sampled = temperature > 0.0
            scale = log2_scale(temperature)
        if METHOD == WITHOUT_REPLACEMENT:
            seed = tl.load(seed_ptr + slots, mask=live, other=0)
            anchor = tl.load(positions_ptr + slots * stride_p, mask=live, other=0).to(tl.int64)
            position = anchor + at_depth + 1
        # Words of entries that no id has taken yet differ, so that one is replaced at a time; those beyond `wanted` stay.
        entry = tl.arange(0, KEEP)[None, :] + tl.zeros([DOT_ROWS, 1], tl.int64)
        running = tl.where(entry < wanted, entry, NO_ENTRY)
        seen = tl.zeros([DOT_ROWS], tl.int32)
        first_id = chunk * LEAF
        last_id = tl.minimum(first_id + LEAF, vocab)
        for first in range(first_id, last_id, BLOCK_V):
            ids = first + tl.arange(0, BLOCK_V)
            inside = live[:, None] & (ids < last_id)[None, :]
            x = tl.load(base_ptr + offsets[:, None] + ids[None, :], mask=inside, other=0.0).to(tl.float32)
            if head is not None:
                x += tl.trans(low_rank_bias(tile, head, latent_ptr, latents, known, ids, vocab, WIDEN, BLOCK_R, DOT_TYPE))
                tile = w2_tile(head, ids + BLOCK_V, last_id, BLOCK_R)  # on its way while this one is looked at
            targets = ids  # in the target's vocabulary
            if map_ptr is not None:
                mapped = tl.load(map_ptr + ids, mask=ids < last_id, other=-1)
                used = (mapped >= 0) & (mapped < num_targets)
                targets = tl.where(used, mapped, 0).to(tl.int32)
            if adjust is not None:
                x = adjusted(x, targets[None, :], inside, slots, slots, adjust, targets, 0, no_path)
            if map_ptr is not None:
                x = tl.where(used[None, :], x, NEG_INF)
            nan = inside & (x != x)
            finite = inside & (tl.abs(x) < POS_INF)
            x = numbers(x)
            if law is not None:
                law_ptr, stride_ls, stride_lm = law
                stored = x.to(base_ptr.dtype.element_ty)  # rounded once; everything below reads the rounded value
                tl.store(law_ptr + (slots * stride_ls + node * stride_lm)[:, None] + ids[None, :], stored, mask=inside)
                x = stored.to(tl.float32)
            seen |= tl.max(tl.where(nan, NAN, 0), axis=1) | tl.max(tl.where(finite, SAW_FINITE, 0), axis=1)
            key = x
            if METHOD == WITHOUT_REPLACEMENT:
                slot_of_node = node.to(tl.int32)[:, None]
                if map_ptr is None:
                    noise = lane_words(
                        seed[:, None], first, position[:, None], anchor[:, None], DRAFT, DOT_ROWS, BLOCK_V, slot_of_node
                    )
                else:
                    noise = words_at(seed[:, None], targets[None, :], position[:, None], anchor[:, None], DRAFT, slot_of_node)
                key = tl.where(sampled[:, None], x * scale[:, None] - log2_exponential(noise), x)
            if METHOD == IID:
                inside = inside & (sampled == 0)[:, None]
            words = tl.where(inside & (x > NEG_INF), pack(key, targets[None, :]), 0)
            running = _best_so_far(running, words)
        rows = columns.to(tl.int64) * chunks + chunk
        _store_best(scratch[0], rows, live, running, wanted, KEEP)
        tl.atomic_or(row_status_ptr + columns, seen, mask=live & (seen > 0), sem="relaxed")
        if METHOD == IID:
            if tl.max(tl.where(sampled, 1, 0), axis=0) > 0:
                tl.debug_barrier()
                _weigh_leaf(group, chunk, depth, width, state, tree, law, scratch, level, num_requests, num_slots, num_nodes, vocab,
                            chunks, PAIRS, WIDTH)  # fmt: skip


@triton.jit(do_not_specialize=["branching", "level", "num_requests", "num_slots", "num_nodes", "depths", "items"])
def draft_tree_kernel(
    base,  # (logits [R, K, V] or [R, F, V], strides of R and K or F)
    state,  # (anchors [S] or None, stride, positions [S], stride, slots [R], temperature, seed [S], budgets [R]; each may be None)
    head, mixer,  # kernels/draft/heads.py, or None; of mixer, latents [R F, r] and states [R M, r]
    hidden,  # ([R, K, H], strides of R and K, H) or None
    choice,  # (int64 [V] ids in the target's vocabulary or None, number of target ids, settings of primitives/adjust.py or None)
    tree,  # (tokens, parents, depths, first_child, next_sibling, ancestors [S, M], num_nodes [S], flags [R])
    law,  # (logits [S, M, V], strides of S and M) or None
    scratch,  # (lists int64 [R F, leaves, B], best int64 [R F, B], found int32 [R, M], record int32 [R, 3], and for iid of leaves
    # maxima fp32 and masses int64 [R F, leaves])
    ticket_ptr, finished_ptr, row_status_ptr,  # int32 [1], [1], [R M], zero before and after
    branching,  # children by depth, five to an int32
    level,  # depth of the nodes to be given children; None: all depths from the anchor on
    num_requests, num_slots, num_nodes, vocab, first_width, depths, items,
    METHOD: tl.constexpr, MIX: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr, LEAVES: tl.constexpr, KEEP: tl.constexpr,
    PAIRS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, DOT_TYPE: tl.constexpr, MIX_TYPE: tl.constexpr,
):  # fmt: skip
    item = take_item(ticket_ptr)
    chunks = tl.cdiv(vocab, LEAF)
    # The depth whose waves the item is in: its first item, nodes per request, and all nodes up to it, at most.
    depth = tl.zeros((), tl.int32)
    before = depth
    tiles = depth
    if MIX is not None:
        tiles += tl.cdiv(head[6], BLOCK_J)
        before += tl.cdiv(PARTS * head[6], BLOCK_N) * tl.cdiv(num_requests * depths, DOT_ROWS)  # products with hidden states
    hoisting = item < before
    width = depth + first_width
    total = width
    groups = tl.cdiv(num_requests * width, DOT_ROWS)
    while item >= before + groups * (tiles + chunks) + num_requests:
        before += groups * (tiles + chunks) + num_requests
        width = tl.minimum(width * _children_of(branching, depth), num_nodes - total)
        total += width
        depth += 1
        groups = tl.cdiv(num_requests * width, DOT_ROWS)
    wanted = _children_of(branching, depth)
    if MIX is not None:
        if hoisting:
            hidden_ptr, stride_hr, stride_hk, hidden_size = hidden
            hoist_rows(item, before, mixer, head, hidden_ptr, num_requests * depths, depths, hidden_size, stride_hr, stride_hk,
                       PARTS, BLOCK_N, BLOCK_S, MIX_TYPE)  # fmt: skip
        elif item < before + groups * tiles:
            wait_for(finished_ptr, before)
            _latents_item(item - before, depth, width, state, head, mixer, tree, scratch, num_requests, num_slots, num_nodes,
                          depths, MIX, WIDTH, BLOCK_J, BLOCK_S, MIX_TYPE)  # fmt: skip
    before += groups * tiles
    item -= before
    if item < 0:
        pass
    elif item < groups * chunks:
        chunk = item // groups
        tile = chunk
        if head is not None:
            # W2 depends on no node: it is on its way while earlier waves end.
            tile = w2_tile(head, chunk * LEAF + tl.arange(0, BLOCK_V), vocab, BLOCK_R)
        wait_for(finished_ptr, before)
        _rows_item(
            item % groups, chunk, depth, width, wanted, tile, base, state, head, mixer, choice, tree, law, scratch, row_status_ptr,
            level, num_requests, num_slots, num_nodes, vocab, chunks,
            METHOD, WIDEN, KEEP, PAIRS, WIDTH, BLOCK_V, BLOCK_R, DOT_TYPE,
        )  # fmt: skip
    else:
        wait_for(finished_ptr, before + groups * chunks)
        append(
            item - groups * chunks, depth, width, wanted, depth + 1 == depths, state, head, tree, law, scratch, row_status_ptr,
            level, num_requests, num_slots, num_nodes, vocab, chunks, METHOD, LEAVES, PAIRS, ROWS, WIDTH,
        )  # fmt: skip
    finish_item(ticket_ptr, finished_ptr, items)


_MIXERS = {None: (None, 0), "gated": (gated_rows, 1), "rnn": (rnn_rows, 3)}  # and parts of r outputs
_METHODS = {"top_k": TOP_K, "iid": IID, "without_replacement": WITHOUT_REPLACEMENT}
_WIDENINGS = {"by_cast": by_cast, "fp8_by_cast": fp8_by_cast, "fp8_by_bits": fp8_by_bits}


def words_of_branching(branching):
    """`branching` as the kernel takes it: five numbers below 64 to an int32."""
    per = DEPTHS_PER_WORD.value
    parts = [branching[i : i + per] for i in range(0, len(branching), per)]
    return tuple(sum(wanted << 6 * i for i, wanted in enumerate(part)) for part in parts)


def launch_draft_tree(items, args, *, method, mixer, widen, leaves, keep, width, block_r, dot_type, mix_type, config):
    """Launch one program per item of all waves. mixer: None, "gated" or "rnn"."""
    mix, parts = _MIXERS[mixer]
    draft_tree_kernel[(items,)](
        *args,
        items,
        METHOD=_METHODS[method],
        MIX=mix,
        PARTS=parts,
        WIDEN=_WIDENINGS[widen],
        LEAVES=leaves,
        KEEP=keep,
        PAIRS=config.pairs,
        ROWS=config.rows,
        WIDTH=width,
        BLOCK_V=config.block_v,
        BLOCK_R=block_r,
        BLOCK_J=config.block_j,
        BLOCK_N=config.block_n,
        BLOCK_S=config.block_s,
        DOT_TYPE=getattr(tl, dot_type),
        MIX_TYPE=getattr(tl, mix_type),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
        **({} if config.max_registers is None else {"maxnreg": config.max_registers}),
    )
