"""Filters of a draft position: the support that top-k, top-p and min-p leave of the stored row, its distribution, its winner.

kept <=> key > threshold, or key = threshold and id <= cut (primitives/filters.py), tested on the logits as stored; x_k = argmax
over kept v of logits_k(v) / T - ln E_k(v), with the noise of the whole row; lse_k = ln sum over kept of exp(logit / T). After the
vocabulary phase request r belongs to one program. The winner of the whole row is that of the support wherever it is kept, so
noise is drawn again only where it is not. A phase later each program writes -inf over what is not kept of its own tiles. Symbols:
R requests, K positions, V vocabulary of the head, U sub-blocks of 64 ids. Reference: reference/draft.py, reference/sampling.py.
"""

import triton
import triton.language as tl

from ..primitives.constants import FILTER_LIST, MAX_GROUP, NEG_INF, NO_ID, POS_INF, SUB_BLOCK, SUMEXP_ONE
from ..primitives.exponential import log2_exponential_fast
from ..primitives.filters import EVERYTHING, filter_is_on, filter_row, kept
from ..primitives.philox import COUPLED, words_at
from ..primitives.race import pack, unpack_id
from ..primitives.slots import state_slots
from ..primitives.sumexp import below_max, fixed_sums, log2_scale
from .rows import log_sum_exp, row_sumexp

# support: Support (kernels/draft/args.py), with G groups of GROUP ids.
TILE = tl.constexpr(8)  # groups of a block of filter_row: BLOCK // GROUP


@triton.jit
def _stored(ids, inside, row_ptr):
    """LOAD of filter_row."""
    return tl.load(row_ptr + ids, mask=inside, other=NEG_INF).to(tl.float32)


@triton.jit
def _setting(pointer, slot, off):
    if pointer is None:
        setting = off
    else:
        setting = tl.load(pointer + slot)
    return setting


