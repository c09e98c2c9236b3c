"""schedule_prefixes: from confidences to draft lengths and the packed rows of the target's pass, in one launch.

    survival a_{r,k} = product of c_{r,i} for i <= k,  admit in descending order of a while tau_n cost_{n-1} > tau_{n-1} cost_n

Reference: reference/schedule.py. Source: DSpark, arXiv 2607.05147, algorithm 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import INT_DTYPES, check_choice, check_int, check_number, check_optional, check_tensor, check_type
from ...choices import POLICIES, Policy
from ...kernels.layout.args import ScheduleInputs, ScheduleScratch, ScheduleStrides
from ...launch import arch
from ...launch.layout import schedule as schedule_launch
from ...library import Out
from ...types import CostTable, DraftBlock, VerifyLayout
from ...workspace import Workspace
from .fixed import Packed, Requests, batch_rows, check_batch, output, packed_of, padded, pages, row_count

OP = "schedule_prefixes"
MAX_CANDIDATES = 16384  # drafts of a batch, requests and drafts each padded to a power of two: what one program can hold
SURVIVAL_ONE = 1 << 24  # of survival
_BYPASS_UNIT = 1 << 20


def schedule_prefixes(
    block: DraftBlock,
    cost: CostTable | None,
    *,
    anchors: Tensor,
    anchor_positions: Tensor,
    policy: Policy = "causal",
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
    out: VerifyLayout | None = None,
    workspace: Workspace | None = None,
) -> VerifyLayout:
    """Choose how many drafts of each request the target verifies, and pack the rows of its pass, in one launch.

    Drafts of requests that decode and emit are admitted in descending order of survival (ties by position, then by request), so
    that each request gets a prefix of its drafts. Only drafts up to max_len, before the first draft below 0 (flag MISSING_DRAFT)
    and with a survival above 0 and at least survival_floor take part. The first min_len drafts of each request come first and are
    admitted untested. No draft is admitted beyond max_rows rows in all. Both policies are lossless if the arguments were not
    computed from this round's drafts: whether draft k is verified then depends neither on draft k nor on later ones.

    Args:
        block: tokens and calibrated confidence [S, K]. R * K, each padded to a power of two, at most 16384.
        cost: measured times of a step by its rows, on the device of the block; None only with a given budget and no bypass.
        anchors, anchor_positions: int64 or int32 [S].
        policy: "causal": one draft after another until the first that does not raise expected tokens per second (algorithm 1).
            "budget": the `budget` best; or, with stale_confidence, as many as maximise expected tokens per second under those
            older confidences.
        budget: int32 [1], drafts of the whole batch (anchors not counted), decided before this round's drafts were known.
        stale_confidence: fp32 [S, K], confidences of older rounds (`scheduling.ConfidenceHistory`), 1.0 for new requests.
        min_len: >= 0. max_len: int or int32/int64 [R], not computed from this round's drafts. survival_floor: in [0, 1].
        bypass: low-load bypass, delta in [0, 1024]: verify every draft when all fit max_rows and cost(B + K per drafting request)
            <= (1 + delta) cost(B), B the anchor and prompt rows. Decided from the rows and the table alone. None: off.
        max_rows, num_prefill_tokens, emits, block_tables, page_size, state_indices, out: as in `fixed_layout`.
        workspace: used where the padded R * K exceeds 2048; without one, scratch is allocated then.

    Returns:
        VerifyLayout. A NaN confidence counts as 0 and is flagged NAN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, value, dtype, shape, device or stride.
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    check_type("block", block, DraftBlock)
    slots, drafts = block.tokens.shape
    device = block.tokens.device
    requests = batch_rows(state_indices, slots)
    if block.confidence is None:
        raise ValueError("block.confidence: expected fp32 [S, K], got None")
    _check_policy(policy, budget, stale_confidence, block.confidence, cost, bypass, (slots, drafts), device)
    check_int("min_len", min_len, low=0)
    check_number("survival_floor", survival_floor, low=0.0, high=1.0)
    if bypass is not None:
        check_number("bypass", bypass, low=0.0, high=1024.0)
    check_tensor("anchors", anchors, dtype=INT_DTYPES, shape=(slots,), device=device)
    check_batch(
        slots, requests, device, anchor_positions, num_prefill_tokens, emits, block_tables, page_size, state_indices, workspace
    )
    max_lens = None
    if isinstance(max_len, Tensor):
        max_lens = check_tensor("max_len", max_len, dtype=INT_DTYPES, shape=(requests,), device=device, contiguous=True)
        max_len = None
    elif max_len is not None:
        check_int("max_len", max_len, low=0)
    rows = row_count(max_rows, requests, drafts, num_prefill_tokens, out)
    on = arch.current(device)
    candidates = math.prod(_padded(requests, drafts, on.lanes))
    if candidates > MAX_CANDIDATES:
        raise ValueError(
            f"block: expected at most {MAX_CANDIDATES} drafts (requests x drafts, each padded to a power of two), got "
            f"{requests} x {drafts}, padded {candidates}"
        )
    out = output(out, requests, rows, drafts, block_tables is not None, device)
    if requests:
        scratch = None
        if candidates > schedule_launch.pick(on, candidates, rows).sort:
            if workspace is None:  # nothing is counted: no counters to fill with zeros
                scratch = torch.empty(workspaces.measured(_scratch, candidates), dtype=torch.int64, device=device)
            else:
                scratch = workspaces.lend(OP, workspace, requests, drafts, 1, device).scratch
        arguments = Arguments(
            drafts=block.tokens,
            confidence=block.confidence,
            stale_confidence=stale_confidence,
            seconds=None if cost is None else cost.seconds,
            draft_seconds=None if cost is None else cost.draft_seconds,
            budget=budget,
            max_lens=max_lens,
            requests=Requests(anchors, anchor_positions, num_prefill_tokens, emits, block_tables, state_indices),
            packed=packed_of(out),
            scratch=scratch,
            page_size=page_size or 1,
            min_len=min(min_len, drafts),
            max_len=drafts if max_len is None else min(max_len, drafts),
            least=max(1, math.floor(survival_floor * SURVIVAL_ONE)),
            bypass=0 if bypass is None else _BYPASS_UNIT + math.ceil(bypass * _BYPASS_UNIT),
        )
        _schedule_prefixes(arguments)
    return out


