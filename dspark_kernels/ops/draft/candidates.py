"""draft_block on candidates: each position restricted to its C best base logits, and to listed successors of the draft before it.

S_k = the C ids of the largest base_k (ties: lowest ids) and bigrams[x_{k-1}],  x_k ~ softmax over S_k of (base_k + bias) / T.
The proposal is sparse by construction. Oracle: reference/candidates.py. Source: DSpark, arXiv 2607.05147.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import INT_DTYPES, check_int, check_tensor
from ...kernels.draft.args import (
    BaseLogits,
    CandidateConfidence,
    CandidateCounters,
    CandidateHead,
    CandidateWidths,
    Hidden,
    Latent,
    RequestState,
    Selection,
    SparseOutputs,
    Successors,
    WalkScratch,
)
from ...launch import arch
from ...launch.draft import candidates as launch
from ...types import DraftBlock, SparseProposal
from ..sampling import SCHEMA, Flat, adjust_settings, flatten
from .outputs import allocate, check_out

OP = "draft_block"
NEEDS = "draft_block candidates"
LEAST_GROUP = 16  # ids of the smallest unit of any configuration


def _units(vocab: int, group: int) -> int:
    """Words per row for the keys of its units, as kernels/draft/candidates.py has them."""
    return -(-vocab // (16 * group)) * 16


@workspaces.declare(NEEDS)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    rows, int32 = requests * drafts, torch.int32
    counters = 2 * workspaces.words_of(requests, int32) + workspaces.words_of(rows, int32)
    scratch = workspaces.words_of(rows * _units(vocab, LEAST_GROUP), int32)
    scratch += 2 * workspaces.words_of(rows * launch.MAX_CANDIDATES, int32) + workspaces.words_of(2 * rows, int32)
    return counters, scratch + workspaces.words_of(rows, int32)


def draft_candidates(
    base_logits, anchors, head, mixing, *, anchor_positions, sampling, hidden, confidence, candidates, bigrams, draft_to_target,
    targets, first_draft, head_state, noise, state_indices, keep_logits, out, workspace,
) -> DraftBlock:  # fmt: skip
    """ops.draft.draft_block where `candidates` is given, its other arguments checked. mixing: weight and bias of a gated or rnn
    head, or two None; targets: how many target ids there are."""
    check_int("candidates", candidates, low=1, high=launch.MAX_CANDIDATES)
    rows, drafts, vocab = base_logits.shape
    device, slots = base_logits.device, anchors.shape[0]
    width = candidates + _check_bigrams(bigrams, device)
    common = (base_logits, slots, rows, sampling, confidence)
    if out is None:
        column = 0
        out = allocate(*common, keep_logits=keep_logits, scattered=state_indices is not None, candidates=width)
    else:
        column = check_out(out, *common, first_draft, candidates=width)
    if rows == 0:
        return out
    sparse = out.proposal if isinstance(out.proposal, SparseProposal) else None
    counters, scratch = _lend(workspace, rows, drafts, vocab, head, mixing[0], device)
    _draft_candidates(
        base_logits,
        anchors,
        anchor_positions,
        None if head is None else head.w1,
        None if head is None else head.w2,
        None if head is None else head.w2_scale,
        *mixing,
        hidden if confidence is not None or mixing[0] is not None else None,
        None if confidence is None else confidence.weight,
        None if confidence is None else confidence.bias,
        None if confidence is None else confidence.sts_temperatures,
        *flatten(sampling),
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
        head_state,
        counters,
        scratch,
        candidates,
        targets,
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


def _lend(workspace, rows, drafts, vocab, head, weight, device):
    if weight is None:
        return workspaces.lend(NEEDS, workspace, rows, drafts, vocab, device)
    counters, scratch = _needs(rows, drafts, vocab)
    scratch += workspaces.latent_words(rows, drafts, head.rank, weight.shape[0] // head.rank)
    message = f"expected room for {rows} requests x {drafts} drafts over {vocab} ids and markov_rank={head.rank}"
    return workspaces.lend_words(workspace, counters, scratch, device, message)


# Low bits that no value of a dtype sets in fp32: keys of such logits are told apart without them.
_UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@library.register(
    "draft_candidates(Tensor base_logits, Tensor anchors, Tensor anchor_positions, Tensor? w1, Tensor? w2, Tensor? w2_scale, "
    "Tensor? latent_weight, Tensor? latent_bias, Tensor? hidden, Tensor? weight, Tensor? bias, Tensor? sts_temperatures, "
    f"{SCHEMA}, Tensor? bigrams, Tensor? draft_to_target, Tensor? state_indices, Tensor(a!) tokens, "
    "Tensor(b!)? confidence, Tensor(c!)? confidence_logits, Tensor(d!)? ids, Tensor(e!)? logits, Tensor(f!)? lse, "
    "Tensor(g!) flags, Tensor(h!)? head_state, Tensor(i!) counters, Tensor(j!) scratch, int candidates, "
    "int targets, int first_draft, int column, bool coupled) -> ()"
)
def _draft_candidates(
    base_logits, anchors, anchor_positions, w1, w2, w2_scale, latent_weight, latent_bias, hidden, weight, bias, sts_temperatures,
    temperature, seed, top_k, top_p, min_p, logit_bias, token_bitmask, listed, counts, repetition, presence, frequency, joint,
    bigrams, draft_to_target, state_indices, tokens, confidence, confidence_logits, ids, logits, lse, flags, head_state,
    counters, scratch, candidates, targets, first_draft, column, coupled,
):  # fmt: skip
    device = base_logits.device
    kernels = library.kernels("draft.candidates", device)
    rows, drafts, vocab = base_logits.shape
    rank = 0 if w1 is None else w1.shape[1]
    listed_after = 0 if bigrams is None else bigrams.shape[1]
    sampling = Flat(
        temperature, seed, top_k, top_p, min_p, logit_bias, token_bitmask, listed, counts, repetition, presence, frequency, joint
    )
    adjust, filters = adjust_settings(sampling) if sampling.adjusts else None, sampling.filters
    outputs = 0 if latent_weight is None else latent_weight.shape[0]
    gpu = arch.current(device)
    weights = "bfloat16" if w2 is None else str(w2.dtype).removeprefix("torch.")
    settings = adjust is not None or filters is not None or draft_to_target is not None
    config = launch.pick(gpu, drafts, vocab, candidates, listed_after, rank, weights, outputs, settings)

    clean = workspaces.Carver(counters, workspaces.RESERVED)
    carver, positions = workspaces.Carver(scratch), rows * drafts
    counters = CandidateCounters(
        row_ptr=clean.take(positions, torch.int32),
        request_ptr=clean.take(rows, torch.int32),
        status_ptr=clean.take(rows, torch.int32),
    )
    selection = Selection(
        keys_ptr=carver.take(positions * _units(vocab, config.group), torch.int32),
        units_ptr=carver.take(positions * candidates, torch.int32),
        ids_ptr=carver.take(positions * candidates, torch.int32),
        bounds_ptr=carver.take(2 * positions, torch.int32),
    )
    walk = walk_records(
        w1, w2, w2_scale, latent_weight, latent_bias, hidden, weight, bias, sts_temperatures, confidence, confidence_logits,
        head_state, rows, drafts, carver.take(positions, torch.float32), carver,
    )  # fmt: skip
    successors = None
    if bigrams is not None:
        successors = Successors(ptr=bigrams, stride=bigrams.stride(0), vocab=bigrams.shape[0], count=listed_after)
    latent_items = kernels.latent_programs(positions, outputs)
    parts = launch.parts(gpu, positions, -(-vocab // config.block))
    kernels.launch_draft_candidates(
        latent_items + positions * parts,
        (
            BaseLogits(ptr=base_logits, stride_request=base_logits.stride(0), stride_position=base_logits.stride(1)),
            request_state(anchors, anchor_positions, state_indices, temperature, seed),
            successors, draft_to_target, adjust, filters, walk.head, walk.latent, walk.hidden, walk.confidence,
            sparse_outputs(tokens, ids, logits, lse, flags), selection, walk.scratch, counters,
            rows, anchors.shape[0], drafts, CandidateWidths(vocab=vocab, num_targets=targets, num_candidates=candidates),
            first_draft, column, latent_items, parts,
        ),
        kind=walk.kind,
        coupled=coupled,
        with_markov=weight is not None and weight.shape[0] > hidden.shape[2],
        joint=joint and filters is not None,
        shift=unused_bits(base_logits, adjust),
        config=config,
    )  # fmt: skip


def unused_bits(base_logits: Tensor, adjust) -> int:
    """Low bits that no key of a candidate sets; adjusted logits are fp32."""
    return 0 if adjust is not None else _UNUSED_BITS[base_logits.dtype]


def stride_of(tensor: Tensor | None, dim: int) -> int:
    return 0 if tensor is None else tensor.stride(dim)


def request_state(anchors, anchor_positions, state_indices, temperature, seed) -> RequestState:
    return RequestState(
        anchors_ptr=anchors,
        stride_anchors=anchors.stride(0),
        positions_ptr=anchor_positions,
        stride_positions=anchor_positions.stride(0),
        slots_ptr=state_indices,
        temperature_ptr=temperature,
        seed_ptr=seed,
    )


def sparse_outputs(tokens, ids, logits, lse, flags) -> SparseOutputs:
    return SparseOutputs(
        tokens_ptr=tokens,
        stride_tokens=tokens.stride(0),
        ids_ptr=ids,
        stride_ids=stride_of(ids, 0),
        stride_ids_position=stride_of(ids, 1),
        logits_ptr=logits,
        stride_logits=stride_of(logits, 0),
        stride_logits_position=stride_of(logits, 1),
        lse_ptr=lse,
        stride_lse=stride_of(lse, 0),
        flags_ptr=flags,
    )


def hidden_states(hidden: Tensor | None) -> Hidden | None:
    if hidden is None:
        return None
    return Hidden(ptr=hidden, stride_request=hidden.stride(0), stride_position=hidden.stride(1), size=hidden.shape[2])


def head_records(w1, w2, w2_scale, latent_weight, latent_bias, head_state=None) -> tuple[str | None, CandidateHead, Latent]:
    """(kind of head, its record, that of a gated or rnn head), each None where the call has no such thing."""
    if w1 is None:
        return None, None, None
    # Bytes of e4m3 are decoded by the kernel: not every architecture has the type.
    stored = w2.view(torch.uint8) if w2.dtype == torch.float8_e4m3fn else w2
    head = CandidateHead(
        w1_ptr=w1, stride_w1=w1.stride(0), w2_ptr=stored, stride_w2=w2.stride(0), scale_ptr=w2_scale, vocab=w1.shape[0],
        rank=w1.shape[1],
    )  # fmt: skip
    if latent_weight is None:
        return "vanilla", head, None
    outputs, rank = latent_weight.shape[0], w1.shape[1]
    # Input order: [h; W1[x]] of a gated head, [state; W1[x]; h] of an rnn.
    kind, hidden_column = ("gated", 0) if outputs == rank else ("rnn", 2 * rank)
    latent = Latent(
        weight_ptr=latent_weight, stride_weight=latent_weight.stride(0), bias_ptr=latent_bias, outputs=outputs,
        hidden_column=hidden_column, carried_ptr=head_state, stride_carried=stride_of(head_state, 0),
    )  # fmt: skip
    return kind, head, latent


class Walk(NamedTuple):
    """What the walk over a request's positions takes of a head and of confidence."""

    kind: str | None
    head: CandidateHead | None
    latent: Latent | None
    hidden: Hidden | None
    confidence: CandidateConfidence | None
    scratch: WalkScratch


