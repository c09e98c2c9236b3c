"""Draft trees of a static shape, all depths in one launch: the rows of a depth's nodes, then their children, depth by depth.

    top_k                the best logits of a row
    without_replacement  the best keys logit / T - ln E of one race per row
    iid                  draws in two races: block by its sum of exponentials, then id inside it (kernels/draft_tree/append.py)

Symbols: R requests, S request slots, M nodes, V vocabulary, block = 1024 ids, F nodes of a depth at most, B children of each.
Reference: reference/tree_draft.py. Sources: EAGLE arXiv 2401.15077, SpecInfer arXiv 2305.09781, Sequoia arXiv 2402.12374.

Every depth is up to three phases (primitives/phases.py): latents of a gated or rnn head for its nodes; rows, an item = 16 (request,
node) pairs of the batch x a block of ids, so that W2 is read once for 16 nodes, whoever they belong to; children, an item =
a request. An item of rows blocks the B best words of its block for each row, sorted, and what is needed of a distribution.
"""

import triton
import triton.language as tl

from ..draft.heads import WIDENINGS, HeadKind, gated_rows, low_rank_bias, project_hidden_rows, rnn_rows, w2_tile
from ..primitives.adjust import adjusted, no_path
from ..primitives.constants import DOT_ROWS, NAN, NEG_INF, POS_INF, VOCAB_BLOCK
from ..primitives.options import options_of
from ..primitives.philox import DRAFT, lane_words, log2_exponential, words_at
from ..primitives.race import pack
from ..primitives.slots import state_slots
from ..primitives.sumexp import log2_scale, numbers
from ..primitives.sync import finish_item, take_item, wait_for
from ..primitives.vocab_blocks import block_sums
from .append import HAS_FINITE, IID, TOP_K, WITHOUT_REPLACEMENT, append, frontier
from .args import DepthStep, TreeSizes, TreeTile

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
    anchor = tl.load(state.anchors_ptr + slots * state.stride_anchors, mask=live & (node == 0), other=-1).to(tl.int64)
    token = tl.load(tree.tokens_ptr + slots * num_nodes + node, mask=live & (node > 0), other=-1, volatile=True)
    return tl.where(node == 0, anchor, token)


@triton.jit
def _latents_item(item, step, state, head, projection, tree, scratch, sizes, depths, KIND: tl.constexpr, TILE: tl.constexpr):
    """BLOCK_J latents of 16 rows; a node's state goes on from its parent's."""
    rank, width, num_nodes = head.rank, step.width, sizes.num_nodes
    BLOCK_J: tl.constexpr = TILE.BLOCK_J
    tiles = tl.cdiv(rank, BLOCK_J)
    j = item % tiles * BLOCK_J + tl.arange(0, BLOCK_J)
    columns = item // tiles * DOT_ROWS + tl.arange(0, DOT_ROWS)
    requests = columns // width
    slots = state_slots(state.slots_ptr, requests, sizes.num_requests, sizes.num_slots)
    start, count, _, _ = frontier(requests, slots, step, state, tree, scratch, num_nodes, TILE.WIDTH)
    live = columns % width < count
    if tl.max(tl.where(live, 1, 0), axis=0) > 0:
        node = tl.where(live, start + columns % width, 0).to(tl.int64)
        previous = _tokens_of(slots, node, live, state, tree, num_nodes)
        known = live & (previous >= 0) & (previous < head.vocab)
        parent = tl.load(tree.parents_ptr + slots * num_nodes + node, mask=live & (node > 0), other=-1, volatile=True)
        own = requests.to(tl.int64) * num_nodes
        state_row = tl.where(parent >= 0, own + parent, -1)
        row = requests.to(tl.int64) * depths + step.depth
        latent = KIND.latent(
            projection, head, j, live, previous, known, row, state_row, own + node, TILE.BLOCK_S, KIND.mix_type
        )  # fmt: skip
        at = projection.latent_ptr + columns.to(tl.int64)[None, :] * rank + j[:, None]
        tl.store(at, latent.to(projection.latent_ptr.dtype.element_ty), mask=(j < rank)[:, None] & live[None, :])


