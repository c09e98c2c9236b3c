"""Which drafts the target verifies, and the packed rows of its forward pass, in plain Python integers.

    survival a_{r,k} = product of c_{r,i} for i <= k,  throughput(n) = tau_n / cost(B_n)
    admit the n-th candidate while tau_n * cost(B_{n-1}) > tau_{n-1} * cost(B_n)          (policy "causal")

Symbols: R requests, K drafts per request, c calibrated confidences, B rows of the target's pass (anchors, prefill rows
and admitted drafts), tau expected emitted tokens (one per request that emits, plus the admitted survivals), cost(B) the
time of a step with B rows.

Integers. survival = floor(a * 2^24), where a is the left-to-right product of the confidences, each product rounded to
fp32; tau counts in units of 2^-24; cost is in units of 100 ns, between 1 and 2^24 - 1 (about 1.68 s). Every comparison
is exact.

Source: "DSpark: Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation", arXiv 2607.05147,
algorithm 1. Whether draft k is verified depends on nothing that was computed from draft k or later ones, which keeps
both policies lossless. (A missing draft, id below 0, does not count: nothing was proposed there that could be verified.)
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dspark_kernels.types import CostTable, DraftBlock, Flag, VerifyLayout

from .layout import Request, assemble, capacity_of, present, read_requests, refuse_buffers, slots_of, verify_rows

SURVIVAL_ONE = 1 << 24
COST_LIMIT = (1 << 24) - 1
COST_UNITS_PER_SECOND = 1e7
_BYPASS_ONE = 1 << 20
POLICIES = ("causal", "budget")


def survival_units(confidence: Tensor) -> Tensor:
    """Survival of each draft as floor(a * 2^24), int64 of the shape of `confidence` [R, K].

    Confidences are read as fp32 and clamped to [0, 1], NaN as 0. The product runs left to right and is rounded to fp32
    after each factor, so that it never rises along a request and every machine gets the same integer.
    """
    factors = confidence.detach().cpu().float().nan_to_num(nan=0.0).clamp(0.0, 1.0)
    product = torch.ones(factors.shape[:-1], dtype=torch.float32)
    units = torch.empty(factors.shape, dtype=torch.int64)
    for k in range(factors.shape[-1]):
        product = product * factors[..., k]
        units[..., k] = (product * SURVIVAL_ONE).floor().long()
    return units


def cost_units(seconds: Tensor) -> list[int]:
    """A table of seconds as integers of 100 ns.

    seconds * 1e7 is rounded once to fp32, then to the nearest integer (halves up), then clamped to [1, 2^24 - 1]. NaN
    becomes the largest cost: an entry that nobody measured never looks cheap.
    """
    limit = float(COST_LIMIT)
    scaled = seconds.detach().cpu().float() * COST_UNITS_PER_SECOND
    scaled = scaled.nan_to_num(nan=limit, posinf=limit, neginf=1.0).clamp(1.0, limit)
    whole = scaled.floor()
    return (whole + (scaled - whole >= 0.5)).long().tolist()


def _entry(table: list[int], index: int) -> int:
    """Entry `index`, beyond the end on the line through the last two measured entries.

    Entry 0 is no measurement, so a table with a single measured entry goes on flat; so does one that ends falling,
    because a cost that sinks for ever is noise of the last entry.
    """
    last = len(table) - 1
    if index <= last:
        return table[index]
    slope = max(0, table[last] - table[last - 1]) if last >= 2 else 0
    return min(COST_LIMIT, table[last] + (index - last) * slope)


class StepCost:
    """Cost of a step by its number of rows, in units of 100 ns: target step plus, where known, drafting."""

    def __init__(self, table: CostTable, drafting_requests: int):
        self._steps = cost_units(table.seconds)
        self._drafting = 0
        if table.draft_seconds is not None and drafting_requests > 0:
            self._drafting = _entry(cost_units(table.draft_seconds), drafting_requests)

    def __call__(self, rows: int) -> int:
        return min(COST_LIMIT, _entry(self._steps, rows) + self._drafting)


@dataclasses.dataclass(frozen=True)
class _Draft:
    """One draft that may be admitted; `rank` orders admission."""

    forced: bool
    survival: int
    position: int
    request: int

    @property
    def rank(self):
        return (not self.forced, 0 if self.forced else -self.survival, self.position, self.request)


def threshold_lengths(confidence: Tensor, threshold: float) -> Tensor:
    """Number of leading drafts before the first whose confidence is below `threshold`: int32 [R] from [R, K].

    Each confidence is compared on its own, not the product. 0 verifies the whole block; NaN is below every positive
    threshold.
    """
    if not threshold > 0:
        return torch.full(confidence.shape[:1], confidence.shape[1], dtype=torch.int32, device=confidence.device)
    return (confidence >= threshold).int().cumprod(1).sum(1).int()


def schedule_prefixes(
    block: DraftBlock,
    cost: CostTable | None,
    *,
    anchors: Tensor,
    anchor_positions: Tensor,
    policy: str = "causal",
    budget: Tensor | None = None,
    stale_confidence: Tensor | None = None,
    min_len: int = 0,
    max_len: int | Tensor | None = None,
    max_rows: int | None = None,
    num_prefill_tokens: Tensor | None = None,
    emits: Tensor | None = None,
    survival_floor: float = 0.0,
    bypass: float | None = None,
    block_tables: Tensor | None = None,
    page_size: int | None = None,
    state_indices: Tensor | None = None,
    out=None,
    workspace=None,
) -> VerifyLayout:
    """From confidences to draft lengths and packed rows.

    block: tokens and confidence [S, K]; cost: CostTable (None where nothing reads it: a given budget without bypass).
    All other tensors, and what becomes of rows, as in `fixed_layout`.

    Candidates are the drafts of requests that decode and emit, up to max_len (int, or int [R]) and before the first
    draft below 0 (MISSING_DRAFT), with survival > 0 and not below floor(survival_floor * 2^24). They are taken by
    survival, descending, ties by position, then by request; so a request's admitted drafts are always a prefix. The
    first min_len drafts of each request come before all others, by position, then request, whatever their survival, and
    are not tested. Nothing is admitted beyond max_rows rows in all.

    policy "causal": one by one, until the first that does not raise tau / cost. policy "budget": the best `budget`
    drafts (int32 [1]; the min_len drafts count, and are taken even where there are more of them); or, with
    stale_confidence fp32 [S, K], the number of drafts that maximises tau / cost under those older confidences (the
    smallest such number). That number does not read this round's block at all. bypass: with delta >= 0, the confidences
    are set aside and every draft is verified when all of them fit and cost(B + K per drafting request) <= (1 + delta) *
    cost(B), B the anchor and prefill rows; delta counts in 2^-20, rounded up.

    A NaN confidence (this round's or stale) counts as 0 and is flagged NAN.
    """
    refuse_buffers(out, workspace)
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(map(repr, POLICIES))}, got {policy!r}")
    if block.confidence is None:
        raise ValueError("block.confidence: expected fp32 [S, K], got None")
    if policy == "causal" and not (budget is None and stale_confidence is None):
        raise ValueError("budget: expected None (and no stale_confidence) with policy 'causal', got a tensor")
    if policy == "budget" and (budget is None) == (stale_confidence is None):
        raise ValueError("budget: expected either budget or stale_confidence with policy 'budget', got both or neither")
    if cost is None and not (policy == "budget" and budget is not None and bypass is None):
        raise TypeError("cost: expected a CostTable, got None")
    if min_len < 0:
        raise ValueError(f"min_len: expected >= 0, got {min_len}")
    if not 0.0 <= survival_floor <= 1.0:
        raise ValueError(f"survival_floor: expected a number in [0, 1], got {survival_floor}")
    if bypass is not None and not 0.0 <= bypass < math.inf:
        raise ValueError(f"bypass: expected a finite number >= 0, got {bypass}")

    state_slots, drafts = block.tokens.shape
    slots = slots_of(state_indices, state_slots, state_slots)
    requests = read_requests(block.tokens, anchors, anchor_positions, slots, num_prefill_tokens, emits)
    capacity = capacity_of(max_rows, len(slots), drafts)
    caps = _length_caps(requests, drafts, max_len)
    rows = sum(request.fixed_rows for request in requests)
    drafting = sum(request.takes_drafts for request in requests)
    tau = SURVIVAL_ONE * sum(request.slot is not None and request.emits for request in requests)
    step_cost = None if cost is None else StepCost(cost, drafting)
    with_all = rows + drafting * drafts
    if bypass is not None and drafting and with_all <= capacity and _cheap_to_verify(step_cost, rows, with_all, bypass):
        min_len = drafts

    least = max(1, math.floor(survival_floor * SURVIVAL_ONE))
    room = max(0, capacity - rows)
    flags = _nan_flags(requests, block.confidence, stale_confidence)
    limits = []
    for index, request in enumerate(requests):
        length, flag = present(request, caps[index])
        limits.append(length)
        flags[index] |= flag
    candidates = _candidates(requests, survival_units(block.confidence), limits, min_len, least)[:room]
    if policy == "causal":
        number = _first_that_does_not_pay(candidates, step_cost, tau, rows)
    elif budget is not None:
        number = max(int(budget.item()), sum(draft.forced for draft in candidates))
    else:
        older = _candidates(requests, survival_units(stale_confidence), caps, min_len, least)[:room]
        # Of the first min_len drafts, this round may have fewer than the plan counted (missing ones), never more.
        number = _best_number(older, step_cost, tau, rows)
    lengths = [0] * len(requests)
    for draft in candidates[:number]:
        lengths[draft.request] += 1
    parts = verify_rows(requests, lengths, flags, capacity)
    return assemble(parts, capacity, drafts, block.tokens.device, block_tables, page_size)


def _length_caps(requests: list[Request], drafts: int, max_len: int | Tensor | None) -> list[int]:
    caps = [drafts] * len(requests)
    if isinstance(max_len, Tensor):
        caps = [max(0, min(drafts, cap)) for cap in max_len.tolist()]
    elif max_len is not None:
        if max_len < 0:
            raise ValueError(f"max_len: expected >= 0, got {max_len}")
        caps = [min(drafts, max_len)] * len(requests)
    return [cap if request.takes_drafts else 0 for cap, request in zip(caps, requests, strict=True)]


def _nan_flags(requests: list[Request], *confidences: Tensor | None) -> list[int]:
    flags = [0] * len(requests)
    for confidence in confidences:
        if confidence is None:
            continue
        has_nan = confidence.isnan().any(1).tolist()
        for index, request in enumerate(requests):
            if request.takes_drafts and has_nan[request.slot]:
                flags[index] = int(Flag.NAN)
    return flags


def _candidates(requests, survival: Tensor, limits: list[int], min_len: int, least: int) -> list[_Draft]:
    """Drafts that may be admitted, in the order of admission. survival: int64 [S, K] by slot."""
    by_slot = survival.tolist()
    found = []
    for index, request in enumerate(requests):
        for k in range(limits[index]):
            units = by_slot[request.slot][k]
            forced = k < min_len
            if forced or units >= least:
                found.append(_Draft(forced, units, k + 1, index))
    return sorted(found, key=lambda draft: draft.rank)


def _first_that_does_not_pay(candidates: list[_Draft], cost: StepCost, tau: int, rows: int) -> int:
    for number, draft in enumerate(candidates):
        pays = (tau + draft.survival) * cost(rows) > tau * cost(rows + 1)
        if not (draft.forced or pays):
            return number
        tau += draft.survival
        rows += 1
    return len(candidates)


def _best_number(candidates: list[_Draft], cost: StepCost, tau: int, rows: int) -> int:
    best, best_tau, best_cost = None, 0, 1
    for number in range(len(candidates) + 1):
        if number:
            tau += candidates[number - 1].survival
        if number < len(candidates) and candidates[number].forced:
            continue
        step = cost(rows + number)
        if best is None or tau * best_cost > best_tau * step:
            best, best_tau, best_cost = number, tau, step
    return best


def _cheap_to_verify(cost: StepCost, rows: int, rows_with_all: int, delta: float) -> bool:
    allowed = _BYPASS_ONE + math.ceil(delta * _BYPASS_ONE)
    return cost(rows_with_all) * _BYPASS_ONE <= cost(rows) * allowed
