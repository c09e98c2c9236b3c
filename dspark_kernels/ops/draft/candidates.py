"""draft_block on candidates: each position restricted to its C best base logits, and to the successors (`bigrams`) of the draft
before it.

S_k = the C ids of the largest base_k (ties: lowest ids) and bigrams[x_{k-1}],  x_k ~ softmax over S_k of (base_k + bias) / T.
The proposal is sparse by construction. Reference: reference/candidates.py. Source: DSpark, arXiv 2607.05147.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import INT_DTYPES, check_int, check_tensor
from ...choices import Noise
from ...kernels.args import Adjustments
from ...kernels.draft.args import (
    CandidateWidths,
    Confidence,
    Head,
    Hidden,
    Latent,
    RequestState,
    Selection,
    Successors,
    WalkScratch,
)
from ...launch import arch
from ...launch.draft import candidates as launch
from ...library import Out
from ...types import ConfidenceHead, DraftBlock, MarkovHead, SamplingTensors
from ..sampling import Flat, adjust_settings, flatten
from .args import (
    ConfidenceWeights,
    LatentHead,
    SparseResults,
    base_record,
    confidence_weights,
    has_latents,
    latent_room,
    product_type,
    sparse_results,
    stride_of,
    weights_name,
    weights_of,
)
from .outputs import allocate, check_out

NEEDS = "draft_block candidates"
LEAST_GROUP = 16  # ids of the smallest sub-block of any configuration


def _sub_block_words(vocab: int, group: int) -> int:
    """Words per row for the keys of its sub-blocks, packed as in kernels/draft/candidates.py."""
    return -(-vocab // (16 * group)) * 16


def selection_of(take: workspaces.Take, positions: int, vocab: int, group: int, candidates: int) -> Selection:
    """Scratch for finding the best ids of every position, with sub-blocks of `group` ids; its counters are the caller's to add."""
    return Selection(
        keys_ptr=take(positions * _sub_block_words(vocab, group), torch.int32),
        sub_blocks_ptr=take(positions * candidates, torch.int32),
        ids_ptr=take(positions * candidates, torch.int32),
        bounds_ptr=None,
        arrivals_ptr=None,
    )


class _Counters(NamedTuple):
    """Zero before and after."""

    row_arrivals: Tensor
    arrivals: Tensor
    status: Tensor


def _counters(take: workspaces.Take, requests: int, drafts: int) -> _Counters:
    return _Counters(*(take(size, torch.int32) for size in (requests * drafts, requests, requests)))


def walk_scratch(take: workspaces.Take, positions: int, width: int) -> WalkScratch:
    """Scratch of the walk that heads of every kind need, without counters. width: entries of a position, padded."""
    scores, noise = take(positions, torch.float32), take(positions * width, torch.float32)
    return WalkScratch(
        score_ptr=scores, noise_ptr=noise, products_ptr=None, latent_ptr=None, states_ptr=None, arrivals_ptr=None, status_ptr=None
    )


def _scratch(
    take: workspaces.Take, positions: int, vocab: int, group: int, candidates: int, width: int
) -> tuple[Selection, WalkScratch]:
    """Scratch for finding the candidates, and for the walk."""
    selection = selection_of(take, positions, vocab, group, candidates)
    return selection._replace(bounds_ptr=take(2 * positions, torch.int32)), walk_scratch(take, positions, width)


@workspaces.declare(NEEDS)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    most = (requests * drafts, vocab, LEAST_GROUP, launch.MAX_CANDIDATES, launch.MAX_WIDTH)
    return workspaces.measured(_counters, requests, drafts), workspaces.measured(_scratch, *most)