def _check_policy(
    policy: Policy,
    budget: Tensor | None,
    stale_confidence: Tensor | None,
    confidence: Tensor,
    cost: CostTable | None,
    bypass: float | None,
    shape: tuple[int, int],
    device: torch.device,
) -> None:
    check_choice("policy", policy, POLICIES)
    for name, value in (("budget", budget), ("stale_confidence", stale_confidence)):
        if policy == "causal" and value is not None:
            raise ValueError(f"{name}: expected None with policy 'causal', got {type(value).__name__}")
    if policy == "budget" and budget is None and stale_confidence is None:
        raise ValueError("budget: expected a tensor with policy 'budget' (or stale_confidence, which says it), got None")
    if budget is not None and stale_confidence is not None:
        raise ValueError("budget: expected None with stale_confidence, which says the budget too, got both")
    check_optional("budget", budget, dtype=torch.int32, shape=(1,), device=device)
    if stale_confidence is not None and stale_confidence is confidence:
        raise ValueError("stale_confidence: expected confidences of older rounds, got this round's, which would bias the output")
    check_optional("stale_confidence", stale_confidence, dtype=torch.float32, shape=shape, device=device, last_contiguous=True)
    if cost is not None:
        check_type("cost", cost, CostTable)
        check_tensor("cost.seconds", cost.seconds, device=device)
        check_optional("cost.draft_seconds", cost.draft_seconds, device=device)
    elif not (budget is not None and bypass is None):
        raise TypeError("cost: expected a CostTable (only a given budget without bypass needs none), got None")


def _padded(requests: int, drafts: int, lanes: int) -> tuple[int, int]:
    """Powers of two. A warp has a request per lane: where some held copies, Triton before 3.9 would reduce what the kernel reshapes
    as if they were others (tests/machine/reductions.py)."""
    drafts = padded(drafts, least=2)
    return max(padded(requests), min(lanes, MAX_CANDIDATES // drafts)), drafts


def _scratch(take: workspaces.Take, candidates: int) -> ScheduleScratch:
    return ScheduleScratch(*(take(candidates, torch.int32) for _ in ScheduleScratch._fields))


@workspaces.declare(OP)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    """No counters; scratch for the values of batches that are not sorted in one piece."""
    most = math.prod(_padded(requests, drafts, lanes=64))
    return 0, workspaces.measured(_scratch, min(most, MAX_CANDIDATES))


class Arguments(NamedTuple):
    """The op as torch.library knows it."""

    drafts: Tensor
    confidence: Tensor
    stale_confidence: Tensor | None
    seconds: Tensor | None
    draft_seconds: Tensor | None
    budget: Tensor | None
    max_lens: Tensor | None
    requests: Requests
    packed: Packed
    scratch: Out[Tensor | None]
    page_size: int
    min_len: int
    max_len: int
    least: int
    bypass: int


@library.register(OP, Arguments)
def _schedule_prefixes(a: Arguments) -> None:
    device, given, packed = a.drafts.device, a.requests, a.packed
    kernels = library.kernels("layout.schedule", device)
    requests, rows, (slots, width) = packed.draft_lens.shape[0], packed.token_ids.shape[0], a.drafts.shape
    on = arch.current(device)
    padded_requests, padded_drafts = _padded(requests, width, on.lanes)
    candidates = padded_requests * padded_drafts
    config = schedule_launch.pick(on, candidates, rows)
    block = min(config.block, padded(rows))
    max_pages, stride_pages = pages(given.block_tables)
    scratch = ScheduleScratch(None, None, None)
    if a.scratch is not None:
        scratch = _scratch(workspaces.Carver(a.scratch).take, candidates)
    kernels.launch_schedule_prefixes(
        -(-rows // block),
        (
            ScheduleInputs(
                drafts_ptr=a.drafts, confidence_ptr=a.confidence, stale_ptr=a.stale_confidence, seconds_ptr=a.seconds,
                draft_seconds_ptr=a.draft_seconds, budget_ptr=a.budget, max_lens_ptr=a.max_lens,
            ),
            given.inputs(), packed.outputs(), scratch,
            requests, slots, rows, width, max_pages, a.page_size,
            0 if a.seconds is None else a.seconds.shape[0] - 1, 0 if a.draft_seconds is None else a.draft_seconds.shape[0] - 1,
            a.min_len, a.max_len, a.least, a.bypass, candidates // config.sort,
            ScheduleStrides(
                drafts=a.drafts.stride(0), confidence=a.confidence.stride(0),
                stale=0 if a.stale_confidence is None else a.stale_confidence.stride(0), anchors=given.anchors.stride(0),
                positions=given.anchor_positions.stride(0), block_tables=stride_pages,
            ),
        ),
        log_requests=padded_requests.bit_length() - 1,
        drafts=padded_drafts,
        block=block,
        config=config,
    )  # fmt: skip
