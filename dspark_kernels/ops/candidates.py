"""draft_block on candidates: each position restricted to its C best base logits, and to listed successors of the draft before it.

S_k = the C ids of the largest base_k (ties: lowest ids) and bigrams[x_{k-1}],  x_k ~ softmax over S_k of (base_k + bias) / T.
The proposal is sparse by construction. Oracle: reference/candidates.py. Source: DSpark, arXiv 2607.05147.
"""

from __future__ import annotations

import torch

from .. import library, workspace as workspaces
from ..checks import INT_DTYPES, LOGIT_DTYPES, check_int, check_optional, check_tensor, check_type, not_yet
from ..launch import arch, candidates as launch
from ..types import (
    ConfidenceHead,
    DraftBlock,
    GatedMarkovHead,
    MarkovHead,
    OneHotProposal,
    RnnMarkovHead,
    SamplingTensors,
    SparseProposal,
)

OP = "draft_block"
NEEDS = "draft_block candidates"
MAX_RANK = 1024
LEAST_GROUP = 16  # ids of the smallest unit of any configuration


def _units(vocab: int, group: int) -> int:
    """Words per row for the keys of its units, as kernels/candidates.py has them."""
    return -(-vocab // (16 * group)) * 16


@workspaces.declare(NEEDS)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    rows, int32 = requests * drafts, torch.int32
    counters = 2 * workspaces.words_of(requests, int32) + workspaces.words_of(rows, int32)
    scratch = workspaces.words_of(rows * _units(vocab, LEAST_GROUP), int32)
    scratch += 2 * workspaces.words_of(rows * launch.MAX_CANDIDATES, int32) + workspaces.words_of(2 * rows, int32)
    scratch += workspaces.words_of(rows, int32) + workspaces.words_of(3 * rows * MAX_RANK, int32)
    return counters, scratch + workspaces.words_of(3 * requests * MAX_RANK, int32)


def draft_candidates(
    base_logits, anchors, head, *, anchor_positions, sampling, hidden, confidence, candidates, bigrams, draft_to_target,
    first_draft, noise, state_indices, keep_logits, out, workspace,
) -> DraftBlock:  # fmt: skip
    """ops.draft.draft_block where `candidates` is given; its arguments are described there."""
    check_int("candidates", candidates, low=1, high=launch.MAX_CANDIDATES)
    rows, drafts, vocab = base_logits.shape
    device, slots = base_logits.device, anchors.shape[0]
    listed = _check_bigrams(bigrams, device)
    check_optional("draft_to_target", draft_to_target, dtype=torch.int64, shape=(vocab,), device=device, contiguous=True)
    _check_sampling(sampling, slots, device)
    _check_head(head, hidden, rows, drafts, vocab, device)
    _check_confidence(confidence, hidden, head, rows, drafts, first_draft, device)
    width = candidates + listed
    if out is None:
        column = 0
        out = _allocate(base_logits, slots, rows, width, sampling, confidence, keep_logits, state_indices is not None)
    else:
        column = _check_out(out, base_logits, slots, rows, width, sampling, confidence, first_draft)
    if rows == 0:
        return out
    sparse = out.proposal if isinstance(out.proposal, SparseProposal) else None
    counters, scratch = workspaces.lend(NEEDS, workspace, rows, drafts, vocab, device)
    latent = (None, None)
    if isinstance(head, GatedMarkovHead):
        latent = (head.gate_weight, head.gate_bias)
    elif isinstance(head, RnnMarkovHead):
        latent = (head.joint_weight, head.joint_bias)
    _draft_candidates(
        base_logits,
        anchors,
        anchor_positions,
        None if head is None else head.w1,
        None if head is None else head.w2,
        None if head is None else head.w2_scale,
        *latent,
        hidden if confidence is not None or latent[0] is not None else None,
        None if confidence is None else confidence.weight,
        None if confidence is None else confidence.bias,
        None if confidence is None else confidence.sts_temperatures,
        None if sampling is None else sampling.temperature,
        None if sampling is None else sampling.seed,
        bigrams,
        draft_to_target,
        state_indices,
        out.tokens,
        out.confidence,
        out.confidence_logits,
        None if sparse is None else sparse.ids,
        None if sparse is None else sparse.logits,
        None if sparse is None else sparse.lse,
        out.flags,
        counters,
        scratch,
        candidates,
        first_draft,
        column,
        noise == "coupled",
    )
    return out


def _check_bigrams(bigrams, device) -> int:
    if bigrams is None:
        return 0
    check_tensor("bigrams", bigrams, dtype=INT_DTYPES, shape=("V", "B"), device=device, last_contiguous=True)
    listed = bigrams.shape[1]
    if not 1 <= listed <= launch.MAX_LISTED:
        raise ValueError(f"bigrams: expected 1 to {launch.MAX_LISTED} successors per token, got {listed}")
    return listed


def _check_sampling(sampling, slots, device):
    if sampling is None:
        return
    check_type("sampling", sampling, SamplingTensors)
    check_tensor("sampling.temperature", sampling.temperature, shape=(slots,), device=device)
    for name in ("top_k", "top_p", "min_p", "logit_bias", "token_bitmask", "penalties"):
        if getattr(sampling, name) is not None:
            not_yet(OP, f"sampling.{name}", "filters and penalties while drafting are")


def _check_head(head, hidden, rows, drafts, vocab, device):
    if head is None:
        return
    check_type("head", head, MarkovHead)
    if head.rank > MAX_RANK:
        raise ValueError(f"head.w1: expected rank <= {MAX_RANK} with `candidates`, got {head.rank}")
    check_tensor("head.w1", head.w1, device=device)
    check_tensor("head.w2", head.w2, shape=(vocab, head.rank), device=device)
    if head.w2_scale is not None:
        check_tensor("head.w2_scale", head.w2_scale, contiguous=True)
    if isinstance(head, (GatedMarkovHead, RnnMarkovHead)):
        if hidden is None:
            raise ValueError(f"hidden: expected [R, K, H] because `head` is a {type(head).__name__}, got None")
        check_tensor("hidden", hidden, dtype=LOGIT_DTYPES, shape=(rows, drafts, "H"), device=device, last_contiguous=True)
        name, ranks = ("gate", 1) if isinstance(head, GatedMarkovHead) else ("joint", 2)
        width = hidden.shape[2] + ranks * head.rank
        check_tensor(f"head.{name}_weight", getattr(head, f"{name}_weight"), shape=(None, width), device=device)
        check_tensor(f"head.{name}_bias", getattr(head, f"{name}_bias"), device=device, contiguous=True)


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


def _allocate(base_logits, slots, rows, width, sampling, confidence, keep_logits, scattered) -> DraftBlock:
    device, drafts = base_logits.device, base_logits.shape[1]
    # Slots that are not in the batch must hold something defined; without slots every element is written anyway.
    new = torch.zeros if scattered else torch.empty

    def floats():
        return new(slots, drafts, dtype=torch.float32, device=device)

    proposal = OneHotProposal()
    if sampling is not None or keep_logits:
        ids = new(slots, drafts, width, dtype=torch.int64, device=device)
        logits = new(slots, drafts, width, dtype=base_logits.dtype, device=device)
        if sampling is not None:
            proposal = SparseProposal(ids, logits, lse=floats())
        else:
            proposal = SparseProposal(ids, logits, temperature=torch.zeros(slots, dtype=torch.float32, device=device))
    return DraftBlock(
        tokens=torch.full((slots, drafts), -1, dtype=torch.int64, device=device),
        proposal=proposal,
        flags=torch.empty(rows, dtype=torch.int32, device=device),
        confidence=None if confidence is None else floats(),
        confidence_logits=None if confidence is None else floats(),
    )


def _check_out(out, base_logits, slots, rows, width, sampling, confidence, first_draft) -> int:
    """Check a caller's DraftBlock; returns the column of its first draft."""
    check_type("out", out, DraftBlock)
    device, drafts = base_logits.device, base_logits.shape[1]
    columns = check_tensor("out.tokens", out.tokens, shape=(slots, "K"), device=device).shape[1]
    column = 0 if columns == drafts else first_draft
    if columns < column + drafts:
        raise ValueError(f"out.tokens: expected {drafts} or at least {first_draft + drafts} columns, got {columns}")
    check_tensor("out.flags", out.flags, shape=(rows,), device=device)
    if confidence is not None:
        for name in ("confidence", "confidence_logits"):
            check_tensor(f"out.{name}", getattr(out, name), shape=(slots, columns), device=device)
    elif out.confidence is not None or out.confidence_logits is not None:
        raise ValueError("out.confidence: expected None because no `confidence` head is given, got a tensor")
    proposal = out.proposal
    sparse = isinstance(proposal, SparseProposal)
    if sampling is not None and not sparse:
        raise TypeError(f"out.proposal: expected SparseProposal with `sampling` and `candidates`, got {type(proposal).__name__}")
    if not sparse:
        check_type("out.proposal", proposal, OneHotProposal)
        return column
    shape = (slots, columns, width)
    check_tensor("out.proposal.ids", proposal.ids, shape=shape, device=device)
    check_tensor("out.proposal.logits", proposal.logits, dtype=base_logits.dtype, shape=shape, device=device)
    if sampling is None:
        if proposal.lse is not None:
            raise ValueError("out.proposal.lse: expected None for a greedy block, got a tensor")
        if proposal.temperature is None:
            raise ValueError("out.proposal.temperature: expected zeros [S] for a greedy block (its law is one-hot), got None")
    elif proposal.lse is not None:
        check_tensor("out.proposal.lse", proposal.lse, shape=(slots, columns), device=device)
    return column


# Low bits that no value of a dtype sets in fp32: keys of such logits are told apart without them.
_UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@library.register(
    "draft_candidates(Tensor base_logits, Tensor anchors, Tensor anchor_positions, Tensor? w1, Tensor? w2, Tensor? w2_scale, "
    "Tensor? latent_weight, Tensor? latent_bias, Tensor? hidden, Tensor? weight, Tensor? bias, Tensor? sts_temperatures, "
    "Tensor? temperature, Tensor? seed, Tensor? bigrams, Tensor? draft_to_target, Tensor? state_indices, Tensor(a!) tokens, "
    "Tensor(b!)? confidence, Tensor(c!)? confidence_logits, Tensor(d!)? ids, Tensor(e!)? logits, Tensor(f!)? lse, "
    "Tensor(g!) flags, Tensor(h!) counters, Tensor(i!) scratch, int candidates, int first_draft, int column, bool coupled) -> ()"
)
def _draft_candidates(
    base_logits, anchors, anchor_positions, w1, w2, w2_scale, latent_weight, latent_bias, hidden, weight, bias, sts_temperatures,
    temperature, seed, bigrams, draft_to_target, state_indices, tokens, confidence, confidence_logits, ids, logits, lse, flags,
    counters, scratch, candidates, first_draft, column, coupled,
):  # fmt: skip
    device = base_logits.device
    kernels = library.kernels("candidates", device)
    rows, drafts, vocab = base_logits.shape
    rank = 0 if w1 is None else w1.shape[1]
    listed = 0 if bigrams is None else bigrams.shape[1]
    outputs = 0 if latent_weight is None else latent_weight.shape[0]
    gpu = arch.current(device)
    weights = "bfloat16" if w2 is None else str(w2.dtype).removeprefix("torch.")
    config = launch.pick(gpu, drafts, vocab, candidates, listed, rank, weights, outputs)

    clean = workspaces.Carver(counters, workspaces.RESERVED)
    row_count, request_count = clean.take(rows * drafts, torch.int32), clean.take(rows, torch.int32)
    status = clean.take(rows, torch.int32)
    carver, positions = workspaces.Carver(scratch), rows * drafts
    keys = carver.take(positions * _units(vocab, config.group), torch.int32)
    units, best = (carver.take(positions * candidates, torch.int32) for _ in range(2))
    bounds, scores = carver.take(2 * positions, torch.int32), carver.take(positions, torch.float32)
    products, latents = carver.take(positions * outputs, torch.float32), carver.take(3 * rows * rank, torch.float32)

    head = latent = heard = confident = follow = kind = None
    if w1 is not None:
        # Bytes of e4m3 are decoded by the kernel: not every architecture has the type.
        stored = w2.view(torch.uint8) if w2.dtype == torch.float8_e4m3fn else w2
        head, kind = (w1, w1.stride(0), stored, w2.stride(0), w2_scale, w1.shape[0], rank), "vanilla"
    if latent_weight is not None:
        kind = "gated" if outputs == rank else "rnn"
        columns = 0 if kind == "gated" else 2 * rank
        latent = (latent_weight, latent_weight.stride(0), latent_bias, outputs, columns)
    if hidden is not None:
        heard = (hidden, hidden.stride(0), hidden.stride(1), hidden.shape[2])
    if weight is not None:
        results = (confidence, confidence.stride(0), confidence_logits, confidence_logits.stride(0))
        confident = (weight, bias, sts_temperatures, *results)
    if bigrams is not None:
        follow = (bigrams, bigrams.stride(0), bigrams.shape[0], listed)

    def stride(tensor, dim):
        return 0 if tensor is None else tensor.stride(dim)

    latent_items = kernels.latent_programs(positions, outputs)
    parts = launch.parts(gpu, positions, -(-vocab // config.block))
    kernels.launch_draft_candidates(
        latent_items + positions * parts,
        (
            (base_logits, base_logits.stride(0), base_logits.stride(1)),
            (anchors, anchors.stride(0), anchor_positions, anchor_positions.stride(0), state_indices, temperature, seed),
            follow, draft_to_target, head, latent, heard, confident,
            (
                tokens, tokens.stride(0), ids, stride(ids, 0), stride(ids, 1), logits, stride(logits, 0), stride(logits, 1), lse,
                stride(lse, 0), flags,
            ),
            keys, units, (best, bounds, scores, products, latents), row_count, request_count, status,
            rows, anchors.shape[0], drafts, vocab, candidates, first_draft, column, latent_items, parts,
        ),
        kind=kind,
        coupled=coupled,
        with_markov=weight is not None and weight.shape[0] > hidden.shape[2],
        shift=_UNUSED_BITS[base_logits.dtype],
        config=config,
    )  # fmt: skip
