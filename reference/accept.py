"""Lossless acceptance of a chain, rule by rule as in the papers, over a source of acceptance uniforms and draws.

    token   (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318, algorithm 2):
            accept x_i while u_i q_i(x_i) < p_i(x_i); at the first failure draw from [p_i - q_i]+, else the bonus from p_{L+1}.
    block   (Sun et al., arXiv 2403.10444, algorithm 2): P_0 = 1, P_i = min(1, P_{i-1} p_i(x_i) / q_i(x_i));
            Z_i = sum_x [P_i p_{i+1}(x) - q_{i+1}(x)]+, h_i = Z_i / (Z_i + 1 - P_i) (0/0 = 1) for i < L, h_L = P_L;
            tau = the largest i with u_i < h_i (0 if none); draw from [P_tau p_{tau+1} - q_{tau+1}]+, or p_{L+1} if tau = L.
    coupled (Daliri et al., arXiv 2408.07978): y_i = argmax(log p_i + G_i) with the draft's own noise; accept while x_i = y_i, else
            emit y_i; after the last draft y_{L+1} is the bonus.
    greedy  accept while x_i = argmax p_i, then emit the arg-max.
    forced  (synthetic_rates, load tests) accept x_i while u_i < rate_i, then draw from p as after the last draft.

Symbols: p_i target distribution at draft i (after all sampling settings, reference/sampling.py) and q_i draft distribution (after
temperature), x_i drafts, L admitted drafts, P_i prefix probability, u_i acceptance uniforms in (0, 1). Comparisons are strict, so
that u = 0 accepts nothing of probability 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.types import Acceptance, Flag, SamplingTensors, VerifyLayout

from .decisions import Decisions
from .distributions import Lazy, distribution_of, draft_distribution, log_prob
from .layout import refuse_lone_anchors
from .logits import inverse_temperature, read_logits, refuse_repeated
from .sampling import adjust, filtered, of_scaled_target
from .sources import PhiloxSource, Source


class Verdict(NamedTuple):
    """num_accepted drafts stay, then `token`. The flags describe the first rejected draft and its residual."""

    num_accepted: int
    token: int
    empty_residual: bool = False
    bad_draft: bool = False
    missing_draft: bool = False


class DraftCheck(NamedTuple):
    """Both probabilities of a draft (0 where it cannot be accepted), and why it cannot be."""

    target_prob: float
    draft_prob: float
    bad: bool = False
    missing: bool = False


def _check(target_probs: Tensor, draft_probs: Tensor | None, draft: int) -> DraftCheck:
    if draft == -1 or draft_probs is None:
        return DraftCheck(0.0, 0.0, missing=True)
    if not 0 <= draft < target_probs.shape[0]:
        return DraftCheck(0.0, 0.0, bad=True)
    draft_prob = float(draft_probs[draft])
    if draft_prob <= 0:
        return DraftCheck(0.0, 0.0, bad=True)
    return DraftCheck(float(target_probs[draft]), draft_prob)


def _residual(target_probs: Tensor, draft_probs: Tensor | None, prefix_prob: float = 1.0) -> Tensor:
    """[prefix_prob * target - draft]+; without a draft distribution nothing is subtracted."""
    if draft_probs is None:
        return prefix_prob * target_probs
    return (prefix_prob * target_probs - draft_probs).clamp(min=0)


def _reject(source: Source, anchor_position: int, i: int, residual: Tensor, target_probs: Tensor, check: DraftCheck) -> Verdict:
    """Draw the correction after i accepted drafts; from the target distribution where the residual is zero everywhere."""
    empty = not float(residual.sum()) > 0
    token = source.draw(anchor_position + i + 1, target_probs if empty else residual)
    return Verdict(i, token, empty, check.bad, check.missing)


def token_rule(target_probs, draft_probs, drafts: list[int], source: Source, anchor_position: int) -> Verdict:
    """Accept each draft on its own uniform, and stop at the first rejection."""
    for i, draft in enumerate(drafts):
        check = _check(target_probs[i], draft_probs[i], draft)
        possible = check.draft_prob > 0
        if possible and source.accepts(anchor_position + i + 1, check.draft_prob, check.target_prob):
            continue
        residual = _residual(target_probs[i], None if check.missing else draft_probs[i])
        return _reject(source, anchor_position, i, residual, target_probs[i], check)
    return Verdict(len(drafts), source.draw(anchor_position + len(drafts) + 1, target_probs[len(drafts)]))


def block_rule(target_probs, draft_probs, drafts: list[int], source: Source, anchor_position: int) -> Verdict:
    """Verify the block as a whole: accept the longest prefix whose uniform passes.

    A draft that cannot be accepted makes P zero from there on, so that no longer prefix is accepted.
    """
    length = len(drafts)
    prefix_probs = [1.0]
    checks = []
    for i, draft in enumerate(drafts):
        check = _check(target_probs[i], draft_probs[i], draft)
        checks.append(check)
        grown = prefix_probs[-1] * check.target_prob / check.draft_prob if check.draft_prob > 0 else 0.0
        prefix_probs.append(min(1.0, grown))

    def residual(i: int) -> Tensor:
        return _residual(target_probs[i], None if checks[i].missing else draft_probs[i], prefix_probs[i])

    accepted = 0
    for i in range(1, length + 1):
        if i < length:
            residual_sum = float(residual(i).sum())
            denominator = residual_sum + 1.0 - prefix_probs[i]
            passes = source.accepts(anchor_position + i, denominator, residual_sum) if denominator > 0 else True
        else:
            passes = source.accepts(anchor_position + i, 1.0, prefix_probs[i])
        if passes and prefix_probs[i] > 0:
            accepted = i
    if accepted == length:
        return Verdict(length, source.draw(anchor_position + length + 1, target_probs[length]))
    return _reject(source, anchor_position, accepted, residual(accepted), target_probs[accepted], checks[accepted])


def _matched(drafts: list[int], vocab: int, emit) -> Verdict:
    """Accept while the draft is the token that emit(i) gives for its place."""
    for i in range(len(drafts) + 1):
        token = emit(i)
        if i == len(drafts):
            return Verdict(i, token)
        if drafts[i] != token:
            missing = drafts[i] == -1
            return Verdict(i, token, False, not missing and not 0 <= drafts[i] < vocab, missing)
    raise AssertionError("the loop returns")


def coupled_rule(target_probs, draft_probs, drafts: list[int], source: Source, anchor_position: int) -> Verdict:
    """Sample the target with the noise that the drafts were drawn with, and accept the drafts that match."""
    vocab = target_probs[0].shape[0]
    return _matched(drafts, vocab, lambda i: source.coupled(anchor_position + i + 1, target_probs[i].log()))


def greedy_rule(target_probs, draft_probs, drafts: list[int], source: Source, anchor_position: int) -> Verdict:
    """Follow the target's most probable token."""
    vocab = target_probs[0].shape[0]
    return _matched(drafts, vocab, lambda i: int(torch.argmax((target_probs[i] == target_probs[i].max()).int())))


