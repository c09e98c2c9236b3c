"""Lossless acceptance of a chain on vocabulary shards: each phase one launch on every rank, with a gather between them.

normalise  a rank's part of every row (shards_rows.py)
residual   dense proposals: every rank judges from the gathered parts (shards_verify.py), and sums [kept * target - draft]+ of
           its ids in the rows that need it
draw       every rank judges, races the leaves, and those with ids in the winning leaf race inside it
finish     the best word of all ranks is the token

Where the draft's law is one-hot or a list, the residual needs no phase of its own: leaf masses without the listed ids come with the
parts, and a listed id adds [kept * target - draft]+ to its leaf, from its gathered logit. Symbols: R requests, K drafts, C
candidates, L logit rows, W ids of a shard, N ranks, NL leaves of 1024 ids that a shard can touch. Rules: rules.py. Oracle:
reference/accept.py on whole rows.
"""

import triton
import triton.language as tl

from ..primitives.fence import stores_done
from ..primitives.mass import LEAF, NEG_INF, ONE, below_max, log2_scale, masses, numbers
from ..primitives.philox import CORRECT, LEAF as LEAF_STREAM, lane_words, log2_exponential
from ..primitives.race import pack, unpack_id
from .outputs import emit, emit_nothing
from .proposals import RESIDUAL_ONE, distinct, list_end, read_record
from .rows import FIRST, IDS, NONFINITE_ROW, SOFTMAX, STATUS, soft_prob
from .rules import choose_block, judge_block, judge_match, judge_token
from .shards_rows import accept_normalise_kernel, is_here, request_of, temperatures_of
from .shards_verify import judge, merged_leaves, own_records
from .target import read_row


@triton.jit
def _residual(x, draft_row, ids, inside, start, record, scale, draft_scale):
    """[kept * target_prob - draft_prob]+ of ids with target logits x, 0 outside; draft_row None: a one-hot law."""
    target_law, draft_law, kept = record
    target_of, row_top, inverse = target_law
    target_prob = soft_prob(x, ids, target_of, row_top, inverse, scale)
    draft_of, reference, factor = draft_law
    y = tl.full(ids.shape, float("-inf"), tl.float32)
    if draft_row is not None:
        y = numbers(tl.load(draft_row + ids - start, mask=inside, other=NEG_INF).to(tl.float32))
    draft_prob = soft_prob(y, ids, draft_of, reference, factor, draft_scale)
    return tl.where(inside, tl.maximum(kept * target_prob - draft_prob, 0.0), 0.0)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "start", "held", "first_leaf"])
