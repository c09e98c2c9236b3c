"""Scheduling on the host: the same budget as on the device, for choosing a graph bucket, and the confidences it comes from.

    budget = the smallest n that maximises tau_n / cost(B + n), tau_n = emitting requests + the n largest survivals
    node_budgets: the n nodes of greatest older survival, for trees
    survival a_{r,k} = product of c_{r,i} for i <= k

Symbols: S request slots, R requests, K drafts, B anchor and prompt rows. The integers are those of `schedule_prefixes`: survival
floor(a 2^24) with a product rounded to fp32 after each factor, cost in 100 ns, tau in 2^-24, so host and device agree exactly.
Source: DSpark, arXiv 2607.05147, asynchronous scheduling: confidences of two rounds ago decide how much is verified now, so that
the engine knows the size of its next step without waiting for the drafts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .checks import INT_DTYPES, check_choice, check_device, check_int, check_number, check_optional, check_tensor, check_type
from .choices import POLICIES, Policy
from .cost import COST_LIMIT, UNITS_PER_SECOND, CostTable
from .types import DraftBlock

UNIT = 1 << 24  # of survival and tau
FORCED = 1 << 25  # above every survival
_BYPASS_UNIT = 1 << 20


# --- the budget -------------------------------------------------------------------------------------------------------


def plan_budget(
    stale_confidence: Tensor,
    cost: CostTable,
    *,
    min_len: int = 0,
    max_len: int | Tensor | None = None,
    max_rows: int | None = None,
    num_prefill_tokens: Tensor | None = None,
    emits: Tensor | None = None,
    survival_floor: float = 0.0,
    bypass: float | None = None,
    state_indices: Tensor | None = None,
) -> int:
    """Drafts of the whole batch that are worth verifying under older confidences: what `schedule_prefixes` takes as `budget`.

    Args:
        stale_confidence: fp32 [S, K] on the CPU (`ConfidenceHistory.on_host()`), 1.0 for new requests, NaN = 0.
        cost: on the CPU.
        The others: as in `schedule_prefixes`, tensors on the CPU.

    Without max_rows there is no cap. The step has at most B + plan_budget(...) rows, B the anchor and prompt rows.
    `schedule_prefixes(policy="budget", stale_confidence=...)` admits as many on the device.

    Raises:
        TypeError, ValueError: an argument of the wrong type, value, dtype, shape or device.
    """
    _, number = _plan(
        "stale_confidence", stale_confidence, cost, "budget", min_len, max_len, max_rows, num_prefill_tokens, emits,
        survival_floor, bypass, state_indices,
    )  # fmt: skip
    return number


def node_budgets(
    stale_survival: Tensor, budget: int | Tensor, *, max_nodes: int | None = None, state_indices: Tensor | None = None
) -> Tensor:
    """Nodes of every request's next tree, int32 [R]: what `draft_tree` takes as `node_budgets`.

    Args:
        stale_survival: fp32 [S, M], `DraftTree.survival` of older rounds, 1.0 in every node for a new request. NaN = 0.
        budget: nodes of the whole batch, the anchors included: an int, or int32 [1] on the device.
        max_nodes: of one request, M where None.
        state_indices: int32 or int64 [R], request slot of each row, -1 = a padding row (0 nodes).

    The `budget` best nodes of all requests, ties by request, then node; at least the anchor of each. A node's survival counts as
    no more than those of the nodes before it, and one of 0 is never taken. No synchronisation, no shape that depends on data.
    Nothing of the round whose trees the budgets cut may be in `stale_survival`: a cut that looks at the tokens it cuts is biased.

    Raises:
        TypeError, ValueError: an argument of the wrong type, value, dtype, shape or device.
    """
    slots, nodes = check_tensor("stale_survival", stale_survival, dtype=torch.float32, shape=("S", "M")).shape
    device = stale_survival.device
    check_optional("state_indices", state_indices, dtype=INT_DTYPES, shape=("R",), device=device)
    if isinstance(budget, Tensor):
        check_tensor("budget", budget, dtype=INT_DTYPES, shape=(1,), device=device)
    else:
        check_int("budget", budget, low=0)
    room = check_int("max_nodes", nodes if max_nodes is None else max_nodes, low=1)
    slot_of = torch.arange(slots, device=device) if state_indices is None else state_indices.long()
    live = (slot_of >= 0) & (slot_of < slots)
    if nodes == 0 or slots == 0:
        return live.to(torch.int32)
    reached = stale_survival.nan_to_num(0.0)[slot_of.clamp(0, slots - 1)].cummin(1).values
    reached[:, 0] = torch.inf  # every anchor has a row
    reached[:, room:] = 0.0
    reached = torch.where(live[:, None], reached, 0.0).flatten()
    order = torch.argsort(reached, descending=True, stable=True)
    taken = torch.zeros_like(order, dtype=torch.bool)
    taken[order] = torch.arange(len(order), device=device) < budget
    counts = (taken & (reached > 0)).view(-1, nodes).sum(1)
    return torch.where(live, counts.clamp(min=1), 0).to(torch.int32)


def plan_lengths(
    confidence: Tensor,
    cost: CostTable | None,
    *,
    policy: Policy = "causal",
    budget: int | None = None,
    min_len: int = 0,
    max_len: int | Tensor | None = None,
    max_rows: int | None = None,
    num_prefill_tokens: Tensor | None = None,
    emits: Tensor | None = None,
    survival_floor: float = 0.0,
    bypass: float | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Draft lengths int32 [R] as `schedule_prefixes` chooses them, for simulations and engines that schedule on the host.

    confidence: fp32 [S, K] on the CPU, this round's. policy "causal", or "budget" with `budget` drafts (`plan_budget`). The
    others, and the errors, as in `plan_budget`. Missing drafts are given by max_len.
    """
    check_choice("policy", policy, POLICIES)
    if (policy == "budget") != (budget is not None):
        raise ValueError(f"budget: expected an int with policy 'budget' and None with 'causal', got {budget!r}")
    if budget is not None:
        check_int("budget", budget)
    lens, _ = _plan(
        "confidence", confidence, cost, "causal" if budget is None else budget, min_len, max_len, max_rows, num_prefill_tokens,
        emits, survival_floor, bypass, state_indices,
    )  # fmt: skip
    return lens