@triton.jit
def _group_maxima(sub_block_max_ptr, maxima_ptr, num_sub_blocks):
    for first in range(0, num_sub_blocks, 2 * FILTER_LIST):
        sub_block = first + 2 * tl.arange(0, FILTER_LIST)
        left = tl.load(sub_block_max_ptr + sub_block, mask=sub_block < num_sub_blocks, other=NEG_INF, volatile=True)
        right = tl.load(sub_block_max_ptr + sub_block + 1, mask=sub_block + 1 < num_sub_blocks, other=NEG_INF, volatile=True)
        tl.store(maxima_ptr + sub_block // 2, tl.maximum(left, right), mask=sub_block < num_sub_blocks)
    tl.debug_barrier()


@triton.jit
def _reached(b, row_ptr, groups_ptr, num_reached, map_ptr, num_targets, vocab, threshold, cut):
    """Block b of the groups that can hold kept ids: which those are, and [BLOCK] logits, tokens, and which are kept."""
    which = b * TILE + tl.arange(0, TILE)
    groups = tl.load(groups_ptr + which, mask=which < num_reached, other=0)
    ids = tl.reshape(groups[:, None] * MAX_GROUP + tl.arange(0, MAX_GROUP)[None, :], [FILTER_LIST])
    valid = tl.reshape((which < num_reached)[:, None] & (tl.arange(0, MAX_GROUP) >= 0)[None, :], [FILTER_LIST]) & (ids < vocab)
    x = _stored(ids, valid, row_ptr)
    tokens = ids
    if map_ptr is not None:
        mapped = tl.load(map_ptr + ids, mask=valid, other=-1)
        tokens = tl.where((mapped >= 0) & (mapped < num_targets), mapped, 0).to(tl.int32)
    return groups, which < num_reached, x, tokens, valid & kept(x, ids, threshold, cut)


@triton.jit
def filter_rows(k, state, map_ptr, support, out, scratch, sizes, OPTIONS: tl.constexpr):
    """Support, distribution and winner of position k."""
    num_requests, vocab, column = sizes.num_requests, sizes.vocab, sizes.column
    num_sub_blocks, num_groups = tl.cdiv(vocab, SUB_BLOCK), tl.cdiv(vocab, MAX_GROUP)
    for request in tl.range(tl.program_id(0), num_requests, tl.num_programs(0), disable_licm=True):
        slot = tl.max(state_slots(state.slots_ptr, request + tl.arange(0, 1), num_requests, sizes.num_slots), axis=0)
        if slot >= 0:
            temperature = tl.load(state.temperature_ptr + slot)
            scale = log2_scale(temperature)
            row = tl.cast(request, tl.int64) * sizes.num_drafts + k
            top, total = row_sumexp(
                scratch.sub_block_max_ptr, scratch.sub_block_sumexp_ptr, row, num_sub_blocks, scale, FILTER_LIST
            )
            off = tl.zeros((), tl.float32)
            top_k = _setting(support.top_k_ptr, slot, off.to(tl.int32))
            top_p = _setting(support.top_p_ptr, slot, off + 1.0)
            min_p = _setting(support.min_p_ptr, slot, off)
            threshold = tl.zeros((), tl.int64) + EVERYTHING
            cut = tl.full((), -1, tl.int32)
            finite = (top > NEG_INF) & (top < POS_INF)
            if filter_is_on(top_k, top_p, min_p, vocab) & (temperature > 0.0) & finite:
                row_ptr = out.logits_ptr + slot * out.stride_logits
                row_ptr += tl.cast(column + k, tl.int64) * out.stride_logits_position
                own_groups_ptr = support.groups_ptr + tl.cast(request, tl.int64) * num_groups
                own_max_ptr = support.maxima_ptr + tl.cast(request, tl.int64) * num_groups
                _group_maxima(scratch.sub_block_max_ptr + row * num_sub_blocks, own_max_ptr, num_sub_blocks)
                threshold, cut, reached = filter_row(
                    _stored, row_ptr, vocab, own_max_ptr, num_groups, own_groups_ptr, support.keys_ptr + request * FILTER_LIST,
                    support.ids_ptr + request * FILTER_LIST, top, total, scale, top_k,
                    top_p, min_p, OPTIONS.JOINT, MAX_GROUP, OPTIONS.GROUPS,
                )  # fmt: skip
                word = tl.load(scratch.best_ptr + k * num_requests + request, volatile=True)
                winner = unpack_id(word)
                total = tl.zeros((), tl.int64)
                there = tl.zeros((), tl.int32)
                for b in range(tl.cdiv(reached, TILE)):
                    groups, used, x, tokens, keep = _reached(
                        b, row_ptr, own_groups_ptr, reached, map_ptr, sizes.num_targets, vocab, threshold, cut
                    )
                    group_top = tl.load(own_max_ptr + groups, mask=used, other=NEG_INF, volatile=True)
                    e = tl.exp2(below_max(tl.reshape(x, [TILE, MAX_GROUP]), group_top[:, None]) * scale)
                    e = tl.where(tl.reshape(keep, [TILE, MAX_GROUP]), e, 0.0)
                    sumexp = fixed_sums(e, TILE, MAX_GROUP, SUMEXP_ONE).to(tl.float32)
                    total += tl.sum((sumexp * tl.exp2(below_max(group_top, top) * scale)).to(tl.int64), axis=0)
                    there += tl.max(tl.where(keep & (tokens == winner), 1, 0), axis=0)
                if there == 0:
                    anchor = tl.load(state.positions_ptr + slot * state.stride_positions).to(tl.int64)
                    position = anchor + (sizes.first_draft + k + 1)
                    if OPTIONS.STREAM == COUPLED:
                        anchor = anchor * 0
                    seed = tl.load(state.seed_ptr + slot)
                    zeros = tl.zeros([FILTER_LIST], tl.int64)
                    word = tl.full((), NO_ID, tl.int64)
                    for b in range(tl.cdiv(reached, TILE)):
                        groups, used, x, tokens, keep = _reached(
                            b, row_ptr, own_groups_ptr, reached, map_ptr, sizes.num_targets, vocab, threshold, cut
                        )
                        words = words_at(zeros + seed, tokens, zeros + position, zeros + anchor, OPTIONS.STREAM)
                        key = tl.fma(x, scale, -log2_exponential_fast(words, OPTIONS.LOG2))
                        word = tl.maximum(word, tl.max(tl.where(keep, pack(key, tokens), NO_ID), axis=0))
                    tl.store(scratch.best_ptr + k * num_requests + request, word)
            tl.store(support.threshold_ptr + request, threshold)
            tl.store(support.cut_ptr + request, cut)
            if out.lse_ptr is not None:
                tl.store(out.lse_ptr + slot * out.stride_lse + column + k, log_sum_exp(top, total, scale))


@triton.jit
def mask_rows(k, state, support, out, sizes, TILE: tl.constexpr):
    """-inf over what position k's support blocks out, in this program's tiles."""
    num_requests, vocab = sizes.num_requests, sizes.vocab
    BLOCK_V: tl.constexpr = TILE.BLOCK_V
    for first_id in range(tl.program_id(0) * BLOCK_V, vocab, tl.num_programs(0) * BLOCK_V):
        ids = first_id + tl.arange(0, BLOCK_V)
        for first_request in range(0, num_requests, TILE.ROWS):
            requests = first_request + tl.arange(0, TILE.ROWS)
            slots = state_slots(state.slots_ptr, requests, num_requests, sizes.num_slots)
            threshold = tl.load(support.threshold_ptr + requests, mask=slots >= 0, other=EVERYTHING, volatile=True)
            cut = tl.load(support.cut_ptr + requests, mask=slots >= 0, other=-1, volatile=True)
            inside = ((slots >= 0) & (threshold != EVERYTHING))[:, None] & (ids < vocab)[None, :]
            at = out.logits_ptr + slots[:, None] * out.stride_logits
            at = at + tl.cast(sizes.column + k, tl.int64) * out.stride_logits_position + ids[None, :]
            x = tl.load(at, mask=inside, other=NEG_INF).to(tl.float32)
            keep = kept(x, ids[None, :], threshold[:, None], cut[:, None])
            nothing = tl.full(x.shape, NEG_INF, tl.float32).to(out.logits_ptr.dtype.element_ty)
            tl.store(at, nothing, mask=inside & (keep == 0))
