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

from ..primitives.constants import NONFINITE_ROW, RESIDUAL_ONE
from ..primitives.philox import ACCEPT, acceptance_words, uniform
from .rows import pick
from .values import ForwardRows, QueryRows, RowDrafts, Verdict


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
def forward_rows(i, row0, length, layout):
    """i: 0 .. WIDTH - 1."""
    return ForwardRows(tl.load(layout.logits_indices_ptr + row0), draft_rows(i, row0 + i, length, layout))


@triton.jit
def query_rows(request, num_forward, layout):
    begin = tl.zeros((), tl.int32)
    end = tl.zeros((), tl.int32)
    if layout.query_start_ptr is not None:
        begin = tl.load(layout.query_start_ptr + request)
        end = tl.minimum(tl.load(layout.query_start_ptr + request + 1), num_forward)
    return QueryRows(begin, end)


@triton.jit
def _stop(i, length, status):
    """The first row without finite logits, where acceptance stops, else the last row."""
    nonfinite = (i <= length) & ((status & NONFINITE_ROW) != 0)
    return tl.min(tl.where(nonfinite, i, length), axis=0)


@triton.jit
def _while_true(i, length, accept):
    return tl.min(tl.where((i < length) & (accept == 0), i, length), axis=0)


@triton.jit
def _matches(i, stop, drafts, stats):
    return _while_true(i, stop, drafts.inside & (drafts.ids == stats.first))


@triton.jit
def _verdict(i, accepted, wants_residual):
    return Verdict(accepted, wants_residual, tl.full(i.shape, 1.0, tl.float32))


@triton.jit
def verify_match(i, length, known, stats, rates_ptr):
    """Every rule gives a Verdict from the RequestStats of a request's rows."""
    return _verdict(i, _matches(i, _stop(i, length, stats.status), known.drafts, stats), length < 0)


@triton.jit
def verify_forced(i, length, known, stats, rates_ptr):
    u = uniform(acceptance_words(known.seed, known.anchor + 1 + i, known.anchor, ACCEPT))
    rate = tl.load(rates_ptr + i, mask=i < length, other=0.0)
    accepted = _while_true(i, _stop(i, length, stats.status), known.drafts.inside & (u < rate))
    return _verdict(i, accepted, length < 0)


@triton.jit
def verify_token(i, length, known, stats, rates_ptr):
    stop = _stop(i, length, stats.status)
    accepted = _matches(i, stop, known.drafts, stats)
    if known.sampled:
        u = uniform(acceptance_words(known.seed, known.anchor + 1 + i, known.anchor, ACCEPT))
        passes = (stats.draft_prob > 0.0) & (u * stats.draft_prob < stats.target_prob)
        accepted = _while_true(i, stop, known.drafts.inside & passes)
    verified = tl.max(tl.where((i == accepted) & (i < stop) & (known.drafts.missing == 0), 1, 0), axis=0) > 0
    return _verdict(i, accepted, verified & known.sampled)


@triton.jit
def verify_block(i, length, known, stats, rates_ptr):
    """Sampled: the rows that count and their P_i; `select_block_length` decides after the residuals."""
    stop = _stop(i, length, stats.status)
    accepted = _matches(i, stop, known.drafts, stats)
    prefix_prob = tl.full(i.shape, 1.0, tl.float32)
    if known.sampled:
        possible = known.drafts.inside & (stats.draft_prob > 0.0)
        ratio = tl.where(possible, stats.target_prob / tl.where(possible, stats.draft_prob, 1.0), 0.0)
        ratio = tl.minimum(ratio, 1e30)  # a product with 0 stays 0
        so_far = tl.full((), 1.0, tl.float32)
        for k in range(stop):
            so_far = tl.minimum(1.0, so_far * pick(ratio, k, i))
            prefix_prob = tl.where(i == k + 1, so_far, prefix_prob)
        accepted = stop
    return Verdict(accepted, known.sampled & (stop > 0), prefix_prob)


@triton.jit
def select_block_length(
    i, rows, stop, prefix_prob, residual_ptr, num_blocks, seed, anchor, WIDTH: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """The largest index that passes, from P_i [WIDTH] and the residual sums of rows 0 .. stop - 1."""
    BLOCK: tl.constexpr = 64 if BLOCKS > 64 else BLOCKS
    total = tl.zeros([WIDTH], tl.int64)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)[None, :]
        inside = (i < stop)[:, None] & (block < num_blocks)
        total += tl.sum(tl.load(residual_ptr + rows[:, None] * num_blocks + block, mask=inside, other=0, volatile=True), axis=1)
    residual_prob = total.to(tl.float32) * (1.0 / RESIDUAL_ONE)
    rest = residual_prob + (1.0 - prefix_prob)
    u = uniform(acceptance_words(seed, anchor + i, anchor, ACCEPT))
    passes = tl.where(i < stop, (u * rest < residual_prob) | (rest <= 0.0), u < prefix_prob)
    return tl.max(tl.where(passes & (prefix_prob > 0.0) & (i >= 1) & (i <= stop), i, 0), axis=0)