def _plan(
    name: str,
    confidence: Tensor,
    cost: CostTable | None,
    policy: Policy | int,
    min_len: int,
    max_len: int | Tensor | None,
    max_rows: int | None,
    num_prefill_tokens: Tensor | None,
    emits: Tensor | None,
    survival_floor: float,
    bypass: float | None,
    state_indices: Tensor | None,
) -> tuple[Tensor, int]:
    """(lengths int32 [R], their sum). policy: "causal", "budget" (the best number), or a number."""
    cpu = torch.device("cpu")
    slots, drafts = check_tensor(name, confidence, dtype=torch.float32, shape=("S", "K"), device=cpu).shape
    check_optional("state_indices", state_indices, dtype=INT_DTYPES, shape=("R",), device=cpu)
    slot_of = torch.arange(slots, device=cpu) if state_indices is None else state_indices.long()
    requests = len(slot_of)
    check_optional("num_prefill_tokens", num_prefill_tokens, dtype=INT_DTYPES, shape=(requests,), device=cpu)
    check_optional("emits", emits, dtype=(torch.bool, torch.int32), shape=(requests,), device=cpu)
    check_int("min_len", min_len, low=0)
    check_number("survival_floor", survival_floor, low=0.0, high=1.0)
    if isinstance(max_len, Tensor):
        check_tensor("max_len", max_len, dtype=INT_DTYPES, shape=(requests,), device=cpu)
    elif max_len is not None:
        check_int("max_len", max_len, low=0)
    if max_rows is not None:
        check_int("max_rows", max_rows, low=0)
    if bypass is not None:
        check_number("bypass", bypass, low=0.0, high=1024.0)

    live = (slot_of >= 0) & (slot_of < slots)
    prompts = torch.zeros_like(slot_of) if num_prefill_tokens is None else num_prefill_tokens.long().clamp(min=0)
    emitting = live if emits is None else live & emits.bool()
    takes = emitting & (prompts == 0)
    caps = torch.as_tensor(drafts if max_len is None else max_len, dtype=torch.int64, device=cpu).expand(requests)
    caps = torch.where(takes, caps.clamp(0, drafts), 0)
    rows = int(torch.where(live, prompts.clamp(min=1), 0).sum())
    drafting = int(takes.sum())
    room = requests * drafts if max_rows is None else max(0, max_rows - rows)
    if cost is not None:
        check_type("cost", cost, CostTable)
        check_tensor("cost.seconds", cost.seconds, device=cpu)
    elif not (isinstance(policy, int) and bypass is None):
        raise TypeError("cost: expected a CostTable, got None")
    cost_of = None if cost is None else _StepCost(cost, drafting)
    if bypass is not None and drafting:
        assert cost_of is not None
        allowed = _BYPASS_UNIT + math.ceil(bypass * _BYPASS_UNIT)
        with_all = rows + drafting * drafts
        without, of_all = cost_of(torch.tensor([rows, with_all], device=cpu)).tolist()
        if with_all - rows <= room and of_all * _BYPASS_UNIT <= without * allowed:
            min_len = drafts

    survival = _survival(confidence[slot_of.clamp(0, max(0, slots - 1))]) if slots else _none(requests, drafts)
    k = torch.arange(drafts, device=cpu)
    forced = (k < min_len).expand(requests, drafts)
    there = (k < caps[:, None]) & (forced | (survival >= max(1, math.floor(survival_floor * UNIT))))
    # By value, then by position, then by request: a stable sort of [K, R].
    value = torch.where(there, torch.where(forced, FORCED, survival), -1).T.flatten()
    order = value.argsort(descending=True, stable=True)[: min(int(there.sum()), room)]
    total, first = len(order), int((value[order] == FORCED).sum())
    if isinstance(policy, int):
        number = min(max(policy, first), total)
    else:
        gains = survival.T.flatten()[order]
        assert cost_of is not None
        tau = UNIT * int(emitting.sum()) + torch.cat([gains.new_zeros(1), gains.cumsum(0)])  # [n], after n drafts
        costs = cost_of(rows + torch.arange(total + 1, device=cpu))
        number = _causal(tau, costs, first) if policy == "causal" else _best(tau, costs, first)
    lens = torch.bincount(order[:number] % requests, minlength=requests) if requests else order
    return lens.to(torch.int32), number


