"""Lossless acceptance of a chain, in the words of its papers, over a source of coins and draws.

    token   (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318, algorithm 2):
            accept x_i while u_i q_i(x_i) < p_i(x_i); at the first failure draw from [p_i - q_i]+, else the bonus from p_{L+1}.
    block   (Sun et al., arXiv 2403.10444, algorithm 2): P_0 = 1, P_i = min(1, P_{i-1} p_i(x_i) / q_i(x_i));
            Z_i = sum_x [P_i p_{i+1}(x) - q_{i+1}(x)]+, h_i = Z_i / (Z_i + 1 - P_i) (0/0 = 1) for i < L, h_L = P_L;
            tau = the largest i with u_i < h_i (0 if none); draw from [P_tau p_{tau+1} - q_{tau+1}]+, or p_{L+1} if tau = L.
    coupled (Daliri et al., arXiv 2408.07978): y_i = argmax(log p_i + G_i) with the draft's own noise; accept while x_i = y_i, else
            emit y_i; after the last draft y_{L+1} is the bonus.
    greedy  accept while x_i = argmax p_i, then emit the arg-max.
    forced  (synthetic_rates, load tests) accept x_i while u_i < rate_i, then draw from p as after the last draft.

Symbols: p_i target law at draft i (after all sampling settings, reference/sampling.py) and q_i draft law (after temperature), x_i
drafts, L admitted drafts, u_i coins in (0, 1). Coins compare strictly, so that a coin of 0 accepts nothing impossible.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.types import Acceptance, DenseProposal, Flag, OneHotProposal, SamplingTensors, SparseProposal, VerifyLayout

from .decisions import Decisions
from .logits import inverse_temperature, read_logits
from .sampling import adjust, filtered
from .sources import PhiloxSource, Source


class Verdict(NamedTuple):
    """num_accepted drafts stay, then `token`. The rest says what the deciding draft and residual showed."""

    num_accepted: int
    token: int
    empty_residual: bool = False
    bad_draft: bool = False
    missing_draft: bool = False


def _chances(target_probs, draft_probs, draft: int) -> tuple[float, float, bool, bool]:
    """(target_prob, draft_prob, bad, missing) of a draft; both 0 where it cannot be accepted."""
    if draft == -1 or draft_probs is None:
        return 0.0, 0.0, False, True
    if not 0 <= draft < target_probs.shape[0]:
        return 0.0, 0.0, True, False
    draft_prob = float(draft_probs[draft])
    if draft_prob <= 0:
        return 0.0, 0.0, True, False
    return float(target_probs[draft]), draft_prob, False, False


def _correct(source: Source, position: int, weights: Tensor, target_probs: Tensor) -> tuple[int, bool]:
    """Draw from the residual, or from the target's law where the residual has no mass."""
    if float(weights.sum()) > 0:
        return source.draw(position, weights), False
    return source.draw(position, target_probs), True


def _residual(target_probs: Tensor, draft_probs: Tensor | None, kept: float = 1.0) -> Tensor:
    """[kept * target - draft]+; a draft that was never made takes nothing away."""
    if draft_probs is None:
        return kept * target_probs
    return (kept * target_probs - draft_probs).clamp(min=0)


def token_rule(target_probs, draft_probs, drafts: list[int], source: Source, anchor_position: int) -> Verdict:
    """Accept or reject each draft on its own coin, stop at the first failure."""
    for i, draft in enumerate(drafts):
        position = anchor_position + i + 1
        target_prob, draft_prob, bad, missing = _chances(target_probs[i], draft_probs[i], draft)
        possible = draft_prob > 0
        if possible and source.coin(position, draft_prob, target_prob):
            continue
        law = None if missing else draft_probs[i]
        token, empty = _correct(source, position, _residual(target_probs[i], law), target_probs[i])
        return Verdict(i, token, empty, bad, missing)
    return Verdict(len(drafts), source.draw(anchor_position + len(drafts) + 1, target_probs[len(drafts)]))


