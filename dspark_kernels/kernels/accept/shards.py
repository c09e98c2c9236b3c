"""Lossless acceptance of a chain on vocabulary shards: each phase one launch on every rank, with a gather between them.

normalise  a rank's part of every row (shards_rows.py)
residual   dense proposals: every rank verifies from the gathered parts (shards_verify.py), and sums [P_i * target - draft]+ of
           its ids in the rows that need it
draw       every rank verifies, races the blocks, and those with ids in the winning block race inside it
finish     the best word of all ranks is the token

Where the proposal is one-hot or sparse, the residual needs no phase of its own: block sums without the candidates come with the
parts, and a candidate adds [P_i * target - draft]+ to its block, from its gathered logit. Symbols: R requests, K drafts, C
candidates, L logit rows, W ids of a shard, N ranks, NB blocks of 1024 ids that a shard can touch. Rules: rules.py. Reference:
reference/accept.py on whole rows.
"""

import triton
import triton.language as tl

from ..primitives.constants import NEG_INF, NONFINITE_ROW, RESIDUAL_ONE, SUMEXP_ONE, VOCAB_BLOCK
from ..primitives.options import options_of
from ..primitives.philox import CORRECT, LEAF as LEAF_STREAM, lane_words, log2_exponential
from ..primitives.race import pack, unpack_id
from ..primitives.sumexp import below_max, fixed_sums, log2_scale, numbers
from ..primitives.sync import stores_done
from .args import VerifyTile
from .outputs import log2_weight, write_no_outputs, write_outputs
from .proposals import row_pair
from .rows import SOFTMAX, pick, soft_prob
from .rules import select_block_length, verify_block, verify_match, verify_token
from .shards_rows import accept_normalise_kernel, is_here, request_of, temperatures_of
from .shards_verify import merged_blocks, verify
from .sparse import distinct, list_end
from .target import read_row
from .values import Columns, Scales, Sizes, View


@triton.jit
def _residual(x, draft_row, ids, inside, start, pair, scales):
    """[P_i * target_prob - draft_prob]+ of ids with target logits x, 0 outside; draft_row None: a one-hot proposal."""
    target_prob = soft_prob(x, ids, pair.target, scales.target)
    y = tl.full(ids.shape, float("-inf"), tl.float32)
    if draft_row is not None:
        y = numbers(tl.load(draft_row + ids - start, mask=inside, other=NEG_INF).to(tl.float32))
    draft_prob = soft_prob(y, ids, pair.draft, scales.draft)
    return tl.where(inside, tl.maximum(pair.prefix_prob * target_prob - draft_prob, 0.0), 0.0)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "start", "held", "first_block"])