@triton.jit
def _weigh_block(group, chunk, step, state, tree, distributions, scratch, sizes, PAIRS: tl.constexpr, WIDTH: tl.constexpr):
    """Maximum and sum of exponentials of a block of the 16 distributions whose logits this program has just stored."""
    width = step.width
    ids = chunk * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
    for first in range(0, DOT_ROWS, PAIRS):
        columns = group * DOT_ROWS + first + tl.arange(0, PAIRS)
        requests = columns // width
        slots = state_slots(state.slots_ptr, requests, sizes.num_requests, sizes.num_slots)
        start, count, _, _ = frontier(requests, slots, step, state, tree, scratch, sizes.num_nodes, WIDTH)
        live = columns % width < count
        row_ptrs = distributions.ptr + slots * distributions.stride_slot
        row_ptrs = row_ptrs + (start + columns % width).to(tl.int64) * distributions.stride_node
        inside = live[:, None] & (ids < sizes.vocab)[None, :]
        x = tl.load(row_ptrs[:, None] + ids[None, :], mask=inside, other=NEG_INF, volatile=True).to(tl.float32)
        scale = log2_scale(tl.load(state.temperature_ptr + slots, mask=live, other=0.0))
        block_max, sumexp = block_sums(x, scale[:, None], PAIRS)
        row = columns.to(tl.int64) * sizes.chunks + chunk
        tl.store(scratch.block_max_ptr + row, block_max, mask=live)
        tl.store(scratch.block_sumexp_ptr + row, sumexp, mask=live)