def block_rule(target_probs, draft_probs, drafts: list[int], source: Source, anchor_position: int) -> Verdict:
    """Judge the block as a whole: keep the longest prefix whose coin passes.

    A draft that cannot be accepted makes P zero from there on, so nothing behind it is ever kept.
    """
    length = len(drafts)
    kept = [1.0]
    shown = []
    for i, draft in enumerate(drafts):
        target_prob, draft_prob, bad, missing = _chances(target_probs[i], draft_probs[i], draft)
        shown.append((bad, missing))
        kept.append(min(1.0, kept[-1] * target_prob / draft_prob) if draft_prob > 0 else 0.0)
    accepted = 0
    for i in range(1, length + 1):
        if i < length:
            law = None if shown[i][1] else draft_probs[i]
            mass = float(_residual(target_probs[i], law, kept[i]).sum())
            rest = mass + 1.0 - kept[i]
            passes = source.coin(anchor_position + i, rest, mass) if rest > 0 else True
        else:
            passes = source.coin(anchor_position + i, 1.0, kept[i])
        if passes and kept[i] > 0:
            accepted = i
    position = anchor_position + accepted + 1
    if accepted == length:
        return Verdict(length, source.draw(position, target_probs[length]))
    bad, missing = shown[accepted]
    law = None if missing else draft_probs[accepted]
    residual = _residual(target_probs[accepted], law, kept[accepted])
    token, empty = _correct(source, position, residual, target_probs[accepted])
    return Verdict(accepted, token, empty, bad, missing)


def coupled_rule(target_probs, draft_probs, drafts: list[int], source: Source, anchor_position: int) -> Verdict:
    """Sample the target with the noise the drafts were drawn with; a draft is right or it is not."""
    for i in range(len(drafts) + 1):
        token = source.coupled(anchor_position + i + 1, target_probs[i].log())
        if i == len(drafts) or drafts[i] != token:
            missing = i < len(drafts) and drafts[i] == -1
            bad = i < len(drafts) and not missing and not 0 <= drafts[i] < target_probs[i].shape[0]
            return Verdict(i, token, False, bad, missing)
    raise AssertionError("the loop returns")


def greedy_rule(target_probs, draft_probs, drafts: list[int], source: Source, anchor_position: int) -> Verdict:
    """Follow the target's most probable token."""
    for i in range(len(drafts) + 1):
        token = int(torch.argmax((target_probs[i] == target_probs[i].max()).int()))
        if i == len(drafts) or drafts[i] != token:
            missing = i < len(drafts) and drafts[i] == -1
            bad = i < len(drafts) and not missing and not 0 <= drafts[i] < target_probs[i].shape[0]
            return Verdict(i, token, False, bad, missing)
    raise AssertionError("the loop returns")


def forced(rates, drafts: list[int], vocab: int, source: Source, anchor_position: int) -> tuple[int, bool, bool]:
    """(drafts accepted, bad, missing) by rate; only a token of the vocabulary can be accepted."""
    for i, draft in enumerate(drafts):
        inside = 0 <= draft < vocab
        if not (inside and source.coin(anchor_position + i + 1, 1.0, float(rates[i]))):
            return i, not inside and draft != -1, draft == -1
    return len(drafts), False, False


RULES = {"token": token_rule, "block": block_rule, "coupled": coupled_rule, "greedy": greedy_rule}


def law_of(logits: Tensor, scale: float) -> Tensor:
    """softmax(logits * scale) in fp64; a +inf takes all (its lowest id), a row of -inf has no mass."""
    top = float(logits.max())
    if top == math.inf:
        law = torch.zeros_like(logits)
        law[int(torch.argmax((logits == math.inf).int()))] = 1.0
        return law
    if top == -math.inf:
        return torch.zeros_like(logits)
    return torch.softmax((logits - top) * scale, 0)


def _draft_law(proposal, slot: int, i: int, draft: int, scale: float, vocab: int, device) -> Tensor | None:
    """The law draft i was drawn from over the target's ids; None where nothing was drawn (-1)."""
    if draft == -1:
        return None
    law = torch.zeros(vocab, dtype=torch.float64, device=device)
    temperature_scale = scale
    if proposal is not None and not isinstance(proposal, OneHotProposal) and proposal.temperature is not None:
        temperature_scale = inverse_temperature(float(proposal.temperature[slot]))
    if proposal is None or isinstance(proposal, OneHotProposal) or temperature_scale == 0:
        if 0 <= draft < vocab:
            law[draft] = 1.0
        return law
    logits, _ = read_logits(proposal.logits[slot, i])
    drawn = law_of(logits, temperature_scale)
    if isinstance(proposal, SparseProposal):
        ids = proposal.ids[slot, i].long()
        inside = (ids >= 0) & (ids < vocab)
        law.index_add_(0, ids[inside], drawn[inside])
    elif isinstance(proposal, DenseProposal) and proposal.draft_to_target is not None:
        inside = (proposal.draft_to_target >= 0) & (proposal.draft_to_target < vocab)
        law.index_add_(0, proposal.draft_to_target[inside], drawn[inside])
    else:
        width = min(vocab, drawn.shape[0])
        law[:width] = drawn[:width]
    return law