def draft_candidates(
    base_logits: Tensor,
    anchors: Tensor,
    head: MarkovHead | None,
    *,
    anchor_positions: Tensor,
    sampling: SamplingTensors | None,
    hidden: Tensor | None,
    confidence: ConfidenceHead | None,
    candidates: int,
    bigrams: Tensor | None,
    draft_to_target: Tensor | None,
    targets: int,
    first_draft: int,
    head_state: Tensor | None,
    noise: Noise,
    state_indices: Tensor | None,
    keep_logits: bool,
    out: DraftBlock | None,
    workspace: workspaces.Workspace | None,
) -> DraftBlock:
    """`draft_block` with `candidates`, its other arguments checked. targets: number of target ids."""
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
    room = latent_room(head, rows, drafts)
    lent = workspaces.lend(NEEDS, workspace, rows, drafts, vocab, device, **room)
    arguments = Arguments(
        base_logits=base_logits,
        anchors=anchors,
        anchor_positions=anchor_positions,
        head=LatentHead(*weights_of(head)),
        hidden=hidden if confidence is not None or has_latents(head) else None,
        confidence_head=confidence_weights(confidence),
        sampling=flatten(sampling),
        bigrams=bigrams,
        draft_to_target=draft_to_target,
        state_indices=state_indices,
        results=sparse_results(out),
        head_state=head_state,
        lent=lent,
        candidates=candidates,
        targets=targets,
        first_draft=first_draft,
        column=column,
        coupled=noise == "coupled",
    )
    _draft_candidates(arguments)
    return out


def _check_bigrams(bigrams: Tensor | None, device: torch.device) -> int:
    if bigrams is None:
        return 0
    check_tensor("bigrams", bigrams, dtype=INT_DTYPES, shape=("V", "B"), device=device, last_contiguous=True)
    successors = bigrams.shape[1]
    if not 1 <= successors <= launch.MAX_SUCCESSORS:
        raise ValueError(f"bigrams: expected 1 to {launch.MAX_SUCCESSORS} successors per token, got {successors}")
    return successors


# Low bits that no value of a dtype sets in fp32: keys of such logits are told apart without them.
_UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


class Arguments(NamedTuple):
    """The op as torch.library knows it."""

    base_logits: Tensor
    anchors: Tensor
    anchor_positions: Tensor
    head: LatentHead
    hidden: Tensor | None
    confidence_head: ConfidenceWeights
    sampling: Flat
    bigrams: Tensor | None
    draft_to_target: Tensor | None
    state_indices: Tensor | None
    results: SparseResults
    head_state: Out[Tensor | None]
    lent: workspaces.Lent
    candidates: int
    targets: int
    first_draft: int
    column: int
    coupled: bool