RULES = {"token": token_rule, "block": block_rule, "coupled": coupled_rule, "greedy": greedy_rule}


class Chain(NamedTuple):
    """One request: its drafts and the target rows that verify them."""

    request: int  # batch row
    slot: int
    drafts: list[int]  # L admitted drafts
    position: int  # of the anchor
    rows: list[Tensor]  # L + 1 target rows, fp64 [V], after all sampling settings but temperature
    scale: float  # 1 / temperature, 0: greedy
    stop: int | None  # the first row without a finite logit; drafts behind it are not looked at


class Call(NamedTuple):
    """What all requests of a call share."""

    proposal: object
    sampling: SamplingTensors | None
    rule: str
    rates: Tensor | None  # synthetic_rates
    decisions: Decisions

    def draft_probs(self, chain: Chain, i: int) -> Tensor | None:
        row = chain.rows[0]
        return draft_distribution(
            self.proposal, chain.slot, i, chain.drafts[i], scale=chain.scale, vocab=row.shape[0], device=row.device
        )  # fmt: skip


def accept_chain(
    target_logits: Tensor,
    layout: VerifyLayout,
    proposal=None,
    *,
    sampling: SamplingTensors | None = None,
    rule: str = "token",
    target_scaled: bool = False,
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
    refuse_lone_anchors(anchors, anchor_positions)
    refuse_repeated(getattr(proposal, "draft_to_target", None), target_logits.shape[1])
    if logprobs not in (None, "raw", "processed"):
        raise ValueError(f"logprobs: expected one of None, 'raw', 'processed', got {logprobs!r}")
    if synthetic_rates is not None and sampling is None:
        raise ValueError("sampling: expected SamplingTensors, whose seeds give the uniforms of synthetic_rates, got None")
    if target_scaled:
        sampling, proposal = of_scaled_target(sampling, proposal)
    call = Call(proposal, sampling, rule, synthetic_rates, Decisions() if decisions is None else decisions)
    result = _empty_result(target_logits, layout, proposal, logprobs)
    offsets, starts = layout.cu_num_logits.tolist(), layout.query_start_loc.tolist()
    row_of = layout.logits_indices.tolist()
    ids = layout.token_ids.tolist()
    for r in range(layout.draft_lens.shape[0]):
        slot = r if state_indices is None else int(state_indices[r])
        if slot < 0:
            continue
        first, length = offsets[r], offsets[r + 1] - offsets[r] - 1
        if length < 0:
            result.commit_mask[starts[r] : starts[r + 1]] = True  # a prefill chunk that does not emit keeps its rows
            continue
        drafts = [ids[row_of[first + i]] for i in range(1, length + 1)]
        raw = [target_logits[first + i] for i in range(length + 1)]
        # A row's own path: the drafts before it. fp32 as the kernels have it, because what is adjusted is an input of the rules.
        adjusted = [adjust(row.float(), sampling, slot, first + i, drafts[:i]) for i, row in enumerate(raw)]
        rows, row_flags = zip(*map(read_logits, adjusted), strict=True)
        scale = inverse_temperature(float(sampling.temperature[slot])) if sampling is not None else 0.0
        rows = [filtered(row, scale, sampling, slot, call.decisions, r) for row in rows]
        stop = next((i for i in range(length + 1) if row_flags[i] & Flag.NONFINITE_ROW), None)
        chain = Chain(r, slot, drafts, int(layout.positions[row_of[first]]), rows, scale, stop)
        verdict = _verify(chain, call)
        n = verdict.num_accepted
        result.tokens[r, : n + 1] = torch.tensor([*drafts[:n], verdict.token], dtype=torch.int64)
        result.next_token[r] = verdict.token
        result.num_accepted[r], result.num_emitted[r], result.num_rejected[r] = n, n + 1, length - n
        if logprobs is not None:
            for i in range(n + 1):
                row = read_logits(raw[i])[0] if logprobs == "raw" else rows[i]
                result.logprobs[r, i] = log_prob(row, int(result.tokens[r, i]), 1.0 if logprobs == "raw" else scale)
        result.last_row[r] = row_of[first + n]
        result.commit_mask[starts[r] : min(starts[r + 1], row_of[first + n] + 1)] = True
        result.flags[r] = (
            (Flag.NAN if any(f & Flag.NAN for f in row_flags[: n + 1]) else 0)
            | (row_flags[n] & Flag.NONFINITE_ROW)
            | (Flag.BAD_TOKEN_ID if verdict.bad_draft else 0)
            | (Flag.MISSING_DRAFT if verdict.missing_draft else 0)
            | (Flag.EMPTY_RESIDUAL if verdict.empty_residual else 0)
        )
        if anchors is not None:
            anchors[slot] = verdict.token
        if anchor_positions is not None:
            anchor_positions[slot] = chain.position + n + 1
    return result


def _empty_result(target_logits: Tensor, layout: VerifyLayout, proposal, logprobs: str | None) -> Acceptance:
    """What a batch of padding rows gives: no token, nothing accepted, no row committed."""
    width = layout.max_drafts
    if width is None:
        logits = getattr(proposal, "base_logits", getattr(proposal, "logits", None))
        width = logits.shape[1] if logits is not None and logits.dim() == 3 else max(target_logits.shape[0] - 1, 0)
    batch, device = layout.draft_lens.shape[0], target_logits.device
    counts = ("num_accepted", "num_emitted", "num_rejected", "last_row", "flags")
    return Acceptance(
        tokens=torch.full((batch, width + 1), -1, dtype=torch.int64, device=device),
        **{name: torch.zeros(batch, dtype=torch.int32, device=device) for name in counts},
        next_token=torch.full((batch,), -1, dtype=torch.int64, device=device),
        commit_mask=torch.zeros(layout.token_ids.shape[0], dtype=torch.bool, device=device),
        logprobs=None if logprobs is None else torch.zeros(batch, width + 1, device=device),
    )


def _verify(chain: Chain, call: Call) -> Verdict:
    """Apply the rule to one request, up to the first row without a finite logit."""
    if chain.stop is None:
        return _apply_rule(chain, chain.drafts, chain.rows, call)
    # The row at `stop` verifies nothing: any row in its place lets the rule end there.
    rows = [*chain.rows[: chain.stop], torch.zeros_like(chain.rows[0])]
    verdict = _apply_rule(chain, chain.drafts[: chain.stop], rows, call)
    return _emit_at_stop(chain, call) if verdict.num_accepted == chain.stop else verdict


def _emit_at_stop(chain: Chain, call: Call) -> Verdict:
    """All drafts before `stop` were accepted: emit the lowest +inf of that row, or token 0 where it has none."""
    stop, vocab = chain.stop, chain.rows[0].shape[0]
    bad = missing = False
    if stop < len(chain.drafts):
        draft = chain.drafts[stop]
        missing = draft == -1
        if not 0 <= draft < vocab:
            bad = not missing
        elif call.sampling is not None and call.rule != "coupled" and call.rates is None:
            bad = chain.scale > 0 and float(call.draft_probs(chain, stop)[draft]) <= 0
    lowest = int(torch.argmax((chain.rows[stop] > -math.inf).int()))
    return Verdict(stop, lowest, False, bad, missing)


def _apply_rule(chain: Chain, drafts: list[int], rows: list[Tensor], call: Call) -> Verdict:
    """The verdict on `drafts` [l] by `rows` [l + 1]."""
    vocab, scale, decisions = rows[0].shape[0], chain.scale, call.decisions
    if scale == 0 and call.rates is None:
        return _matched(drafts, vocab, lambda i: decisions.pick(chain.request, "greedy", rows[i]))
    source = PhiloxSource(int(call.sampling.seed[chain.slot]), chain.position, decisions, chain.request)
    if call.rates is not None:
        return _forced(chain, drafts, rows, call, source)
    target_probs = Lazy(lambda i: distribution_of(rows[i], scale))
    draft_probs = Lazy(lambda i: call.draft_probs(chain, i))
    return RULES[call.rule](target_probs, draft_probs, drafts, source, chain.position)


def _forced(chain: Chain, drafts: list[int], rows: list[Tensor], call: Call, source: Source) -> Verdict:
    """Accept by rate, then emit what the rule would give as a bonus. Only a token of the vocabulary can be accepted."""
    accepted, vocab = 0, rows[0].shape[0]
    for draft in drafts:
        inside = 0 <= draft < vocab
        if not (inside and source.accepts(chain.position + accepted + 1, 1.0, float(call.rates[accepted]))):
            break
        accepted += 1
    row, position = rows[accepted], chain.position + accepted + 1
    if chain.scale == 0:
        token = call.decisions.pick(chain.request, "greedy", row)
    elif call.rule == "coupled":
        token = source.coupled(position, distribution_of(row, chain.scale).log())
    else:
        token = source.draw(position, distribution_of(row, chain.scale))
    if accepted == len(drafts):
        return Verdict(accepted, token)
    missing = drafts[accepted] == -1
    return Verdict(accepted, token, False, not missing and not 0 <= drafts[accepted] < vocab, missing)