class _Rows:
    """Target laws of one request, computed when a rule asks for them."""

    def __init__(self, rows: list[Tensor], scale: float):
        self._rows, self._scale, self._laws = rows, scale, {}

    def __getitem__(self, i: int) -> Tensor:
        if i not in self._laws:
            self._laws[i] = law_of(self._rows[i], self._scale)
        return self._laws[i]


class _Laws:
    """Draft laws of one request, computed when a rule asks for them."""

    def __init__(self, make):
        self._make, self._laws = make, {}

    def __getitem__(self, i: int):
        if i not in self._laws:
            self._laws[i] = self._make(i)
        return self._laws[i]


def _greedy(rows: list[Tensor], drafts: list[int], decisions: Decisions, request: int) -> Verdict:
    """`greedy_rule` on logits, with the margin of every arg-max recorded."""
    vocab = rows[0].shape[0]
    for i, row in enumerate(rows):
        token = decisions.pick(request, "greedy", row)
        if i == len(drafts) or drafts[i] != token:
            missing = i < len(drafts) and drafts[i] == -1
            return Verdict(i, token, False, i < len(drafts) and not missing and not 0 <= drafts[i] < vocab, missing)
    raise AssertionError("the last row ends the chain")


def accept_chain(
    target_logits: Tensor,
    layout: VerifyLayout,
    proposal=None,
    *,
    sampling: SamplingTensors | None = None,
    rule: str = "token",
    logprobs: str | None = None,
    anchors: Tensor | None = None,
    anchor_positions: Tensor | None = None,
    synthetic_rates: Tensor | None = None,
    state_indices: Tensor | None = None,
    out: Acceptance | None = None,
    workspace=None,
    decisions: Decisions | None = None,
) -> Acceptance:
    """The op's arguments and result (dspark_kernels.ops.accept), plus `decisions` to record margins."""
    for name, value in (("out", out), ("workspace", workspace)):
        if value is not None:
            raise ValueError(f"{name}: expected None, the reference allocates its results, got {type(value).__name__}")
    if rule not in ("token", "block", "coupled"):
        raise ValueError(f"rule: expected one of 'token', 'block', 'coupled', got {rule!r}")
    if logprobs not in (None, "raw", "processed"):
        raise ValueError(f"logprobs: expected one of None, 'raw', 'processed', got {logprobs!r}")
    if synthetic_rates is not None and sampling is None:
        raise ValueError("sampling: expected SamplingTensors, whose seeds give the coins of synthetic_rates, got None")
    decisions = Decisions() if decisions is None else decisions
    device = target_logits.device
    batch, vocab = layout.draft_lens.shape[0], target_logits.shape[1]
    width = layout.max_drafts
    if width is None:
        logits = getattr(proposal, "base_logits", getattr(proposal, "logits", None))
        width = logits.shape[1] if logits is not None else max(target_logits.shape[0] - 1, 0)

    def ints():
        return torch.zeros(batch, dtype=torch.int32, device=device)

    accepted, emitted, rejected, last_row, flags = ints(), ints(), ints(), ints(), ints()
    tokens = torch.full((batch, width + 1), -1, dtype=torch.int64, device=device)
    next_token = torch.full((batch,), -1, dtype=torch.int64, device=device)
    log_probs = torch.zeros(batch, width + 1, dtype=torch.float64, device=device)
    commit = torch.zeros(layout.token_ids.shape[0], dtype=torch.bool, device=device)
    offsets, starts = layout.cu_num_logits.tolist(), layout.query_start_loc.tolist()
    row_of = layout.logits_indices.tolist()
    ids = layout.token_ids.tolist()
    for r in range(batch):
        slot = r if state_indices is None else int(state_indices[r])
        if slot < 0:
            continue
        first, length = offsets[r], offsets[r + 1] - offsets[r] - 1
        if length < 0:
            commit[starts[r] : starts[r + 1]] = True  # a prefill chunk that does not emit keeps its rows
            continue
        drafts = [ids[row_of[first + i]] for i in range(1, length + 1)]
        position = int(layout.positions[row_of[first]])
        raw = [target_logits[first + i] for i in range(length + 1)]
        # A row's own path: the drafts before it. fp32 as the kernels have it, because what is adjusted is an input of the rules.
        adjusted = [adjust(row.float(), sampling, slot, first + i, drafts[:i]) for i, row in enumerate(raw)]
        rows, row_flags = zip(*map(read_logits, adjusted), strict=True)
        # Acceptance stops at a row without finite logits: what is behind it is not looked at.
        stop = next((i for i in range(length + 1) if row_flags[i] & Flag.NONFINITE_ROW), None)
        judged = length if stop is None else stop
        temperature = float(sampling.temperature[slot]) if sampling is not None else 0.0
        rows = [filtered(row, inverse_temperature(temperature), sampling, slot, decisions, r) for row in rows]
        verdict = _judge(
            rows, drafts[:judged], stop, proposal, sampling, rule, slot, r, position, vocab, decisions, synthetic_rates
        )
        if stop is not None and verdict.num_accepted == stop:
            bad = stop < length and not (drafts[stop] == -1 or 0 <= drafts[stop] < vocab)
            asks = sampling is not None and rule != "coupled" and synthetic_rates is None
            if stop < length and 0 <= drafts[stop] < vocab and asks:
                scale = inverse_temperature(float(sampling.temperature[slot]))
                law = _draft_law(proposal, slot, stop, drafts[stop], scale, vocab, device)
                bad = scale > 0 and float(law[drafts[stop]]) <= 0
            lowest = int(torch.argmax((rows[stop] > -math.inf).int()))
            verdict = Verdict(stop, lowest, False, bad, stop < length and drafts[stop] == -1)
        n = verdict.num_accepted
        tokens[r, :n] = torch.tensor(drafts[:n], dtype=torch.int64, device=device)
        tokens[r, n] = next_token[r] = verdict.token
        accepted[r], emitted[r], rejected[r] = n, n + 1, length - n
        if logprobs is not None:
            scale = inverse_temperature(float(sampling.temperature[slot])) if sampling is not None else 0.0
            for i in range(n + 1):
                row = read_logits(raw[i])[0] if logprobs == "raw" else rows[i]
                log_probs[r, i] = _log_prob(row, int(tokens[r, i]), 1.0 if logprobs == "raw" else scale)
        last_row[r] = row_of[first + n]
        commit[starts[r] : starts[r + 1]] = torch.arange(starts[r], starts[r + 1], device=device) <= int(last_row[r])
        flags[r] = (
            (Flag.NAN if any(f & Flag.NAN for f in row_flags[: n + 1]) else 0)
            | (row_flags[n] & Flag.NONFINITE_ROW)
            | (Flag.BAD_TOKEN_ID if verdict.bad_draft else 0)
            | (Flag.MISSING_DRAFT if verdict.missing_draft else 0)
            | (Flag.EMPTY_RESIDUAL if verdict.empty_residual else 0)
        )
        if anchors is not None:
            anchors[slot] = verdict.token
        if anchor_positions is not None:
            anchor_positions[slot] = position + n + 1
    log_probs = log_probs.float() if logprobs is not None else None
    return Acceptance(tokens, accepted, emitted, rejected, next_token, last_row, commit, flags, log_probs)


