"""draft_block: a whole block of drafts under the sequential head in one launch.

x_k ~ softmax((base_k + bias(x_{k-1})) / T), k = 1..K, x_0 = the anchor; confidence_k = sigmoid((w . [h_k; W1[x_{k-1}]] + b) /
T_k). Oracle: reference/draft.py. Source: DSpark, arXiv 2607.05147, sections on the sequential and the confidence head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import library, workspace as workspaces
from ..checks import INT_DTYPES, LOGIT_DTYPES, check_choice, check_int, check_optional, check_tensor, check_type, not_yet
from ..launch import arch, draft as draft_launch
from ..types import ConfidenceHead, DenseProposal, DraftBlock, MarkovHead, OneHotProposal, SamplingTensors
from .candidates import draft_candidates

OP = "draft_block"
UNIT = 64  # ids per stored (maximum, mass) pair, as in kernels/draft.py


@workspaces.declare(OP)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    rows, units = requests * drafts, -(-vocab // UNIT)
    counters = workspaces.words_of(rows, torch.int64) + workspaces.words_of(requests, torch.int32)
    scratch = workspaces.words_of(rows * units, torch.float32) + workspaces.words_of(rows * units, torch.int64)
    return counters, scratch


def draft_block(
    base_logits: Tensor,
    anchors: Tensor,
    head: MarkovHead | None = None,
    *,
    anchor_positions: Tensor,
    sampling: SamplingTensors | None = None,
    hidden: Tensor | None = None,
    confidence: ConfidenceHead | None = None,
    candidates: int | None = None,
    bigrams: Tensor | None = None,
    draft_to_target: Tensor | None = None,
    first_draft: int = 0,
    noise: str = "draft",
    state_indices: Tensor | None = None,
    keep_logits: bool = False,
    out: DraftBlock | None = None,
    workspace: workspaces.Workspace | None = None,
) -> DraftBlock:
    """Draft positions first_draft + 1 .. first_draft + K of every request, left to right, in one launch.

    Args:
        base_logits: [R, K, V] bf16, fp16 or fp32, last dimension contiguous: the backbone's logits.
        anchors: int64 or int32 [S] (R without `state_indices`), the last emitted token of each request.
        head: MarkovHead (w1 [V1, r], w2 [V, r]) or None for independent positions.
        anchor_positions: int64 or int32 [S], absolute position of the anchor; draft k is decided for position + k.
        sampling: temperature and seed per slot; None = every row greedy. Temperature <= 0 makes a row greedy.
        hidden: [R, K, H], needed by `confidence`.
        confidence: ConfidenceHead; its weight is [H], or [H + r] with the Markov input.
        candidates: restrict each position to its C best base logits (1 to 256; ties: lowest ids): the proposal is sparse.
        bigrams: int32 or int64 [V, B] with `candidates`: ids of the head's vocabulary (-1 = unused) that join the candidates of a
            position by the token before it; a SparseProposal then has C + B entries.
        draft_to_target: int64 [V], target-vocabulary id of each id of base_logits and W2.
        first_draft: positions already drafted; K = 1 with first_draft = 0, 1, 2, ... serves step-wise drafters.
        noise: "draft", or "coupled" where acceptance uses the coupled rule.
        state_indices: int32 [R], state slot of each row, -1 = padding row.
        keep_logits: keep the logits of a greedy block too (proposal is then dense with temperature 0).
        out: a DraftBlock to write, [S, K] (or wider: then draft k goes to column first_draft + k - 1).
        workspace: scratch memory; with `out` and `workspace` nothing is allocated.

    Returns:
        DraftBlock. Its proposal is dense (logits in base_logits' dtype, lse) with `sampling`, one-hot without.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or stride.
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    rows, drafts, vocab = _check_inputs(base_logits, anchors, anchor_positions, state_indices)
    device, slots = base_logits.device, anchors.shape[0]
    check_choice("noise", noise, ("draft", "coupled"))
    check_int("first_draft", first_draft, low=0)
    if candidates is not None:
        return draft_candidates(
            base_logits, anchors, head, anchor_positions=anchor_positions, sampling=sampling, hidden=hidden,
            confidence=confidence, candidates=candidates, bigrams=bigrams, draft_to_target=draft_to_target,
            first_draft=first_draft, noise=noise, state_indices=state_indices, keep_logits=keep_logits, out=out,
            workspace=workspace,
        )  # fmt: skip
    if bigrams is not None:
        raise ValueError("bigrams: expected None without `candidates`, got a tensor")
    if draft_to_target is not None:
        not_yet(OP, "draft_to_target", "a reduced draft vocabulary is")
    _check_sampling(sampling, slots, device)
    _check_head(head, vocab, device)
    _check_confidence(confidence, hidden, head, rows, drafts, first_draft, device)

    if out is None:
        column = 0
        out = _allocate(base_logits, slots, rows, sampling, confidence, keep_logits, state_indices is not None)
    else:
        column = _check_out(out, base_logits, slots, rows, sampling, confidence, first_draft)
    if rows == 0:
        return out
    dense = out.proposal if isinstance(out.proposal, DenseProposal) else None
    counters, scratch = workspaces.lend(OP, workspace, rows, drafts, vocab, device)
    _draft_block(
        base_logits,
        anchors,
        anchor_positions,
        None if head is None else head.w1,
        None if head is None else head.w2,
        hidden if confidence is not None else None,
        None if confidence is None else confidence.weight,
        None if confidence is None else confidence.bias,
        None if confidence is None else confidence.sts_temperatures,
        None if sampling is None else sampling.temperature,
        None if sampling is None else sampling.seed,
        state_indices,
        out.tokens,
        out.confidence,
        out.confidence_logits,
        None if dense is None else dense.logits,
        None if dense is None else dense.lse,
        out.flags,
        counters,
        scratch,
        first_draft,
        column,
        noise == "coupled",
    )
    return out


def _check_inputs(base_logits, anchors, anchor_positions, state_indices):
    check_tensor("base_logits", base_logits, dtype=LOGIT_DTYPES, shape=("R", "K", "V"), last_contiguous=True)
    rows, drafts, vocab = base_logits.shape
    device = base_logits.device
    if drafts == 0 or vocab == 0:
        raise ValueError(f"base_logits: expected K >= 1 and V >= 1, got shape {list(base_logits.shape)}")
    slots = rows if state_indices is None else "S"
    check_tensor("anchors", anchors, dtype=INT_DTYPES, shape=(slots,), device=device)
    check_tensor("anchor_positions", anchor_positions, dtype=INT_DTYPES, shape=(anchors.shape[0],), device=device)
    check_optional("state_indices", state_indices, dtype=torch.int32, shape=(rows,), device=device, contiguous=True)
    return rows, drafts, vocab


def _check_sampling(sampling, slots, device):
    if sampling is None:
        return
    check_type("sampling", sampling, SamplingTensors)
    check_tensor("sampling.temperature", sampling.temperature, shape=(slots,), device=device)
    for name in ("top_k", "top_p", "min_p", "logit_bias", "token_bitmask", "penalties"):
        if getattr(sampling, name) is not None:
            not_yet(OP, f"sampling.{name}", "filters and penalties while drafting are")


def _check_head(head, vocab, device):
    if head is None:
        return
    check_type("head", head, MarkovHead)
    if type(head) is not MarkovHead:
        not_yet(OP, "head", f"{type(head).__name__} is")
    if head.w2_scale is not None:
        not_yet(OP, "head.w2_scale", "a quantised W2 is")
    check_tensor("head.w1", head.w1, device=device)
    check_tensor("head.w2", head.w2, shape=(vocab, head.rank), device=device)


def _check_confidence(confidence, hidden, head, rows, drafts, first_draft, device):
    if confidence is None:
        return
    check_type("confidence", confidence, ConfidenceHead)
    if hidden is None:
        raise ValueError("hidden: expected [R, K, H] because `confidence` is given, got None")
    check_tensor("hidden", hidden, dtype=LOGIT_DTYPES, shape=(rows, drafts, "H"), device=device, last_contiguous=True)
    width, size = confidence.weight.shape[0], hidden.shape[2]
    markov = width == size + head.rank if head is not None else False
    if width != size and not markov:
        wanted = f"[{size}]" + ("" if head is None else f" or [{size + head.rank}]")
        raise ValueError(f"confidence.weight: expected shape {wanted}, got [{width}]")
    check_tensor("confidence.weight", confidence.weight, device=device)
    temperatures = confidence.sts_temperatures
    if temperatures is not None and temperatures.shape[0] < first_draft + drafts:
        raise ValueError(
            f"confidence.sts_temperatures: expected at least {first_draft + drafts} entries, got {temperatures.shape[0]}"
        )


def _allocate(base_logits, slots, rows, sampling, confidence, keep_logits, scattered) -> DraftBlock:
    device = base_logits.device
    drafts, vocab = base_logits.shape[1:]
    # Slots that are not in the batch must hold something defined; without slots every element is written anyway.
    new = torch.zeros if scattered else torch.empty

    def floats():
        return new(slots, drafts, dtype=torch.float32, device=device)

    if sampling is not None:
        logits = new(slots, drafts, vocab, dtype=base_logits.dtype, device=device)
        proposal = DenseProposal(logits, lse=floats())
    elif keep_logits:
        logits = new(slots, drafts, vocab, dtype=base_logits.dtype, device=device)
        proposal = DenseProposal(logits, temperature=torch.zeros(slots, dtype=torch.float32, device=device))
    else:
        proposal = OneHotProposal()
    return DraftBlock(
        tokens=torch.full((slots, drafts), -1, dtype=torch.int64, device=device),
        proposal=proposal,
        flags=torch.empty(rows, dtype=torch.int32, device=device),
        confidence=None if confidence is None else floats(),
        confidence_logits=None if confidence is None else floats(),
    )


def _check_out(out, base_logits, slots, rows, sampling, confidence, first_draft) -> int:
    """Check a caller's DraftBlock; returns the column of its first draft."""
    check_type("out", out, DraftBlock)
    drafts, vocab = base_logits.shape[1:]
    device = base_logits.device
    width = check_tensor("out.tokens", out.tokens, shape=(slots, "K"), device=device).shape[1]
    column = 0 if width == drafts else first_draft
    if width < column + drafts:
        raise ValueError(f"out.tokens: expected {drafts} or at least {first_draft + drafts} columns, got {width}")
    check_tensor("out.flags", out.flags, shape=(rows,), device=device)
    if confidence is not None:
        for name in ("confidence", "confidence_logits"):
            check_tensor(f"out.{name}", getattr(out, name), shape=(slots, width), device=device)
    elif out.confidence is not None or out.confidence_logits is not None:
        raise ValueError("out.confidence: expected None because no `confidence` head is given, got a tensor")
    dense = isinstance(out.proposal, DenseProposal)
    if sampling is not None and not dense:
        raise TypeError(f"out.proposal: expected DenseProposal with `sampling`, got {type(out.proposal).__name__}")
    if not dense:
        check_type("out.proposal", out.proposal, OneHotProposal)
        return column
    check_tensor("out.proposal.logits", out.proposal.logits, dtype=base_logits.dtype, shape=(slots, width, vocab), device=device)
    if sampling is None:
        if out.proposal.lse is not None:
            raise ValueError("out.proposal.lse: expected None for a greedy block, got a tensor")
        if out.proposal.temperature is None:
            raise ValueError("out.proposal.temperature: expected zeros [S] for a greedy block (its law is one-hot), got None")
    elif out.proposal.lse is not None:
        check_tensor("out.proposal.lse", out.proposal.lse, shape=(slots, width), device=device)
    return column


@library.register(
    "draft_block(Tensor base_logits, Tensor anchors, Tensor anchor_positions, Tensor? w1, Tensor? w2, Tensor? hidden, "
    "Tensor? weight, Tensor? bias, Tensor? sts_temperatures, Tensor? temperature, Tensor? seed, Tensor? state_indices, "
    "Tensor(a!) tokens, Tensor(b!)? confidence, Tensor(c!)? confidence_logits, Tensor(d!)? logits, Tensor(e!)? lse, "
    "Tensor(f!) flags, Tensor(g!) counters, Tensor(h!) scratch, int first_draft, int column, bool coupled) -> ()"
)
def _draft_block(
    base_logits, anchors, anchor_positions, w1, w2, hidden, weight, bias, sts_temperatures, temperature, seed, state_indices,
    tokens, confidence, confidence_logits, logits, lse, flags, counters, scratch, first_draft, column, coupled,
):  # fmt: skip
    device = base_logits.device
    kernels = library.kernels("draft", device)
    rows, drafts, vocab = base_logits.shape
    rank = 0 if w1 is None else w1.shape[1]
    hidden_size = 0 if hidden is None else hidden.shape[2]
    gpu = arch.current(device)
    request_tile = draft_launch.request_tile(rows)
    one_tile = rows <= request_tile
    config = draft_launch.pick(gpu, vocab, max(1, rank), 2 if w2 is None else w2.element_size(), one_tile)
    clean = workspaces.Carver(counters)
    barrier = clean.take(2 * workspaces.RESERVED, torch.int32)
    best = clean.take(rows * drafts, torch.int64)
    status = clean.take(rows, torch.int32)
    carver = workspaces.Carver(scratch)
    units = rows * drafts * -(-vocab // UNIT)
    unit_max, unit_mass = carver.take(units, torch.float32), carver.take(units, torch.int64)

    def stride(tensor, dim):
        return 0 if tensor is None else tensor.stride(dim)

    kernels.launch_draft_dense(
        min(-(-vocab // config.block_v), gpu.multiprocessors * config.programs_per_sm),
        (
            base_logits, anchors, anchor_positions, w1, w2, hidden, weight, bias, sts_temperatures, temperature, seed,
            state_indices, tokens, confidence, confidence_logits, logits, lse, flags, best, status, barrier, unit_max,
            unit_mass, rows, anchors.shape[0], drafts, vocab, 0 if w1 is None else w1.shape[0], rank, hidden_size,
            first_draft, column,
            base_logits.stride(0), base_logits.stride(1), anchors.stride(0), anchor_positions.stride(0), stride(w1, 0),
            stride(w2, 0), stride(hidden, 0), stride(hidden, 1), tokens.stride(0), stride(confidence, 0),
            stride(confidence_logits, 0), stride(logits, 0), stride(logits, 1), stride(lse, 0),
        ),
        head=None if w1 is None else "vanilla",
        dot_type=None if w1 is None else str((w1.dtype if w1.dtype == w2.dtype else torch.float32)).removeprefix("torch."),
        coupled=coupled,
        with_markov=weight is not None and weight.shape[0] > hidden_size,
        one_tile=one_tile,
        rows=request_tile,
        config=config,
        cooperative=gpu.cooperative,
    )  # fmt: skip
