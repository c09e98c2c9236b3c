"""What a request asks to be done to a logit before temperature: penalties, additive bias, bit mask, in this order, in fp32.

x = x / repetition (x > 0) or x * repetition, where the token is penalised or on the path; x -= frequency * n and, if n > 0,
x -= presence, n = its count + occurrences on the path; x += bias; -inf where the mask has a 0. Symbols: S request slots, T
penalised tokens of a slot, path = the drafts before a row. Reference: reference/sampling.py.
"""

import triton
import triton.language as tl

from .constants import NEG_INF, NO_ID

PENALISED_AT_ONCE = tl.constexpr(64)  # penalised tokens compared at once: with 128 the draft block spills registers on sm_120


@triton.jit
def no_path(j, path):
    """PATH of rows that have none."""
    return path


@triton.jit
def _penalised(x, repetition, presence, frequency, n):
    x = tl.where(x > 0.0, tl.div_rn(x, repetition + x * 0.0), x * repetition)
    x = x - frequency * n.to(tl.float32)
    return tl.where(n > 0, x - presence, x)


@triton.jit
def _of_slot(pointer, slots, neutral):
    """fp32 [ROWS, 1]: a setting of each row's slot, or what changes nothing."""
    if pointer is None:
        setting = tl.zeros_like(slots).to(tl.float32) + neutral
    else:
        setting = tl.load(pointer + slots, mask=slots >= 0, other=neutral)
    return setting[:, None]


@triton.jit
def _penalised_tokens(penalties, slots, first):
    """int32 [ROWS, PENALISED_AT_ONCE]: tokens first .. of each row's list, -1 where there is none."""
    entry = first + tl.arange(0, PENALISED_AT_ONCE)
    inside = (slots >= 0)[:, None] & (entry < penalties.num_tokens)[None, :]
    return tl.load(penalties.token_ids_ptr + slots[:, None] * penalties.stride_ids + entry[None, :], mask=inside, other=-1).to(
        tl.int32
    )


@triton.jit
def _occurrences(token, path, path_max, PATH: tl.constexpr):
    n = token * 0
    for j in range(path_max):
        n += tl.where((PATH(j, path).to(tl.int32) == token) & (token >= 0), 1, 0)
    return n


@triton.jit
def _with_penalties(x, ids, inside, slots, penalties, path, path_max, PATH: tl.constexpr):
    repetition = _of_slot(penalties.repetition_ptr, slots, 1.0)
    presence = _of_slot(penalties.presence_ptr, slots, 0.0)
    frequency = _of_slot(penalties.frequency_ptr, slots, 0.0)
    ids = ids.to(tl.int32)
    low = tl.min(tl.where(inside, ids, NO_ID), axis=1)
    high = tl.max(tl.where(inside, ids, -1), axis=1)
    # A token of the list is looked for in the tile only where it lies between the tile's ids: a few per tile.
    for first in range(0, penalties.num_tokens, PENALISED_AT_ONCE):
        token = _penalised_tokens(penalties, slots, first)
        hit = (token >= low[:, None]) & (token <= high[:, None]) & (token >= 0)
        if tl.max(tl.max(hit.to(tl.int32), axis=1), axis=0) > 0:
            entry = first + tl.arange(0, PENALISED_AT_ONCE)
            count = tl.load(penalties.counts_ptr + slots[:, None] * penalties.stride_counts + entry[None, :], mask=hit, other=0)
            left = tl.where(hit, token, NO_ID)
            current = tl.min(left, axis=1)
            while tl.min(current, axis=0) < NO_ID:
                here = left == current[:, None]
                n = tl.sum(tl.where(here & hit, count, 0), axis=1) + _occurrences(current, path, path_max, PATH)
                changed = _penalised(x, repetition, presence, frequency, n[:, None])
                x = tl.where((ids == current[:, None]) & inside, changed, x)
                left = tl.where(here, NO_ID, left)
                current = tl.min(left, axis=1)
    for j in range(path_max):
        token = PATH(j, path).to(tl.int32)
        near = (token >= low) & (token <= high) & (token >= 0)
        if tl.max(near.to(tl.int32), axis=0) > 0:
            known = tl.where(near, 0, 1)
            for i in range(j):
                known = known | tl.where(PATH(i, path).to(tl.int32) == token, 1, 0)
            for first in range(0, penalties.num_tokens, PENALISED_AT_ONCE):
                same = _penalised_tokens(penalties, slots, first) == token[:, None]
                known = known | tl.max(same.to(tl.int32), axis=1)
            n = _occurrences(token, path, path_max, PATH)
            changed = _penalised(x, repetition, presence, frequency, n[:, None])
            x = tl.where((ids == token[:, None]) & inside & (known == 0)[:, None], changed, x)
    return x


@triton.jit
def adjusted(x, ids, inside, slots, mask_rows, settings, path, path_max, PATH: tl.constexpr):
    """fp32 logits x [ROWS, WIDTH] of token ids [ROWS, WIDTH] after everything that comes before temperature.

    inside: which of them exist. slots: int64 [ROWS], -1 = a row of nobody. mask_rows: int64 [ROWS], row of the bit mask.
    settings: Adjustments (kernels/args.py). PATH(j, path): int64 [ROWS], the path's token j, -1 where a row's path is shorter,
    j < path_max. NaN stays NaN.
    """
    ids = ids + tl.zeros_like(x).to(tl.int32)
    if settings.penalties is not None:
        x = _with_penalties(x, ids, inside, slots, settings.penalties, path, path_max, PATH)
    if settings.bias is not None:
        live = inside & (slots >= 0)[:, None]
        x += tl.load(settings.bias.ptr + slots[:, None] * settings.bias.stride + ids, mask=live, other=0.0).to(tl.float32)
    if settings.mask is not None:
        live = inside & (slots >= 0)[:, None]
        words = tl.load(settings.mask.ptr + mask_rows[:, None] * settings.mask.stride + (ids >> 5), mask=live, other=-1)
        x = tl.where(((words >> (ids & 31).to(tl.int32)) & 1) == 0, NEG_INF, x)
    return x