def accept_residual_kernel(
    target,  # Target [L, W]
    layout,  # Layout
    gathered,  # Gathered: parts of the first phase
    dense,  # DraftShard
    sampling,  # Sampling
    residual_ptr,  # int64 of the part: [R, NB], where every row may be needed [L, NB]
    num_requests, num_slots, num_rows, num_drafts, start, held, first_block, num_blocks, vocab,
    VERIFY: tl.constexpr,  # of ChainRule
    EVERY_ROW: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr,  # VerifyTile
):  # fmt: skip
    """Item = blocks of a request. Each item verifies for itself, from L2: dearer in loads than in waiting for one that does."""
    chunks = tl.cdiv(num_blocks, CHUNK)
    request = tl.program_id(0) // chunks
    item = tl.program_id(0) % chunks
    slot, row0, length = request_of(request, sampling, layout, num_requests, num_slots, num_rows, num_drafts)
    if length >= 0:
        columns = Columns(start, held, first_block, num_blocks)
        temperature, draft_temperature = temperatures_of(sampling, slot, length)
        scales = Scales(log2_scale(temperature), log2_scale(draft_temperature))
        verified = verify(
            request, slot, row0, length, temperature, draft_temperature, gathered, dense, layout, sampling.seed_ptr, 0,
            num_blocks, vocab, VERIFY, TILE,
        )  # fmt: skip
        verdict, stats = verified.verdict, verified.stats
        accepted, wants = verdict.accepted, verdict.wants_residual
        # On this rank's columns: ids are global, and the rank's alone may be read.
        view = View(target.logits_ptr - start, target.stride, vocab, target.adjustments, layout.token_ids_ptr, None,
                    layout.logits_indices_ptr, row0, slot, length, None)  # fmt: skip
        block = item * CHUNK + tl.arange(0, CHUNK)
        ids = (first_block + item * CHUNK) * VOCAB_BLOCK + tl.arange(0, CHUNK * VOCAB_BLOCK)
        inside = is_here(ids, columns)
        begin = accepted
        end = tl.where(wants, accepted + 1, accepted)
        if EVERY_ROW:
            begin = accepted * 0
            end = tl.where(wants, accepted, 0)
        for i in range(begin, end):
            row = (row0 + i).to(tl.int64)
            pair = row_pair(i, stats, verdict.prefix_prob, tl.arange(0, TILE.WIDTH))
            draft_row = dense.logits_ptr + slot * dense.stride_slot + tl.cast(i, tl.int64) * dense.stride_row
            x = read_row(view, i, ids, inside)
            sumexp = fixed_sums(_residual(x, draft_row, ids, inside, start, pair, scales), CHUNK, VOCAB_BLOCK, RESIDUAL_ONE)
            at = request.to(tl.int64)
            if EVERY_ROW:
                at = row
            tl.store(residual_ptr + at * num_blocks + block, sumexp, mask=block < num_blocks)


# --- residual sums of every block of a row -------------------------------------------------------------------------