def _survival(confidence: Tensor) -> Tensor:
    """floor(a 2^24) int64 [R, K]; the product from left to right in fp32."""
    factors = confidence.nan_to_num(nan=0.0).clamp(0.0, 1.0)
    columns, product = [], torch.ones(len(factors), dtype=torch.float32, device="cpu")
    for k in range(factors.shape[1]):
        product = product * factors[:, k]
        columns.append(product)
    return (torch.stack(columns, 1) * UNIT).floor().long() if columns else _none(*factors.shape)


def _none(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device="cpu")


class _StepCost:
    """Cost int64 of steps by their rows, drafting included, in units of 100 ns."""

    def __init__(self, cost: CostTable, drafting: int) -> None:
        self._steps = _cost_units(cost.seconds)
        self._drafting = 0
        if cost.draft_seconds is not None and drafting:
            self._drafting = int(_line(_cost_units(cost.draft_seconds), torch.tensor(drafting, device="cpu")))

    def __call__(self, rows: Tensor) -> Tensor:
        return (_line(self._steps, rows) + self._drafting).clamp(max=COST_LIMIT)


def _cost_units(seconds: Tensor) -> Tensor:
    scaled = seconds * UNITS_PER_SECOND
    scaled = scaled.nan_to_num(nan=COST_LIMIT, posinf=COST_LIMIT, neginf=1.0).clamp(1.0, COST_LIMIT)
    return (scaled.floor() + (scaled - scaled.floor() >= 0.5)).long()


def _line(table: Tensor, index: Tensor) -> Tensor:
    """Entries, beyond the table on the line through the last two measured ones, which never falls."""
    last = len(table) - 1
    slope = max(0, int(table[last] - table[last - 1])) if last >= 2 else 0
    return (table[index.clamp(max=last)] + (index - last).clamp(min=0) * slope).clamp(max=COST_LIMIT)


def _causal(tau: Tensor, costs: Tensor, first: int) -> int:
    """Drafts before the first from `first` on that does not raise tau / cost."""
    fails = (tau[1:] * costs[:-1] <= tau[:-1] * costs[1:])[first:].nonzero()
    return first + int(fails[0]) if len(fails) else len(tau) - 1


def _best(tau: Tensor, costs: Tensor, first: int) -> int:
    """The smallest number from `first` on with the largest tau / cost, in integers: a pass that keeps the best so far."""
    taus, units = tau.tolist(), costs.tolist()
    best = first
    for number in range(first + 1, len(taus)):
        if taus[number] * units[best] > taus[best] * units[number]:
            best = number
    return best


# --- confidences of older rounds --------------------------------------------------------------------------------------


