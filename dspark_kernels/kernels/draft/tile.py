"""What one tile of ids does to the requests of a dense draft block, on the whole vocabulary and on its shards.

key = logit / T - log E (greedy: the logit), the sums of exponentials of sub-blocks of 64 ids, and the best key so far. What does
not depend on the tile, a request's settings and the latents of the position, is loaded before the first one. Symbols: R requests,
K positions, V vocabulary of the head, S request slots. Reference: reference/draft.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..args import Pointer
from ..primitives.constants import DOT_ROWS, NEG_INF, NO_ID, SUB_BLOCK, SUMEXP_ONE
from ..primitives.exponential import log2_exponential_fast
from ..primitives.philox import COUPLED, lane_words, words_at
from ..primitives.race import pack
from ..primitives.slots import state_slots
from ..primitives.sumexp import below_max, fixed_sums, log2_scale
from .heads import low_rank_bias, one_dot_bias


class TileRequests(NamedTuple):
    """ROWS requests and how each samples one position; all zero where every row is greedy."""

    rows: Any  # int32 [ROWS], of the batch
    slots: Any  # int64 [ROWS], -1: a padding row
    temperature: Any  # fp32 [ROWS]
    scale: Any  # fp32 [ROWS], log2(e) / temperature
    seed: Any  # int64 [ROWS]
    position: Any  # uint32 [ROWS], the position that is decided, in the address of the noise
    anchor: Any  # uint32 [ROWS], the anchor's position there


class Latents(NamedTuple):
    """Latents of the C columns of a product with W2."""

    ptr: Pointer
    offsets: Any  # int64 [C], where each one starts
    known: Any  # int1 [C]: it has one; elsewhere the bias is 0


class Best(NamedTuple):
    """Of the ids that a program has seen, the best of each row in every column, [ROWS, columns]."""

    key: Any  # fp32
    id: Any  # int32
    seen: Any  # int32, bits


@triton.jit
def sweep_range(width, sweep, BLOCK_V: tl.constexpr):
    """(first id, step, number) of this program's tiles of `width` ids in a sweep: those at program_id + i * num_programs.

    Every other sweep goes backwards: it starts with the tiles of W2 that the last one ended with, which L2 still has.
    """
    first = tl.program_id(0) * BLOCK_V
    step = tl.num_programs(0) * BLOCK_V
    tiles = tl.cdiv(width - first, step)
    backwards = sweep % 2 == 1
    return tl.where(backwards, first + (tiles - 1) * step, first), tl.where(backwards, -step, step), tiles


@triton.jit
def tile_requests(first_request, state, num_requests, num_slots, draft, STREAM: tl.constexpr, ROWS: tl.constexpr):
    """TileRequests from first_request on. draft: number of the draft in its round, from 1."""
    rows = first_request + tl.arange(0, ROWS)
    slots = state_slots(state.slots_ptr, rows, num_requests, num_slots)
    temperature = tl.zeros([ROWS], tl.float32)
    seed = tl.zeros([ROWS], tl.int64)
    anchor = tl.zeros([ROWS], tl.int64)
    if state.temperature_ptr is not None:
        live = slots >= 0
        temperature = tl.load(state.temperature_ptr + slots, mask=live, other=0.0)
        seed = tl.load(state.seed_ptr + slots, mask=live, other=0)
        anchor = tl.load(state.positions_ptr + slots * state.stride_positions, mask=live, other=0).to(tl.int64)
    position = (anchor + draft).to(tl.uint32)
    if STREAM == COUPLED:
        anchor = tl.zeros([ROWS], tl.int64)
    return TileRequests(rows, slots, temperature, log2_scale(temperature), seed, position, anchor.to(tl.uint32))


@triton.jit
def dot_requests(first_request, state, num_requests, num_slots, ROWS: tl.constexpr):
    """(rows int32, slots int64) of the columns of a product with W2, DOT_ROWS at least: ROWS of them are the tile's requests, the
    others have no slot."""
    COLUMNS: tl.constexpr = max(ROWS, DOT_ROWS)
    columns = first_request + tl.arange(0, COLUMNS)
    return columns, state_slots(state.slots_ptr, columns, tl.minimum(num_requests, first_request + ROWS), num_slots)


@triton.jit
def tile_latents(head, projection, columns, slots, previous):
    """Where the latents of the columns of `dot_requests` are. previous int64 [C]: the tokens that the position follows."""
    if projection is None:
        known = (slots >= 0) & (previous >= 0) & (previous < head.vocab)
        latents = Latents(head.w1_ptr, previous * head.stride_w1, known)
    else:
        latents = Latents(projection.latent_ptr, columns.to(tl.int64) * head.rank, slots >= 0)
    return latents


@triton.jit
def tile_bias(w2, latents, loaded, head, columns, vocab, KIND: tl.constexpr, TILE: tl.constexpr):
    """fp32 [ROWS, BLOCK_V]. loaded: `all_latents` with ONE_DOT, else None. columns: of W2, `vocab` of them are there."""
    if TILE.ONE_DOT:
        bias = one_dot_bias(w2, loaded, head, columns, vocab, KIND)
    else:
        bias = low_rank_bias(w2, head, latents.ptr, latents.offsets, latents.known, columns, vocab, KIND, TILE.BLOCK_R)
    bias = tl.trans(bias)  # [C, BLOCK_V]
    if TILE.ROWS < DOT_ROWS:
        # Keep the first ROWS columns; the others are zero and adding zeros is exact.
        bias = tl.sum(tl.reshape(bias, [DOT_ROWS // TILE.ROWS, TILE.ROWS, TILE.BLOCK_V]), axis=0)
    if TILE.ROWS > DOT_ROWS:
        bias = _neighbours_together(bias, TILE.ROWS, TILE.BLOCK_V)
    return bias


@triton.jit
def _neighbours_together(x, ROWS: tl.constexpr, BLOCK_V: tl.constexpr):
    """x, taken apart and put together again."""
    a, b = tl.split(tl.reshape(x, [ROWS, BLOCK_V // 8, 4, 2]))
    a0, a1 = tl.split(tl.reshape(a, [ROWS, BLOCK_V // 8, 2, 2]))
    b0, b1 = tl.split(tl.reshape(b, [ROWS, BLOCK_V // 8, 2, 2]))
    a = tl.reshape(tl.join(a0, a1), [ROWS, BLOCK_V // 8, 4])
    b = tl.reshape(tl.join(b0, b1), [ROWS, BLOCK_V // 8, 4])
    return tl.reshape(tl.join(a, b), [ROWS, BLOCK_V])


@triton.jit
def noisy_keys(x, first_id, tokens, requests, MAPPED: tl.constexpr, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """Keys of logits x fp32 [ROWS, BLOCK_V] in units of log2. tokens: the tile's, from first_id on where no map
    makes them others."""
    # The condition never holds. Without it the keys of ten rounds are kept from tile to tile, in 20 registers.
    seed = tl.where(first_id < 0, 0, requests.seed)[:, None]
    position, anchor = requests.position[:, None], requests.anchor[:, None]
    if MAPPED:
        words = words_at(seed, tokens[None, :], position, anchor, OPTIONS.STREAM)
    else:
        words = lane_words(seed, first_id, position, anchor, OPTIONS.STREAM, TILE.ROWS, TILE.BLOCK_V)
    noisy = tl.fma(x, requests.scale[:, None], -log2_exponential_fast(words, OPTIONS.LOG2))
    return tl.where((requests.temperature > 0.0)[:, None], noisy, x)


@triton.jit
def store_sub_blocks(max_ptr, sumexp_ptr, x, first_row, scale, live, sub_block, num_sub_blocks, TILE: tl.constexpr):
    """Maxima and sums of exponentials of a tile. first_row int64 [ROWS]: where each request's sub-blocks start; sub_block: of the
    tile's first id."""
    ROWS: tl.constexpr = TILE.ROWS
    COUNT: tl.constexpr = TILE.BLOCK_V // SUB_BLOCK
    sub_blocks = tl.reshape(x, [ROWS, COUNT, SUB_BLOCK])
    top = tl.max(sub_blocks, axis=2)
    e = tl.exp2(below_max(sub_blocks, top[:, :, None]) * scale[:, None, None])
    sumexp = tl.reshape(fixed_sums(e, ROWS * COUNT, SUB_BLOCK, SUMEXP_ONE), [ROWS, COUNT])
    sub_block = sub_block + tl.arange(0, COUNT)
    where = first_row[:, None] + sub_block[None, :]
    keep = live[:, None] & (sub_block < num_sub_blocks)[None, :]
    tl.store(max_ptr + where, top, mask=keep)
    tl.store(sumexp_ptr + where, sumexp, mask=keep)