def _log_prob(row: Tensor, token: int, scale: float) -> float:
    """ln of the token's probability, -inf where it has none; scale 0 = greedy, whose law is the first maximum alone."""
    if scale == 0:
        return 0.0 if row[token] > -math.inf and token == int(torch.argmax((row == row.max()).int())) else -math.inf
    if float(row.max()) == math.inf:
        return 0.0 if row[token] == math.inf else -math.inf
    if float(row.max()) == -math.inf:
        return -math.inf
    return float(torch.log_softmax((row - row.max()) * scale, 0)[token])


def _after(row, rule, request, position, decisions, source, scale) -> int:
    """The token after the last accepted draft of a load test: what the rule would give as a bonus."""
    if scale == 0:
        return decisions.pick(request, "greedy", row)
    law = law_of(row, scale)
    return source.coupled(position, law.log()) if rule == "coupled" else source.draw(position, law)


def _judge(rows, drafts, stop, proposal, sampling, rule, slot, request, position, vocab, decisions, rates) -> Verdict:
    """Apply the rule to the rows before `stop` (None = all); where all those drafts pass, the caller emits at `stop`."""
    scale = inverse_temperature(float(sampling.temperature[slot])) if sampling is not None else 0.0
    if stop is not None:
        # The row at `stop` judges nothing: a stand-in law lets the rule end there.
        rows = (*rows[:stop], torch.zeros_like(rows[0]))
    if rates is not None:
        source = PhiloxSource(int(sampling.seed[slot]), position, decisions, request)
        accepted, bad, missing = forced(rates, drafts, vocab, source, position)
        rest = _after(rows[accepted], rule, request, position + accepted + 1, decisions, source, scale)
        return Verdict(accepted, rest, False, bad, missing)
    if scale == 0:
        return _greedy(list(rows), drafts, decisions, request)
    source = PhiloxSource(int(sampling.seed[slot]), position, decisions, request)
    laws = _Laws(lambda i: _draft_law(proposal, slot, i, drafts[i], scale, vocab, rows[0].device))
    return RULES[rule](_Rows(list(rows), scale), laws, drafts, source, position)