@triton.jit
def _unlisted(sumexp, tops, pair, point, scale, BLOCKS: tl.constexpr):
    """P_i * target_prob of blocks whose sums are without the candidates; point: whether a point mass is none of these."""
    target = pair.target
    unlisted = sumexp.to(tl.float32) * tl.exp2(below_max(tops, target.reference) * scale) * (target.factor * (1.0 / SUMEXP_ONE))
    if target.point != SOFTMAX:
        unlisted = tl.where(tl.arange(0, BLOCKS) == tl.where(point, target.point // VOCAB_BLOCK, -1), 1.0, 0.0)
    return (pair.prefix_prob * unlisted * RESIDUAL_ONE).to(tl.int64)


@triton.jit
def _without_draft(gathered, row, pair, cut, scale, BLOCKS: tl.constexpr, SHARDS: tl.constexpr):
    """Of a row whose draft stands for itself: the target's, less the draft's octet without it."""
    part = gathered.part
    draft_of = pair.draft.point
    shard = tl.arange(0, SHARDS).to(tl.int64)
    removed = tl.load(part.words_ptr + shard * gathered.stride + row * 4 + 2, mask=shard < gathered.shards, other=0)
    in_list = tl.where(draft_of < cut.vocab, draft_of, -1)
    tops, sumexp = merged_blocks(part.target.max_ptr, part.target.sumexp_ptr, gathered.stride, row, cut, scale, in_list,
                               tl.max(removed, axis=0), BLOCKS)  # fmt: skip
    return _unlisted(sumexp, tops, pair, in_list != pair.target.point, scale, BLOCKS)


@triton.jit
def _candidate_residuals(begin, draft, slot, i, row, gathered, pair, cut, scales, ENTRIES: tl.constexpr):
    """Candidates begin, begin + 1, ... of a row: ids, [P_i * target_prob - draft_prob]+, which are the first of their id."""
    found = distinct(begin, draft, slot, i, pair.draft, scales.draft, cut.vocab, ENTRIES)
    owner = tl.where(found.first_id, found.ids // cut.width, 0).to(tl.int64)
    logits_ptr = gathered.part.lists.logits_ptr
    where = logits_ptr + owner * (2 * gathered.stride) + row * draft.count + begin + tl.arange(0, ENTRIES)
    x = tl.load(where, mask=found.first_id, other=NEG_INF)
    target_prob = soft_prob(x, found.ids, pair.target, scales.target)
    return found.ids, tl.maximum(pair.prefix_prob * target_prob - found.prob, 0.0), found.first_id


@triton.jit
def _without_list(draft, slot, i, gathered, row, pair, cut, added_ptr, scales, BLOCKS: tl.constexpr, ENTRIES: tl.constexpr):
    """Of row i of a sparse proposal: the target's without the candidates, and what each of these adds."""
    part = gathered.part
    block = tl.arange(0, BLOCKS)
    tl.store(added_ptr + block, tl.zeros([BLOCKS], tl.int64))
    stores_done()
    in_list = tl.zeros((), tl.int32)
    for begin in range(0, list_end(draft, pair.draft), ENTRIES):
        ids, residual, first_id = _candidate_residuals(begin, draft, slot, i, row, gathered, pair, cut, scales, ENTRIES)
        tl.atomic_add(added_ptr + ids // VOCAB_BLOCK, (residual * RESIDUAL_ONE).to(tl.int64), mask=first_id, sem="relaxed")
        in_list = tl.maximum(in_list, tl.max(tl.where(ids == pair.target.point, 1, 0), axis=0))
    stores_done()
    added = tl.load(added_ptr + block, volatile=True)
    tl.debug_barrier()
    nobody = tl.full((), -1, tl.int32)
    tops, rest = merged_blocks(part.target.max_ptr, part.lists.rest_ptr, gathered.stride, row, cut, scales.target, nobody,
                               tl.zeros((), tl.int64), BLOCKS)  # fmt: skip
    return _unlisted(rest, tops, pair, in_list == 0, scales.target, BLOCKS) + added


@triton.jit
def _inner_list(x, draft, slot, i, ids, inside, gathered, row, pair, cut, patch_ptr, scales, ENTRIES: tl.constexpr):
    """[P_i * target_prob - draft_prob]+ of a block's ids with target logits x, 0 outside; of row i of a sparse proposal."""
    at = tl.arange(0, VOCAB_BLOCK)
    first = tl.min(ids, axis=0)
    # Entries find their places in the block through memory; -1 = no entry.
    tl.store(patch_ptr + at, at * 0.0 - 1.0)
    stores_done()
    for begin in range(0, list_end(draft, pair.draft), ENTRIES):
        own, residual, first_id = _candidate_residuals(begin, draft, slot, i, row, gathered, pair, cut, scales, ENTRIES)
        tl.store(patch_ptr + own % VOCAB_BLOCK, residual, mask=first_id & (own // VOCAB_BLOCK == first // VOCAB_BLOCK))
    stores_done()
    changed = tl.load(patch_ptr + at, volatile=True)
    unlisted = pair.prefix_prob * soft_prob(x, ids, pair.target, scales.target)
    return tl.where(inside, tl.where(changed >= 0.0, changed, unlisted), 0.0)


@triton.jit
def _summed(residual, row, cut, BLOCKS: tl.constexpr):
    """From the pieces of all ranks, where these have been summed. residual: GatheredSums."""
    block = tl.arange(0, BLOCKS)
    first = block * VOCAB_BLOCK // cut.width
    sumexp = tl.zeros([BLOCKS], tl.int64)
    for n in range(cut.pieces):
        shard = first + n
        here = shard * cut.width < tl.minimum((block + 1) * VOCAB_BLOCK, cut.vocab)
        where = row * cut.blocks + (block - shard * cut.width // VOCAB_BLOCK)
        sumexp += tl.load(residual.ptr + shard.to(tl.int64) * residual.stride + where, mask=here, other=0)
    return sumexp


@triton.jit
def _residual_blocks(
    i, row, slot, at, draft, gathered, residual, pair, cut, added_ptr, scales,
    BLOCKS: tl.constexpr, SHARDS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Residual sum of exponentials of every block of row i of a request, int64 [BLOCKS]; at: its row where they have been
    summed."""
    if draft.dense is not None:
        sumexp = _summed(residual, at, cut, BLOCKS)
    elif draft.sparse is not None:
        sumexp = _without_list(draft.sparse, slot, i, gathered, row, pair, cut, added_ptr, scales, BLOCKS, ENTRIES)
    else:
        sumexp = _without_draft(gathered, row, pair, cut, scales.target, BLOCKS, SHARDS)
    return sumexp


# --- the draw -------------------------------------------------------------------------------------------------------


@triton.jit
def _race(log_weight, ids, inside, first_lane, seed, position, anchor, STREAM: tl.constexpr, LANES: tl.constexpr):
    """Best word by log2 weight (-inf = excluded); ids are first_lane + 0, 1, ...; 0 where none is inside."""
    words = lane_words(seed, first_lane, position, anchor, STREAM, 1, LANES)
    key = log_weight - tl.reshape(log2_exponential(words), [LANES])
    return tl.max(tl.where(inside, pack(tl.where(log_weight > NEG_INF, key, NEG_INF), ids), 0), axis=0)


@triton.jit
def _select(
    request, row0, slot, stop, prefix_prob, known, draft, gathered, summed, stats, total_ptr, cut, added_ptr, scales,
    SELECT: tl.constexpr, BLOCKS: tl.constexpr, ENTRIES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How many of `stop` drafts stay, from the residual sums of their rows. total_ptr: int64 [R, WIDTH]."""
    i = tl.arange(0, TILE.WIDTH)
    rows = (row0 + i).to(tl.int64)
    total_ptr += request.to(tl.int64) * TILE.WIDTH - row0
    for verified in range(0, stop):
        row = (row0 + verified).to(tl.int64)
        pair = row_pair(verified, stats, prefix_prob, i)
        sumexp = _residual_blocks(
            verified, row, slot, row, draft, gathered, summed, pair, cut, added_ptr, scales, BLOCKS, TILE.SHARDS, ENTRIES
        )
        tl.store(total_ptr + row, tl.sum(sumexp, axis=0))
    stores_done()
    return SELECT(i, rows, stop, prefix_prob, total_ptr, 1, known.seed, known.anchor, TILE.WIDTH, 4)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "start", "held"])
def accept_draw_kernel(
    target,  # Target [L, W]
    layout,  # Layout
    gathered,  # Gathered: parts of the first phase
    draft,  # ShardedDraft
    summed,  # GatheredSums, or None: no dense proposal
    sampling,  # Sampling
    drawn,  # Drawn: of the part
    scratch,  # DrawScratch
    cut,  # Cut
    num_requests, num_slots, num_rows, num_drafts, start, held,
    VERIFY: tl.constexpr, SELECT: tl.constexpr,  # of ChainRule
    BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,  # VerifyTile
):  # fmt: skip
    """Request = program. The race over blocks is the same on every rank; inside the winning block each rank races its ids."""
    ENTRIES: tl.constexpr = 64 if CANDIDATES > 64 else CANDIDATES
    request = tl.program_id(0)
    slot, row0, length = request_of(request, sampling, layout, num_requests, num_slots, num_rows, num_drafts)
    word = tl.zeros((), tl.int64)
    accepted = tl.zeros((), tl.int32)
    empty = word
    if length >= 0:
        columns = Columns(start, held, 0, cut.blocks)
        every = tl.arange(0, TILE.WIDTH)
        added_ptr, patch_ptr = scratch.added_ptr, scratch.patch_ptr
        if draft.sparse is not None:
            added_ptr += request.to(tl.int64) * BLOCKS
            patch_ptr += request.to(tl.int64) * VOCAB_BLOCK
        temperature, draft_temperature = temperatures_of(sampling, slot, length)
        scales = Scales(log2_scale(temperature), log2_scale(draft_temperature))
        # On this rank's columns: ids are global, and the rank's alone may be read.
        view = View(target.logits_ptr - start, target.stride, cut.vocab, target.adjustments, layout.token_ids_ptr, None,
                    layout.logits_indices_ptr, row0, slot, length, None)  # fmt: skip
        verified = verify(
            request, slot, row0, length, temperature, draft_temperature, gathered, draft.dense, layout, sampling.seed_ptr, 0,
            cut.blocks, cut.vocab, VERIFY, TILE,
        )  # fmt: skip
        verdict, stats, known = verified.verdict, verified.stats, verified.known
        accepted, wants = verdict.accepted, verdict.wants_residual
        if SELECT is not None:
            if wants:
                stop = accepted
                accepted = _select(request, row0, slot, stop, verdict.prefix_prob, known, draft, gathered, summed, stats,
                                   scratch.total_ptr, cut, added_ptr, scales, SELECT, BLOCKS, ENTRIES, TILE)  # fmt: skip
                wants = accepted < stop

        row = (row0 + accepted).to(tl.int64)
        word = pack(tl.zeros((), tl.float32), pick(stats.first, accepted, every).to(tl.int64))
        finite = (pick(stats.status, accepted, every) & NONFINITE_ROW) == 0
        if (temperature > 0.0) & finite:
            pair = row_pair(accepted, stats, verdict.prefix_prob, every)
            row_top = pair.target.reference
            sums = gathered.part.target
            tops, sumexp = merged_blocks(sums.max_ptr, sums.sumexp_ptr, gathered.stride, row, cut, scales.target,
                                       tl.full((), -1, tl.int32), tl.zeros((), tl.int64), BLOCKS)  # fmt: skip
            block = tl.arange(0, BLOCKS)
            weight = log2_weight(sumexp) + below_max(tops, row_top) * scales.target
            from_residual = wants
            if wants:
                at = request.to(tl.int64)
                if SELECT is not None:
                    at = row
                residual = _residual_blocks(
                    accepted, row, slot, at, draft, gathered, summed, pair, cut, added_ptr, scales, BLOCKS, TILE.SHARDS, ENTRIES
                )
                from_residual = tl.max(residual, axis=0) > 0
                weight = tl.where(from_residual, log2_weight(residual), weight)
            if from_residual | (pair.target.point == SOFTMAX):
                position = known.anchor + accepted + 1
                here = block * VOCAB_BLOCK < cut.vocab
                weight = tl.where(here, weight, NEG_INF)
                first_block = tl.zeros((), tl.int32)
                winner = unpack_id(_race(weight, block, here, first_block, known.seed, position, known.anchor, LEAF_STREAM, BLOCKS))
                ids = winner * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)
                inside = is_here(ids, columns)
                x = read_row(view, accepted, ids, inside)
                inner = tl.where(x == NEG_INF, NEG_INF, (x - row_top) * scales.target)
                if from_residual:
                    if draft.sparse is not None:
                        inner = log2_weight(
                            _inner_list(
                                x, draft.sparse, slot, accepted, ids, inside, gathered, row, pair, cut, patch_ptr, scales, ENTRIES
                            )
                        )
                    else:
                        draft_row = None
                        if draft.dense is not None:
                            draft_rows = draft.dense.logits_ptr + slot * draft.dense.stride_slot
                            draft_row = draft_rows + accepted.to(tl.int64) * draft.dense.stride_row
                        inner = log2_weight(_residual(x, draft_row, ids, inside, start, pair, scales))
                word = _race(inner, ids, inside, winner * VOCAB_BLOCK, known.seed, position, known.anchor, CORRECT, VOCAB_BLOCK)
            empty = tl.where(wants & (from_residual == 0), 1, 0).to(tl.int64)
    tl.store(drawn.word_ptr + request, word)
    tl.store(drawn.verdict_ptr + request * 2, accepted.to(tl.int64))
    tl.store(drawn.verdict_ptr + request * 2 + 1, empty)


@triton.jit(do_not_specialize=["num_requests", "num_slots", "num_rows", "num_forward"])
def accept_finish_kernel(
    layout,  # Layout
    gathered,  # Gathered: parts of the first phase
    dense,  # DraftShard, whose logits are not read; or None
    drawn,  # Drawn: of all ranks [N, ...]
    sampling,  # Sampling, without seeds
    outputs,  # Outputs
    num_requests, num_slots, num_rows, num_forward, num_drafts, num_blocks, vocab, stride_drawn,
    TILE: tl.constexpr,  # VerifyTile
):  # fmt: skip
    """Request = program: everything follows from the gathered parts, so every rank writes the same."""
    request = tl.program_id(0)
    slot, row0, length = request_of(request, sampling, layout, num_requests, num_slots, num_rows, num_drafts)
    sizes = Sizes(num_requests, num_forward, num_drafts, num_blocks)
    if length < 0:
        write_no_outputs(request, slot, layout, outputs, sizes, TILE.WIDTH)
    else:
        temperature, draft_temperature = temperatures_of(sampling, slot, length)
        verified = verify(
            request, slot, row0, length, temperature, draft_temperature, gathered, dense, layout, None, num_forward, num_blocks, vocab,
            verify_match, TILE,
        )  # fmt: skip
        stats, known = verified.stats, verified.known
        accepted = verified.verdict.accepted
        empty = length < 0
        if drawn.word_ptr is not None:
            shard = tl.arange(0, TILE.SHARDS).to(tl.int64)
            words = tl.load(drawn.word_ptr + shard * stride_drawn + request, mask=shard < gathered.shards, other=0)
            token = unpack_id(tl.max(words, axis=0))
            accepted = tl.load(drawn.verdict_ptr + request * 2).to(tl.int32)
            empty = tl.load(drawn.verdict_ptr + request * 2 + 1) > 0
        else:
            token = pick(stats.first, accepted, tl.arange(0, TILE.WIDTH)).to(tl.int64)
        view = View(None, None, vocab, None, None, None, None, row0, slot, length, None)  # no logits are read
        write_outputs(request, accepted, token, empty, known, view, outputs, None, stats, log2_scale(temperature), sizes,
                      drawn.word_ptr is not None, TILE.WIDTH)  # fmt: skip


_RULES = {"token": verify_token, "block": verify_block}


def launch_accept_normalise(items, args, *, noisy, candidates, config):
    """Launch one program per item (rows x blocks of a request)."""
    constants = dict(NOISY=noisy, GROUP=config.group, CHUNK=config.chunk, CANDIDATES=candidates)
    accept_normalise_kernel[(items,)](*args, **constants, **options_of(config))


def launch_accept_residual(items, args, *, rule, config, **tile):
    """Launch one program per item (blocks of a request)."""
    constants = dict(VERIFY=_RULES[rule], EVERY_ROW=rule == "block", CHUNK=config.chunk)
    accept_residual_kernel[(items,)](*args, **constants, TILE=VerifyTile(BLOCK=config.block, **tile), **options_of(config))


def launch_accept_draw(requests, args, *, rule, blocks, candidates, config, **tile):
    """Launch one program per request."""
    select = select_block_length if rule == "block" else None
    constants = dict(VERIFY=_RULES[rule], SELECT=select, BLOCKS=blocks, CANDIDATES=candidates)
    accept_draw_kernel[(requests,)](*args, **constants, TILE=VerifyTile(BLOCK=config.block, **tile), **options_of(config))


def launch_accept_finish(requests, args, *, config, **tile):
    """Launch one program per request."""
    accept_finish_kernel[(requests,)](*args, TILE=VerifyTile(BLOCK=config.block, **tile), **options_of(config))