@library.register("draft_candidates", Arguments)
def _draft_candidates(a: Arguments) -> None:
    device, sampling = a.base_logits.device, a.sampling
    kernels = library.kernels("draft.candidates", device)
    rows, drafts, vocab = a.base_logits.shape
    successors_after = 0 if a.bigrams is None else a.bigrams.shape[1]
    adjust, filters = adjust_settings(sampling) if sampling.adjusts else None, sampling.filters
    gpu = arch.current(device)
    weights, outputs = weights_name(a.head.w2), a.head.outputs
    settings = adjust is not None or filters is not None or a.draft_to_target is not None
    config = launch.pick(gpu, drafts, vocab, a.candidates, successors_after, a.head.rank, weights, outputs, settings)

    positions = rows * drafts
    counters = _counters(workspaces.Carver(a.lent.counters, workspaces.RESERVED).take, rows, drafts)
    take = workspaces.Carver(a.lent.scratch).take
    selection, scratch = _scratch(take, positions, vocab, config.group, a.candidates, config.width)
    selection = selection._replace(arrivals_ptr=counters.row_arrivals)
    scratch = scratch._replace(arrivals_ptr=counters.arrivals, status_ptr=counters.status)
    walk = walk_records(a.head, a.hidden, a.confidence_head, a.results, a.head_state, rows, drafts, scratch, take)
    successors = None
    if a.bigrams is not None:
        successors = Successors(ptr=a.bigrams, stride=a.bigrams.stride(0), vocab=a.bigrams.shape[0], count=successors_after)
    else:
        selection = selection._replace(bounds_ptr=None)
    parts = launch.parts(gpu, positions, -(-vocab // config.block))
    kernels.launch_draft_candidates(
        kernels.latent_programs(positions, outputs) + positions * parts,
        (
            base_record(a.base_logits),
            request_state(a.anchors, a.anchor_positions, a.state_indices, sampling),
            successors, adjust, filters, walk.head, walk.latent, walk.hidden, walk.confidence,
            a.results.outputs(), selection, walk.scratch,
            rows, a.anchors.shape[0], drafts,
            CandidateWidths(vocab=vocab, map_ptr=a.draft_to_target, num_targets=a.targets, num_candidates=a.candidates),
            a.first_draft, a.column,
        ),
        kind=walk.kind,
        coupled=a.coupled,
        with_markov=a.confidence_head.with_markov(a.hidden),
        joint=sampling.joint and filters is not None,
        shift=unused_bits(a.base_logits, adjust),
        rank=a.head.rank,
        config=config,
    )  # fmt: skip


def unused_bits(base_logits: Tensor, adjust: Adjustments | None) -> int:
    """Low bits that are 0 in every key of a candidate; adjusted logits are fp32."""
    return 0 if adjust is not None else _UNUSED_BITS[base_logits.dtype]


def request_state(anchors: Tensor, anchor_positions: Tensor, state_indices: Tensor | None, sampling: Flat) -> RequestState:
    return RequestState(
        anchors_ptr=anchors,
        stride_anchors=anchors.stride(0),
        positions_ptr=anchor_positions,
        stride_positions=anchor_positions.stride(0),
        slots_ptr=state_indices,
        temperature_ptr=sampling.temperature,
        seed_ptr=sampling.seed,
    )


def hidden_states(hidden: Tensor | None) -> Hidden | None:
    if hidden is None:
        return None
    return Hidden(ptr=hidden, stride_request=hidden.stride(0), stride_position=hidden.stride(1), size=hidden.shape[2])


def head_records(head: LatentHead, head_state: Tensor | None = None) -> tuple[str | None, Head | None, Latent | None]:
    """(kind of head, its record, the record of a gated or rnn head); None where the call has no such head."""
    w1, w2, weight, rank = head.w1, head.w2, head.latent_weight, head.rank
    if w1 is None or w2 is None:  # neither: there is no head
        return None, None, None
    # Bytes of e4m3 are decoded by the kernel: not every architecture has the type.
    stored = w2.view(torch.uint8) if w2.dtype == torch.float8_e4m3fn else w2
    record = Head(
        w1_ptr=w1, stride_w1=w1.stride(0), w2_ptr=stored, stride_w2=w2.stride(0), scale_ptr=head.w2_scale, vocab=w1.shape[0],
        rank=rank,
    )  # fmt: skip
    if weight is None:
        return "vanilla", record, None
    # Input order: [h; W1[x]] of a gated head, [state; W1[x]; h] of an rnn.
    kind, hidden_column = ("gated", 0) if head.outputs == rank else ("rnn", 2 * rank)
    latent = Latent(
        weight_ptr=weight, stride_weight=weight.stride(0), bias_ptr=head.latent_bias, outputs=head.outputs,
        hidden_column=hidden_column, carried_ptr=head_state, stride_carried=stride_of(head_state, 0),
    )  # fmt: skip
    return kind, record, latent


class Walk(NamedTuple):
    """The head and the confidence head, as the walk over a request's positions takes them."""

    kind: str | None
    head: Head | None
    latent: Latent | None
    hidden: Hidden | None
    confidence: Confidence | None
    scratch: WalkScratch


def walk_records(
    head: LatentHead,
    hidden: Tensor | None,
    confidence_head: ConfidenceWeights,
    results: SparseResults,
    head_state: Tensor | None,
    rows: int,
    drafts: int,
    scratch: WalkScratch,
    take: workspaces.Take,
) -> Walk:
    """scratch: of `walk_scratch`; `take` gives what a gated or rnn head needs beside it."""
    kind, record, latent = head_records(head, head_state)
    if latent is not None:
        assert head.w1 is not None and head.w2 is not None  # of a head with latents
        # Latents are rounded as in the dense form.
        sizes = (rows * drafts, rows, 2 * rows, head.rank, head.outputs // head.rank, product_type(head.w1, head.w2))
        products, latents, states = workspaces.latents_of(take, *sizes)
        scratch = scratch._replace(products_ptr=products, latent_ptr=latents, states_ptr=states)
    confident = None
    if confidence_head.weight is not None:
        assert results.confidence is not None and results.confidence_logits is not None  # written where there is a head
        confident = Confidence(
            weight_ptr=confidence_head.weight, bias_ptr=confidence_head.bias, sts_ptr=confidence_head.sts_temperatures,
            scores_ptr=results.confidence, stride_scores=results.confidence.stride(0), raw_ptr=results.confidence_logits,
            stride_raw=results.confidence_logits.stride(0),
        )  # fmt: skip
    return Walk(kind, record, latent, hidden_states(hidden), confident, scratch)