@triton.jit
def _rows_item(
    group, chunk, step, tile, base, state, head, projection, settings, tree, distributions, scratch, row_status_ptr, sizes,
    KIND: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One block of ids of 16 rows. tile: of W2, for the first ids."""
    METHOD: tl.constexpr = TILE.METHOD
    width, wanted, num_nodes, vocab = step.width, step.wanted, sizes.num_nodes, sizes.vocab
    KEEP: tl.constexpr = TILE.KEEP
    BLOCK_V: tl.constexpr = TILE.BLOCK_V
    columns = group * DOT_ROWS + tl.arange(0, DOT_ROWS)
    requests = columns // width
    f = columns % width
    slots = state_slots(state.slots_ptr, requests, sizes.num_requests, sizes.num_slots)
    start, count, at_depth, _ = frontier(requests, slots, step, state, tree, scratch, num_nodes, TILE.WIDTH)
    live = f < count
    node = tl.where(live, start + f, 0).to(tl.int64)
    if tl.max(tl.where(live, 1, 0), axis=0) > 0:
        offsets = requests.to(tl.int64) * base.stride_request
        if step.level is None:
            offsets += tl.cast(step.depth, tl.int64) * base.stride_position
        else:
            offsets += f.to(tl.int64) * base.stride_position
        known = live
        if head is not None:
            if projection is None:
                token = _tokens_of(slots, node, live, state, tree, num_nodes)
                known = live & (token >= 0) & (token < head.vocab)
                latent_ptr = head.w1_ptr
                latents = token * head.stride_w1
            else:
                latent_ptr = projection.latent_ptr
                latents = columns.to(tl.int64) * head.rank
        scale = tl.full([DOT_ROWS], 1.4426950408889634, tl.float32)
        sampled = live & (slots < 0)
        if METHOD != TOP_K:
            temperature = tl.load(state.temperature_ptr + slots, mask=live, other=0.0)
            sampled = temperature > 0.0
            scale = log2_scale(temperature)
        if METHOD == WITHOUT_REPLACEMENT:
            seed = tl.load(state.seed_ptr + slots, mask=live, other=0)
            anchor = tl.load(state.positions_ptr + slots * state.stride_positions, mask=live, other=0).to(tl.int64)
            position = anchor + at_depth + 1
        # Words of entries that no id has taken yet differ, so that one is replaced at a time; those beyond `wanted` stay.
        entry = tl.arange(0, KEEP)[None, :] + tl.zeros([DOT_ROWS, 1], tl.int64)
        running = tl.where(entry < wanted, entry, NO_ENTRY)
        seen = tl.zeros([DOT_ROWS], tl.int32)
        first_id = chunk * VOCAB_BLOCK
        last_id = tl.minimum(first_id + VOCAB_BLOCK, vocab)
        for first in range(first_id, last_id, BLOCK_V):
            ids = first + tl.arange(0, BLOCK_V)
            inside = live[:, None] & (ids < last_id)[None, :]
            x = tl.load(base.ptr + offsets[:, None] + ids[None, :], mask=inside, other=0.0).to(tl.float32)
            if head is not None:
                x += tl.trans(low_rank_bias(tile, head, latent_ptr, latents, known, ids, vocab, KIND, TILE.BLOCK_R))
                tile = w2_tile(head, ids + BLOCK_V, last_id, TILE.BLOCK_R)  # on its way while this one is looked at
            targets = ids  # in the target's vocabulary
            if settings.map_ptr is not None:
                mapped = tl.load(settings.map_ptr + ids, mask=ids < last_id, other=-1)
                used = (mapped >= 0) & (mapped < settings.num_targets)
                targets = tl.where(used, mapped, 0).to(tl.int32)
            if settings.adjust is not None:
                x = adjusted(x, targets[None, :], inside, slots, slots, settings.adjust, targets, 0, no_path)
            if settings.map_ptr is not None:
                x = tl.where(used[None, :], x, NEG_INF)
            nan = inside & (x != x)
            finite = inside & (tl.abs(x) < POS_INF)
            x = numbers(x)
            if distributions is not None:
                stored = x.to(base.ptr.dtype.element_ty)  # rounded once; everything below reads the rounded value
                row_offsets = slots * distributions.stride_slot + node * distributions.stride_node
                tl.store(distributions.ptr + row_offsets[:, None] + ids[None, :], stored, mask=inside)
                x = stored.to(tl.float32)
            seen |= tl.max(tl.where(nan, NAN, 0), axis=1) | tl.max(tl.where(finite, HAS_FINITE, 0), axis=1)
            key = x
            if METHOD == WITHOUT_REPLACEMENT:
                slot_of_node = node.to(tl.int32)[:, None]
                if settings.map_ptr is None:
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
        rows = columns.to(tl.int64) * sizes.chunks + chunk
        _store_best(scratch.lists_ptr, rows, live, running, wanted, KEEP)
        tl.atomic_or(row_status_ptr + columns, seen, mask=live & (seen > 0), sem="relaxed")
        if METHOD == IID:
            if tl.max(tl.where(sampled, 1, 0), axis=0) > 0:
                tl.debug_barrier()
                _weigh_block(group, chunk, step, state, tree, distributions, scratch, sizes, TILE.PAIRS, TILE.WIDTH)


@triton.jit(do_not_specialize=["branching", "level", "num_requests", "num_slots", "num_nodes", "depths", "items"])
def draft_tree_kernel(
    # Records of kernels/draft_tree/args.py and kernels/draft/args.py.
    base,  # BaseLogits [R, K, V], or [R, F, V] of the nodes of `level`
    state,  # TreeState
    head,  # Head or None
    projection,  # Projection of a gated or rnn head, with latents [R F, r] and states [R M, r], or None
    hidden,  # Hidden or None
    settings,  # NodeSettings
    tree,  # StaticTree
    distributions,  # NodeLogits or None
    scratch,  # StaticScratch
    counters,  # StaticCounters
    branching,  # children by depth, five to an int32
    level,  # depth of the nodes to be given children; None: all depths from the anchor on
    num_requests, num_slots, num_nodes,
    widths,  # TreeWidths
    depths, items,
    KIND: tl.constexpr,  # HeadKind
    TILE: tl.constexpr,  # TreeTile
):  # fmt: skip
    vocab = widths.vocab
    item = take_item(counters.ticket_ptr)
    chunks = tl.cdiv(vocab, VOCAB_BLOCK)
    # The depth whose phases the item is in: its first item, nodes per request, and all nodes up to it, at most.
    depth = tl.zeros((), tl.int32)
    before = depth
    tiles = depth
    if KIND.latent is not None:
        tiles += tl.cdiv(head.rank, TILE.BLOCK_J)
        # Products with hidden states.
        before += tl.cdiv(KIND.parts * head.rank, TILE.BLOCK_N) * tl.cdiv(num_requests * depths, DOT_ROWS)
    precomputing = item < before
    width = depth + widths.first
    total = width
    groups = tl.cdiv(num_requests * width, DOT_ROWS)
    while item >= before + groups * (tiles + chunks) + num_requests:
        before += groups * (tiles + chunks) + num_requests
        width = tl.minimum(width * _children_of(branching, depth), num_nodes - total)
        total += width
        depth += 1
        groups = tl.cdiv(num_requests * width, DOT_ROWS)
    step = DepthStep(depth, width, _children_of(branching, depth), level)
    sizes = TreeSizes(num_requests, num_slots, num_nodes, vocab, chunks)
    if KIND.latent is not None:
        if precomputing:
            project_hidden_rows(
                item, before, projection, head, hidden, num_requests * depths, depths, KIND, TILE.BLOCK_N, TILE.BLOCK_S
            )
        elif item < before + groups * tiles:
            if before > 0:
                wait_for(counters.finished_ptr, before)
            _latents_item(item - before, step, state, head, projection, tree, scratch, sizes, depths, KIND, TILE)
    before += groups * tiles
    item -= before
    if item < 0:
        pass
    elif item < groups * chunks:
        chunk = item // groups
        tile = chunk
        if head is not None:
            # W2 depends on no node: it is on its way while earlier phases end.
            tile = w2_tile(head, chunk * VOCAB_BLOCK + tl.arange(0, TILE.BLOCK_V), vocab, TILE.BLOCK_R)
        if before > 0:
            wait_for(counters.finished_ptr, before)
        _rows_item(
            item % groups, chunk, step, tile, base, state, head, projection, settings, tree, distributions, scratch,
            counters.row_status_ptr, sizes, KIND, TILE,
        )  # fmt: skip
    else:
        wait_for(counters.finished_ptr, before + groups * chunks)
        append(
            item - groups * chunks, step, depth + 1 == depths, state, head, tree, distributions, scratch,
            counters.row_status_ptr, sizes, TILE,
        )  # fmt: skip
    finish_item(counters.ticket_ptr, counters.finished_ptr, items)


_LATENTS = {None: (None, 0), "gated": (gated_rows, 1), "rnn": (rnn_rows, 3)}  # and parts of r outputs
_METHODS = {"top_k": TOP_K, "iid": IID, "without_replacement": WITHOUT_REPLACEMENT}


def words_of_branching(branching):
    """`branching` as the kernel takes it: five numbers below 64 to an int32."""
    per = DEPTHS_PER_WORD.value
    parts = [branching[i : i + per] for i in range(0, len(branching), per)]
    return tuple(sum(wanted << 6 * i for i, wanted in enumerate(part)) for part in parts)


def launch_draft_tree(items, args, *, method, projection, widen, blocks, keep, width, block_r, dot_type, mix_type, config):
    """Launch one program per item of all phases. projection: None, "gated" or "rnn"."""
    latent, parts = _LATENTS[projection]
    draft_tree_kernel[(items,)](
        *args,
        items,
        KIND=HeadKind(
            latent=latent,
            parts=parts,
            widen=WIDENINGS[widen],
            dot_type=getattr(tl, dot_type),
            mix_type=getattr(tl, mix_type),
        ),
        TILE=TreeTile(
            METHOD=_METHODS[method],
            BLOCKS=blocks,
            KEEP=keep,
            PAIRS=config.pairs,
            ROWS=config.rows,
            WIDTH=width,
            BLOCK_V=config.block_v,
            BLOCK_R=block_r,
            BLOCK_J=config.block_j,
            BLOCK_N=config.block_n,
            BLOCK_S=config.block_s,
        ),
        **options_of(config),
    )
