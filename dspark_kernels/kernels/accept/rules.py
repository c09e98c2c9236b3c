"""The rules of acceptance: how many drafts of a request stay, once the statistics of all its rows are there.

token    accept while u * draft_prob < target_prob (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318)
block    P_i = min(1, P_{i-1} target_prob / draft_prob); Z_i = sum [P_i * target - draft]+ of row i, h_i = Z_i / (Z_i + 1 - P_i),
         h_L = P_L; the largest i with u_i < h_i (Sun et al., arXiv 2403.10444)
match    accept while the draft is the row's own token: its first maximum (greedy), or the one that the noise shared with the
         draft gives (coupled; Daliri et al., arXiv 2408.07978)
forced   accept while u < rate: load tests
Greedy requests match under each rule but `forced`. Symbols: L drafts of the request, u acceptance uniforms. Reference:
reference/accept.py."""

import triton
import triton.language as tl

from ..primitives.constants import NONFINITE_ROW, RESIDUAL_ONE, ROW_IDS, ROW_VALUES
from ..primitives.philox import ACCEPT, acceptance_words, uniform
from .args import RowDrafts
from .rows import DRAFT_PROB, FIRST, PREFIX_PROB, STATUS, TARGET_PROB

# State of a request between its phases.
PENDING = tl.constexpr(0)
NEEDS_RESIDUAL = tl.constexpr(1)
DONE = tl.constexpr(2)


@triton.jit
def draft_rows(i, rows, length, layout):
    """Forward rows of the drafts that rows i of a request verify."""
    return tl.load(layout.logits_indices_ptr + rows + 1, mask=i < length, other=0)


@triton.jit
def drafts_at(forward, i, length, layout, vocab):
    has_draft = i < length
    draft = tl.load(layout.token_ids_ptr + forward, mask=has_draft, other=0)
    return RowDrafts(draft, has_draft & (draft >= 0) & (draft < vocab), has_draft & (draft == -1))


@triton.jit
def read_drafts(i, rows, length, layout, vocab):
    return drafts_at(draft_rows(i, rows, length, layout), i, length, layout, vocab)


@triton.jit
def _stop(i, length, status):
    """The first row without finite logits, where acceptance stops, else the last row."""
    nonfinite = (i <= length) & ((status & NONFINITE_ROW) != 0)
    return tl.min(tl.where(nonfinite, i, length), axis=0)


@triton.jit
def _while_true(i, length, accept):
    return tl.min(tl.where((i < length) & (accept == 0), i, length), axis=0)


@triton.jit
def _matches(i, rows, length, drafts, stats):
    first = tl.load(stats.ids_ptr + rows * ROW_IDS + FIRST, mask=i < length, other=-1, volatile=True)
    return _while_true(i, length, drafts.inside & (drafts.ids == first))


@triton.jit
def verify_match(i, rows, length, known, stats, rates_ptr):
    """Every rule gives the drafts that stay, and whether a residual has to be summed before a token can be drawn."""
    status = tl.load(stats.ids_ptr + rows * ROW_IDS + STATUS, mask=i <= length, other=0, volatile=True)
    return _matches(i, rows, _stop(i, length, status), known.drafts, stats), length < 0


@triton.jit
def verify_forced(i, rows, length, known, stats, rates_ptr):
    status = tl.load(stats.ids_ptr + rows * ROW_IDS + STATUS, mask=i <= length, other=0, volatile=True)
    u = uniform(acceptance_words(known.seed, known.anchor + 1 + i, known.anchor, ACCEPT))
    rate = tl.load(rates_ptr + i, mask=i < length, other=0.0)
    return _while_true(i, _stop(i, length, status), known.drafts.inside & (u < rate)), length < 0


@triton.jit
def verify_token(i, rows, length, known, stats, rates_ptr):
    status = tl.load(stats.ids_ptr + rows * ROW_IDS + STATUS, mask=i <= length, other=0, volatile=True)
    stop = _stop(i, length, status)
    accepted = _matches(i, rows, stop, known.drafts, stats)
    if known.sampled:
        draft_prob = tl.load(stats.values_ptr + rows * ROW_VALUES + DRAFT_PROB, mask=i < length, other=0.0, volatile=True)
        target_prob = tl.load(stats.values_ptr + rows * ROW_VALUES + TARGET_PROB, mask=i < length, other=0.0, volatile=True)
        u = uniform(acceptance_words(known.seed, known.anchor + 1 + i, known.anchor, ACCEPT))
        accepted = _while_true(i, stop, known.drafts.inside & (draft_prob > 0.0) & (u * draft_prob < target_prob))
    verified = tl.max(tl.where((i == accepted) & (i < stop) & (known.drafts.missing == 0), 1, 0), axis=0) > 0
    return accepted, verified & known.sampled


@triton.jit
def verify_block(i, rows, length, known, stats, rates_ptr):
    """Sampled: the rows that count, their P_i into the statistics; `select_block_length` decides after the residuals."""
    status = tl.load(stats.ids_ptr + rows * ROW_IDS + STATUS, mask=i <= length, other=0, volatile=True)
    stop = _stop(i, length, status)
    accepted = _matches(i, rows, stop, known.drafts, stats)
    if known.sampled:
        draft_prob = tl.load(stats.values_ptr + rows * ROW_VALUES + DRAFT_PROB, mask=i < length, other=0.0, volatile=True)
        target_prob = tl.load(stats.values_ptr + rows * ROW_VALUES + TARGET_PROB, mask=i < length, other=0.0, volatile=True)
        possible = known.drafts.inside & (draft_prob > 0.0)
        ratio = tl.where(possible, target_prob / tl.where(possible, draft_prob, 1.0), 0.0)
        ratio = tl.minimum(ratio, 1e30)  # a product with 0 stays 0
        prefix_prob = tl.full(i.shape, 1.0, tl.float32)
        so_far = tl.full((), 1.0, tl.float32)
        for k in range(stop):
            so_far = tl.minimum(1.0, so_far * tl.sum(tl.where(i == k, ratio, 0.0), axis=0))
            prefix_prob = tl.where(i == k + 1, so_far, prefix_prob)
        tl.store(stats.values_ptr + rows * ROW_VALUES + PREFIX_PROB, prefix_prob, mask=i <= stop)
        accepted = stop
    return accepted, known.sampled & (stop > 0)


@triton.jit
def select_block_length(i, rows, stop, stats, residual_ptr, num_blocks, seed, anchor, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """The largest index that passes, from the residual sums of rows 0 .. stop - 1."""
    BLOCK: tl.constexpr = 64 if BLOCKS > 64 else BLOCKS
    total = tl.zeros([WIDTH], tl.int64)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)[None, :]
        inside = (i < stop)[:, None] & (block < num_blocks)
        total += tl.sum(tl.load(residual_ptr + rows[:, None] * num_blocks + block, mask=inside, other=0, volatile=True), axis=1)
    residual_prob = total.to(tl.float32) * (1.0 / RESIDUAL_ONE)
    prefix_prob = tl.load(stats.values_ptr + rows * ROW_VALUES + PREFIX_PROB, mask=i <= stop, other=0.0, volatile=True)
    rest = residual_prob + (1.0 - prefix_prob)
    u = uniform(acceptance_words(seed, anchor + i, anchor, ACCEPT))
    passes = tl.where(i < stop, (u * rest < residual_prob) | (rest <= 0.0), u < prefix_prob)
    return tl.max(tl.where(passes & (prefix_prob > 0.0) & (i >= 1) & (i <= stop), i, 0), axis=0)