@triton.jit
def no_best(ROWS: tl.constexpr, BLOCK_V: tl.constexpr):
    """Best, before the first tile."""
    WIDTH: tl.constexpr = BLOCK_V // 8 if ROWS > DOT_ROWS else BLOCK_V
    key = tl.full([ROWS, WIDTH], NEG_INF, tl.float32)
    return Best(key, tl.full([ROWS, WIDTH], NO_ID, tl.int32), tl.zeros([ROWS, WIDTH], tl.int32))


@triton.jit
def best_with(best, key, ids, seen, ROWS: tl.constexpr, BLOCK_V: tl.constexpr):
    """Best after one more tile: keys fp32 and seen int32 [ROWS, BLOCK_V], ids int32 [BLOCK_V]."""
    ids = ids[None, :] + tl.zeros([ROWS, BLOCK_V], tl.int32)
    if ROWS > DOT_ROWS:
        # A thread has eight neighbouring ids of a row, of which it keeps one: registers for the latents of all requests.
        key, ids, seen = _best_of_pairs(key, ids, seen, ROWS, BLOCK_V)
        key, ids, seen = _best_of_pairs(key, ids, seen, ROWS, BLOCK_V // 2)
        key, ids, seen = _best_of_pairs(key, ids, seen, ROWS, BLOCK_V // 4)
    key, ids = better(key, ids, best.key, best.id)
    return Best(key, ids, best.seen | seen)


@triton.jit
def _best_of_pairs(key, ids, seen, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] -> [ROWS, WIDTH / 2], of neighbours the better one and what was seen of both."""
    left_key, right_key = _pairs(key, ROWS, WIDTH)
    left_id, right_id = _pairs(ids, ROWS, WIDTH)
    left_seen, right_seen = _pairs(seen, ROWS, WIDTH)
    key, ids = better(left_key, left_id, right_key, right_id)
    return key, ids, left_seen | right_seen


@triton.jit
def _pairs(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.split(tl.reshape(x, [ROWS, WIDTH // 2, 2]))


@triton.jit
def better(key, ids, best_key, best_id):
    """Of two entries the greater key, of equal keys the lower id. An entry that cannot win has key -inf and id NO_ID."""
    wins = (key > best_key) | ((key == best_key) & (ids < best_id))
    return tl.where(wins, key, best_key), tl.where(wins, ids, best_id)


@triton.jit
def winners(best):
    """int64 [ROWS]: the packed key of each row's best entry; NO_ID, token 0 below every key, where none can win."""
    return tl.max(tl.where(best.id == NO_ID, NO_ID, pack(best.key, best.id)), axis=1)