def walk_records(
    w1, w2, w2_scale, latent_weight, latent_bias, hidden, weight, bias, sts_temperatures, confidence, confidence_logits, head_state,
    rows, drafts, scores, carver,
) -> Walk:  # fmt: skip
    """scores: fp32 [R, K] of the scratch; what a gated or rnn head needs beside it is taken from `carver`."""
    kind, head, latent = head_records(w1, w2, w2_scale, latent_weight, latent_bias, head_state)
    products = latents = states = None
    if latent is not None:
        products = carver.take(rows * drafts * latent.outputs, torch.float32)
        # Rounded to W1's type where W2 has the same or is exact in it, as in the dense form.
        exact = w2.dtype in (w1.dtype, torch.int8, torch.float8_e4m3fn)
        latents = carver.take(rows * head.rank, w1.dtype if exact else torch.float32)
        if kind == "rnn":
            states = carver.take(2 * rows * head.rank, torch.float32)
    confident = None
    if weight is not None:
        confident = CandidateConfidence(
            weight_ptr=weight, bias_ptr=bias, sts_ptr=sts_temperatures, scores_ptr=confidence, stride_scores=confidence.stride(0),
            raw_ptr=confidence_logits, stride_raw=confidence_logits.stride(0),
        )  # fmt: skip
    scratch = WalkScratch(score_ptr=scores, products_ptr=products, latent_ptr=latents, states_ptr=states)
    return Walk(kind, head, latent, hidden_states(hidden), confident, scratch)