def accept_residual_kernel(
    target,  # ([L, W], its row stride, settings of primitives/adjust.py or None)
    layout,  # None, cu_logits [R+1], logits_indices [L], token_ids, positions [N_max]
    gathered,  # regions of the first phase of all ranks [N, L, ...], see shards_verify.py, and their stride
    dense,  # draft logits [S, K, W], lse [S, K] or None, their strides
    draft_temperature_ptr, temperature_ptr, seed_ptr, slots_ptr,  # [S] or None, [S], [S], [R] or None
    residual_ptr,  # int64 of the part: [R, NL], where every row may be needed [L, NL]
    row_values_ptr, row_ids_ptr,  # [programs, WIDTH, ...]
    num_requests, num_slots, num_rows, num_drafts, shards, start, held, first_leaf, num_leaves, vocab,
    JUDGE: tl.constexpr, EVERY_ROW: tl.constexpr,
    WIDTH: tl.constexpr, SHARDS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Item = leaves of a request. Each item judges for itself, from L2: dearer in loads than in waiting for one that does."""
    chunks = tl.cdiv(num_leaves, CHUNK)
    request = tl.program_id(0) // chunks
    item = tl.program_id(0) % chunks
    slot, row0, length = request_of(request, slots_ptr, layout[1], num_requests, num_slots, num_rows, num_drafts)
    if length >= 0:
        draft_ptr, _lse, stride_ds, stride_dk, _columns = dense
        row_values_ptr, row_ids_ptr = own_records(row_values_ptr, row_ids_ptr, row0, WIDTH)
        temperature, draft_temperature = temperatures_of(temperature_ptr, draft_temperature_ptr, slot, length)
        scale, draft_scale = log2_scale(temperature), log2_scale(draft_temperature)
        accepted, wants, _anchor = judge(
            slot, row0, length, temperature, draft_temperature, gathered, dense, layout, seed_ptr, row_values_ptr, row_ids_ptr,
            shards, num_leaves, vocab, JUDGE, WIDTH, SHARDS, BLOCK,
        )  # fmt: skip
        # The view of target.py on this rank's columns: ids are global, and the rank's alone may be read.
        view = (target[0] - start, target[1], vocab, target[2], (layout[3], None), layout[2], row0, slot, length, None)
        leaf = item * CHUNK + tl.arange(0, CHUNK)
        ids = (first_leaf + item * CHUNK) * LEAF + tl.arange(0, CHUNK * LEAF)
        inside = is_here(ids, start, held)
        begin = accepted
        end = tl.where(wants, accepted + 1, accepted)
        if EVERY_ROW:
            begin = accepted * 0
            end = tl.where(wants, accepted, 0)
        for judged in range(begin, end):
            row = (row0 + judged).to(tl.int64)
            record = read_record(row_values_ptr, row_ids_ptr, row)
            draft_row = draft_ptr + slot * stride_ds + tl.cast(judged, tl.int64) * stride_dk
            x = read_row(view, judged, ids, inside)
            mass = masses(_residual(x, draft_row, ids, inside, start, record, scale, draft_scale), CHUNK, LEAF, RESIDUAL_ONE)
            at = request.to(tl.int64)
            if EVERY_ROW:
                at = row
            tl.store(residual_ptr + at * num_leaves + leaf, mass, mask=leaf < num_leaves)


# --- residual masses of every leaf of a row -------------------------------------------------------------------------


@triton.jit
def _unlisted(mass, tops, target_law, point, kept, scale, LEAVES: tl.constexpr):
    """kept * target_prob of leaves whose masses are without the listed ids; point: whether a point mass is not listed."""
    target_of, reference, inverse = target_law
    unlisted = mass.to(tl.float32) * tl.exp2(below_max(tops, reference) * scale) * (inverse * (1.0 / ONE))
    if target_of != SOFTMAX:
        unlisted = tl.where(tl.arange(0, LEAVES) == tl.where(point, target_of // LEAF, -1), 1.0, 0.0)
    return (kept * unlisted * RESIDUAL_ONE).to(tl.int64)


@triton.jit
def _without_draft(gathered, row, record, cut, shards, vocab, scale, LEAVES: tl.constexpr, SHARDS: tl.constexpr):
    """Of a row whose draft's law is one-hot: the target's, less the draft's octet without it."""
    row_words_ptr, _, memory, _, _, stride_part = gathered
    target_law, draft_law, kept = record
    draft_of, _, _ = draft_law
    shard = tl.arange(0, SHARDS).to(tl.int64)
    removed = tl.load(row_words_ptr + shard * stride_part + row * 4 + 2, mask=shard < shards, other=0)
    listed = tl.where(draft_of < vocab, draft_of, -1)
    tops, mass = merged_leaves(memory, stride_part, row, cut, vocab, scale, listed, tl.max(removed, axis=0), LEAVES)
    return _unlisted(mass, tops, target_law, listed != target_law[0], kept, scale, LEAVES)


@triton.jit
def _listed_residuals(begin, law, slot, i, row, gathered, record, cut, vocab, scale, draft_scale, ENTRIES: tl.constexpr):
    """Entries begin, begin + 1, ... of a row's list: ids, [kept * target_prob - draft_prob]+, which are the first of their id."""
    _, _, _, _, lists, stride_part = gathered
    _, listed_ptr, _, _ = lists
    _, _, _, _, _, _, count = law
    target_law, draft_law, kept = record
    target_of, reference, inverse = target_law
    ids, prob, first_id, _, _, _ = distinct(begin, law, slot, i, draft_law, draft_scale, vocab, ENTRIES)
    owner = tl.where(first_id, ids // cut[0], 0).to(tl.int64)
    where = listed_ptr + owner * (2 * stride_part) + row * count + begin + tl.arange(0, ENTRIES)
    x = tl.load(where, mask=first_id, other=NEG_INF)
    target_prob = soft_prob(x, ids, target_of, reference, inverse, scale)
    return ids, tl.maximum(kept * target_prob - prob, 0.0), first_id


@triton.jit
def _without_list(law, slot, i, gathered, row, record, cut, extra_ptr, vocab, scale, draft_scale,
                  LEAVES: tl.constexpr, ENTRIES: tl.constexpr):  # fmt: skip
    """Of row i whose draft's law is a list: the target's without the listed ids, and what each of these adds."""
    _, _, memory, _, lists, stride_part = gathered
    target_law, draft_law, kept = record
    leaf = tl.arange(0, LEAVES)
    tl.store(extra_ptr + leaf, tl.zeros([LEAVES], tl.int64))
    stores_done()
    listed = tl.zeros((), tl.int32)
    for begin in range(0, list_end(law, draft_law), ENTRIES):
        ids, residual, first_id = _listed_residuals(
            begin, law, slot, i, row, gathered, record, cut, vocab, scale, draft_scale, ENTRIES
        )
        tl.atomic_add(extra_ptr + ids // LEAF, (residual * RESIDUAL_ONE).to(tl.int64), mask=first_id, sem="relaxed")
        listed = tl.maximum(listed, tl.max(tl.where(ids == target_law[0], 1, 0), axis=0))
    stores_done()
    extra = tl.load(extra_ptr + leaf, volatile=True)
    tl.debug_barrier()
    nobody = tl.full((), -1, tl.int32)
    tops, rest = merged_leaves((memory[0], lists[0]), stride_part, row, cut, vocab, scale, nobody, tl.zeros((), tl.int64), LEAVES)
    return _unlisted(rest, tops, target_law, listed == 0, kept, scale, LEAVES) + extra


@triton.jit
def _inner_list(x, law, slot, i, ids, inside, gathered, row, record, cut, patch_ptr, vocab, scale, draft_scale,
                ENTRIES: tl.constexpr):  # fmt: skip
    """[kept * target_prob - draft_prob]+ of a leaf's ids with target logits x, 0 outside; row i's law is a list."""
    target_law, draft_law, kept = record
    target_of, reference, inverse = target_law
    at = tl.arange(0, LEAF)
    first = tl.min(ids, axis=0)
    # Listed ids find their places in the leaf through memory; -1 = not listed.
    tl.store(patch_ptr + at, at * 0.0 - 1.0)
    stores_done()
    for begin in range(0, list_end(law, draft_law), ENTRIES):
        own, residual, first_id = _listed_residuals(
            begin, law, slot, i, row, gathered, record, cut, vocab, scale, draft_scale, ENTRIES
        )
        tl.store(patch_ptr + own % LEAF, residual, mask=first_id & (own // LEAF == first // LEAF))
    stores_done()
    changed = tl.load(patch_ptr + at, volatile=True)
    unlisted = kept * soft_prob(x, ids, target_of, reference, inverse, scale)
    return tl.where(inside, tl.where(changed >= 0.0, changed, unlisted), 0.0)


@triton.jit
def _summed(residual_ptr, stride_residual, row, cut, vocab, LEAVES: tl.constexpr):
    """From the pieces of all ranks, where these have been summed."""
    shard_width, num_leaves, pieces = cut
    leaf = tl.arange(0, LEAVES)
    first = leaf * LEAF // shard_width
    mass = tl.zeros([LEAVES], tl.int64)
    for n in range(pieces):
        shard = first + n
        here = shard * shard_width < tl.minimum((leaf + 1) * LEAF, vocab)
        where = row * num_leaves + (leaf - shard * shard_width // LEAF)
        mass += tl.load(residual_ptr + shard.to(tl.int64) * stride_residual + where, mask=here, other=0)
    return mass


@triton.jit
def _residual_leaves(
    i, row, slot, at, law, gathered, residual_ptr, stride_residual, record, cut, extra_ptr, shards, vocab, scale, draft_scale,
    LEAVES: tl.constexpr, SHARDS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Residual mass of every leaf of row i of a request, int64 [LEAVES]; at: its row where they have been summed."""
    dense, listed = law
    if dense is not None:
        mass = _summed(residual_ptr, stride_residual, at, cut, vocab, LEAVES)
    elif listed is not None:
        mass = _without_list(listed, slot, i, gathered, row, record, cut, extra_ptr, vocab, scale, draft_scale, LEAVES, ENTRIES)
    else:
        mass = _without_draft(gathered, row, record, cut, shards, vocab, scale, LEAVES, SHARDS)
    return mass


# --- the draw -------------------------------------------------------------------------------------------------------


@triton.jit
def _log2(weight):
    return tl.where(weight > 0, tl.log2(tl.where(weight > 0, weight, 1).to(tl.float32)), NEG_INF)


@triton.jit
def _race(log_weight, ids, inside, first_lane, seed, position, anchor, STREAM: tl.constexpr, LANES: tl.constexpr):
    """Best word by log2 weight (-inf = excluded); ids are first_lane + 0, 1, ...; 0 where none is inside."""
    words = lane_words(seed, first_lane, position, anchor, STREAM, 1, LANES)
    key = log_weight - tl.reshape(log2_exponential(words), [LANES])
    return tl.max(tl.where(inside, pack(tl.where(log_weight > NEG_INF, key, NEG_INF), ids), 0), axis=0)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "start", "held"])
def accept_draw_kernel(
    target,  # ([L, W], its row stride, settings of primitives/adjust.py or None)
    layout,  # None, cu_logits [R+1], logits_indices [L], token_ids, positions [N_max]
    gathered,  # regions of the first phase of all ranks [N, L, ...], see shards_verify.py, and their stride
    law,  # (dense law or None, listed law or None), see shards_rows.py
    residual_ptr,  # int64 [N, R, NL], where every row may be needed [N, L, NL]; None: no dense law
    draft_temperature_ptr, temperature_ptr, seed_ptr, slots_ptr,  # [S] or None, [S], [S], [R] or None
    word_ptr,  # int64 [R] of the part
    verdict_ptr,  # int64 [R, 2] of the part: accepted drafts, whether the residual was empty
    row_values_ptr, row_ids_ptr, total_ptr,  # [R, WIDTH, ...]
    extra_ptr, patch_ptr,  # int64 [R, LEAVES], fp32 [R, LEAF]; None: no listed law
    cut,  # ids and leaves of a shard, ranks that can share a leaf
    num_requests, num_slots, num_rows, num_drafts, shards, start, held, vocab, stride_residual,
    JUDGE: tl.constexpr, CHOOSE: tl.constexpr,
    WIDTH: tl.constexpr, SHARDS: tl.constexpr, LEAVES: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Request = program. The race over leaves is the same on every rank; inside the winning leaf each rank races its ids."""
    ENTRIES: tl.constexpr = 64 if CANDIDATES > 64 else CANDIDATES
    request = tl.program_id(0)
    slot, row0, length = request_of(request, slots_ptr, layout[1], num_requests, num_slots, num_rows, num_drafts)
    word = tl.zeros((), tl.int64)
    accepted = tl.zeros((), tl.int32)
    empty = word
    if length >= 0:
        dense, listed = law
        row_values_ptr, row_ids_ptr = own_records(row_values_ptr, row_ids_ptr, row0, WIDTH)
        if listed is not None:
            extra_ptr += request.to(tl.int64) * LEAVES
            patch_ptr += request.to(tl.int64) * LEAF
        temperature, draft_temperature = temperatures_of(temperature_ptr, draft_temperature_ptr, slot, length)
        scale, draft_scale = log2_scale(temperature), log2_scale(draft_temperature)
        # The view of target.py on this rank's columns: ids are global, and the rank's alone may be read.
        view = (target[0] - start, target[1], vocab, target[2], (layout[3], None), layout[2], row0, slot, length, None)
        accepted, wants, anchor = judge(
            slot, row0, length, temperature, draft_temperature, gathered, dense, layout, seed_ptr, row_values_ptr, row_ids_ptr,
            shards, cut[1], vocab, JUDGE, WIDTH, SHARDS, BLOCK,
        )  # fmt: skip
        seed = tl.load(seed_ptr + slot)
        if CHOOSE is not None:
            if wants:
                i = tl.arange(0, WIDTH)
                rows = (row0 + i).to(tl.int64)
                total_ptr += request.to(tl.int64) * WIDTH - row0
                for judged in range(0, accepted):
                    row = (row0 + judged).to(tl.int64)
                    record = read_record(row_values_ptr, row_ids_ptr, row)
                    mass = _residual_leaves(
                        judged, row, slot, row, law, gathered, residual_ptr, stride_residual, record, cut, extra_ptr, shards,
                        vocab, scale, draft_scale, LEAVES, SHARDS, ENTRIES,
                    )  # fmt: skip
                    tl.store(total_ptr + row, tl.sum(mass, axis=0))
                stores_done()
                stop = accepted
                accepted = CHOOSE(i, rows, stop, row_values_ptr, total_ptr, 1, seed, anchor, WIDTH, 4)
                wants = accepted < stop

        row = (row0 + accepted).to(tl.int64)
        word = pack(tl.zeros((), tl.float32), tl.load(row_ids_ptr + row * IDS + FIRST, volatile=True).to(tl.int64))
        finite = (tl.load(row_ids_ptr + row * IDS + STATUS, volatile=True) & NONFINITE_ROW) == 0
        if (temperature > 0.0) & finite:
            record = read_record(row_values_ptr, row_ids_ptr, row)
            target_of, row_top = record[0][0], record[0][1]
            tops, mass = merged_leaves(gathered[2], gathered[5], row, cut, vocab, scale,
                                       tl.full((), -1, tl.int32), tl.zeros((), tl.int64), LEAVES)  # fmt: skip
            leaf = tl.arange(0, LEAVES)
            weight = _log2(mass) + below_max(tops, row_top) * scale
            from_residual = wants
            if wants:
                at = request.to(tl.int64)
                if CHOOSE is not None:
                    at = row
                residual = _residual_leaves(
                    accepted, row, slot, at, law, gathered, residual_ptr, stride_residual, record, cut, extra_ptr, shards,
                    vocab, scale, draft_scale, LEAVES, SHARDS, ENTRIES,
                )  # fmt: skip
                from_residual = tl.max(residual, axis=0) > 0
                weight = tl.where(from_residual, _log2(residual), weight)
            if from_residual | (target_of == SOFTMAX):
                position = anchor + accepted + 1
                here = leaf * LEAF < vocab
                weight = tl.where(here, weight, NEG_INF)
                first_leaf = tl.zeros((), tl.int32)
                winner = unpack_id(_race(weight, leaf, here, first_leaf, seed, position, anchor, LEAF_STREAM, LEAVES))
                ids = winner * LEAF + tl.arange(0, LEAF)
                inside = is_here(ids, start, held)
                x = read_row(view, accepted, ids, inside)
                inner = tl.where(x == NEG_INF, NEG_INF, (x - row_top) * scale)
                if from_residual:
                    if listed is not None:
                        inner = _log2(_inner_list(x, listed, slot, accepted, ids, inside, gathered, row, record, cut, patch_ptr,
                                                  vocab, scale, draft_scale, ENTRIES))  # fmt: skip
                    else:
                        draft_row = None
                        if dense is not None:
                            draft_row = dense[0] + slot * dense[2] + accepted.to(tl.int64) * dense[3]
                        inner = _log2(_residual(x, draft_row, ids, inside, start, record, scale, draft_scale))
                word = _race(inner, ids, inside, winner * LEAF, seed, position, anchor, CORRECT, LEAF)
            empty = tl.where(wants & (from_residual == 0), 1, 0).to(tl.int64)
    tl.store(word_ptr + request, word)
    tl.store(verdict_ptr + request * 2, accepted.to(tl.int64))
    tl.store(verdict_ptr + request * 2 + 1, empty)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "num_forward"])
def accept_finish_kernel(
    layout,  # query_start, cu_logits [R+1], logits_indices [L], token_ids, positions [N_max]
    gathered,  # regions of the first phase of all ranks [N, L, ...], see shards_verify.py, and their stride
    dense,  # (draft logits: not read; lse [S, K] or None, their strides), or None
    word_ptr, verdict_ptr,  # int64 [N, R], [N, R, 2], or None: the rows' own words decide
    draft_temperature_ptr, temperature_ptr, slots_ptr,  # [S] or None, [S] or None, [R] or None
    outputs,  # (tokens [R, K+1], five of [R], commit [N_max], flags [R], None), (anchors and positions [S] or None, strides)
    row_values_ptr, row_ids_ptr,  # [R, WIDTH, ...]
    num_requests, num_slots, num_rows, num_forward, num_drafts, shards, num_leaves, vocab, stride_drawn,
    WIDTH: tl.constexpr, SHARDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Request = program: everything follows from the gathered parts, so every rank writes the same."""
    request = tl.program_id(0)
    slot, row0, length = request_of(request, slots_ptr, layout[1], num_requests, num_slots, num_rows, num_drafts)
    if length < 0:
        emit_nothing(request, slot, layout, outputs, num_requests, num_drafts, num_forward, WIDTH)
    else:
        row_values_ptr, row_ids_ptr = own_records(row_values_ptr, row_ids_ptr, row0, WIDTH)
        temperature, draft_temperature = temperatures_of(temperature_ptr, draft_temperature_ptr, slot, length)
        accepted, _, anchor = judge(
            slot, row0, length, temperature, draft_temperature, gathered, dense, layout, None, row_values_ptr, row_ids_ptr, shards,
            num_leaves, vocab, judge_match, WIDTH, SHARDS, BLOCK,
        )  # fmt: skip
        empty = length < 0
        if word_ptr is not None:
            shard = tl.arange(0, SHARDS).to(tl.int64)
            words = tl.load(word_ptr + shard * stride_drawn + request, mask=shard < shards, other=0)
            token = unpack_id(tl.max(words, axis=0))
            accepted = tl.load(verdict_ptr + request * 2).to(tl.int32)
            empty = tl.load(verdict_ptr + request * 2 + 1) > 0
        else:
            token = tl.load(row_ids_ptr + (row0 + accepted).to(tl.int64) * IDS + FIRST, volatile=True).to(tl.int64)
        view = (None, None, vocab, None, None, None, None, None, None, None)  # no logits are read
        emit(request, slot, row0, length, accepted, token, empty, anchor, temperature > 0.0, view, layout, outputs, None,
             row_values_ptr, row_ids_ptr, log2_scale(temperature), num_requests, num_drafts, num_forward, word_ptr is not None,
             WIDTH)  # fmt: skip


_JUDGES = {"token": judge_token, "block": judge_block}


def _options(config):
    options = dict(num_warps=config.num_warps, enable_fp_fusion=False)
    return options if config.max_registers is None else options | dict(maxnreg=config.max_registers)


def launch_accept_normalise(items, args, *, noisy, candidates, config):
    """Launch one program per item (rows x leaves of a request)."""
    constants = dict(NOISY=noisy, GROUP=config.group, CHUNK=config.chunk, CANDIDATES=candidates)
    accept_normalise_kernel[(items,)](*args, **constants, **_options(config))


def launch_accept_residual(items, args, *, rule, config, **sizes):
    """Launch one program per item (leaves of a request)."""
    constants = dict(JUDGE=_JUDGES[rule], EVERY_ROW=rule == "block", CHUNK=config.chunk, BLOCK=config.block)
    accept_residual_kernel[(items,)](*args, **constants, **sizes, **_options(config))


def launch_accept_draw(requests, args, *, rule, config, **sizes):
    """Launch one program per request."""
    constants = dict(JUDGE=_JUDGES[rule], CHOOSE=choose_block if rule == "block" else None, BLOCK=config.block)
    accept_draw_kernel[(requests,)](*args, **constants, **sizes, **_options(config))


def launch_accept_finish(requests, args, *, config, **sizes):
    """Launch one program per request."""
    accept_finish_kernel[(requests,)](*args, BLOCK=config.block, **sizes, **_options(config))