class ConfidenceHistory:
    """Confidences by request slot as they were `lag` rounds ago, on the device and, without a wait, on the host.

        history = ConfidenceHistory(slots, drafts)
        every step:  history.reset(new_slots)                       requests that came into a slot since the last step
                     budget = plan_budget(history.on_host(), cost)  picks the graph bucket of this step
                     layout = schedule_prefixes(..., policy="budget", stale_confidence=history.confidence)
                     history.record(block, state_indices)           may be captured in a CUDA graph
                     history.send()                                 starts the copy to the host; not captured

    A slot holds 1.0 from its reset until its confidences are `lag` steps old: a new request is verified as if it were sure. A slot
    that is not in the batch keeps its last ones. What a step plans with was on
    its way to the host for `lag` - 1 whole steps, so `on_host` waits for nothing unless the device is that far behind.

    slots: S. drafts: K. lag: rounds between a confidence and its use, >= 1; the paper uses 2. device: where the drafts are; None =
    the current CUDA device, or the CPU where there is none.
    """

    def __init__(self, slots: int, drafts: int, device: torch.device | str | None = None, *, lag: int = 2) -> None:
        check_int("slots", slots, low=1)
        check_int("drafts", drafts, low=1)
        check_int("lag", lag, low=1)
        device = check_device("device", device)
        self.slots, self.drafts, self.lag = slots, drafts, lag
        # Oldest first, which is what a step reads; one row more than there are slots takes what nobody wants.
        self._rounds = torch.ones(lag, slots + 1, drafts, dtype=torch.float32, device=device)
        pinned = self._rounds.device.type == "cuda"
        self._host = [torch.ones(slots, drafts, dtype=torch.float32, device="cpu", pin_memory=pinned) for _ in range(lag)]
        self._arrived: list[torch.cuda.Event | None] = [torch.cuda.Event() if pinned else None for _ in range(lag)]
        self._since: list[set[int]] = [set() for _ in range(lag)]  # slots reset since the copy was started
        self._steps = 0

    @property
    def confidence(self) -> Tensor:
        """fp32 [S, K] on the device, at an address that never changes: `stale_confidence` of this step."""
        return self._rounds[0, : self.slots]

    def record(self, block: DraftBlock, state_indices: Tensor | None = None) -> None:
        """Keep this round's confidences of the slots in the batch (all without state_indices). Others keep theirs.

        block: confidence fp32 [S, K]; state_indices: int32 [R], -1 for padding rows and for requests that did not draft this
        round (those still in their prompt). No synchronisation, and nothing of a size that varies.
        """
        check_type("block", block, DraftBlock)
        if block.confidence is None:
            raise ValueError("block.confidence: expected fp32 [S, K], got None")
        check_tensor("block.confidence", block.confidence, shape=(self.slots, self.drafts), device=self._rounds.device)
        for older, newer in zip(self._rounds[:-1], self._rounds[1:], strict=True):
            older.copy_(newer)
        newest = self._rounds[-1]
        if state_indices is None:
            newest[: self.slots].copy_(block.confidence)
            return
        check_tensor("state_indices", state_indices, dtype=INT_DTYPES, shape=("R",), device=self._rounds.device)
        slot = state_indices.long()
        inside = (slot >= 0) & (slot < self.slots)
        newest.index_copy_(0, torch.where(inside, slot, self.slots), block.confidence[torch.where(inside, slot, 0)])

    def send(self) -> None:
        """Start copying the newest round to the host, on the current stream."""
        place = self._steps % self.lag
        self._host[place].copy_(self._rounds[-1, : self.slots], non_blocking=True)
        if (arrived := self._arrived[place]) is not None:
            arrived.record(torch.cuda.current_stream(self._rounds.device))
        self._since[place].clear()
        self._steps += 1

    def on_host(self) -> Tensor:
        """fp32 [S, K] on the CPU, a copy: the bits of `confidence`, sent `lag` rounds ago."""
        place = self._steps % self.lag  # the next to be overwritten is the oldest
        if (arrived := self._arrived[place]) is not None:
            arrived.synchronize()
        confidence = self._host[place].clone()
        if self._since[place]:
            confidence[sorted(self._since[place])] = 1.0
        return confidence

    def reset(self, slots: Iterable[int]) -> None:
        """Forget what was kept for these slots (a sequence of ints on the host): another request is in them."""
        slots = [int(slot) for slot in slots]
        for slot in slots:
            if not 0 <= slot < self.slots:
                raise ValueError(f"slots: expected 0 to {self.slots - 1}, got {slot}")
        if slots:
            index = torch.tensor(slots, dtype=torch.int64, device="cpu", pin_memory=self._arrived[0] is not None)
            self._rounds.index_fill_(1, index.to(self._rounds.device, non_blocking=True), 1.0)
            for since in self._since:
                since.update(slots)
