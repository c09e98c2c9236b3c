"""draft_block: a whole block of drafts under the sequential head in one launch.

x_k ~ softmax((base_k + bias(x_{k-1})) / T), k = 1..K, x_0 = the anchor; confidence_k = sigmoid((w . [h_k; W1[x_{k-1}]] + b) /
T_k). Reference: reference/draft.py. Source: DSpark, arXiv 2607.05147, sections on the sequential and the confidence head.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ... import library, workspace as workspaces
from ...checks import INT_DTYPES, LOGIT_DTYPES, check_choice, check_distinct, check_int, check_optional, check_tensor, check_type
from ...choices import NOISES, Noise
from ...kernels.draft.args import (
    BlockInputs,
    BlockResults,
    BlockScratch,
    BlockStrides,
    BlockWidths,
    Confidence,
    Head,
    Projection,
    Support,
)
from ...kernels.sizes import FILTER_LIST, MAX_GROUP, SUB_BLOCK
from ...launch import arch
from ...launch.draft import dense as draft_launch
from ...library import Out
from ...types import ConfidenceHead, DenseProposal, DraftBlock, GatedMarkovHead, MarkovHead, RnnMarkovHead, SamplingTensors
from ..sampling import Flat, adjust_settings, check_sampling, flatten
from .args import (
    ConfidenceWeights,
    MixedHead,
    confidence_weights,
    has_latents,
    latent_room,
    product_type,
    stride_of,
    type_name,
    weights_of,
)
from .candidates import draft_candidates
from .outputs import allocate, check_out

OP = "draft_block"


def _counters(take: workspaces.Take, requests: int, drafts: int) -> tuple[Tensor, Tensor]:
    """The winners' packed keys, and what rows showed. The barrier is the reserved words."""
    return take(requests * drafts, torch.int64), take(requests, torch.int32)


def _scratch(take: workspaces.Take, requests: int, drafts: int, vocab: int) -> tuple[Tensor, Tensor, Support]:
    """Maxima and sums of sub-blocks, and the thresholds that filters find for a row."""
    rows, sub_blocks, groups = requests * drafts, -(-vocab // SUB_BLOCK), -(-vocab // MAX_GROUP)
    sub_block_max, sub_block_sumexp = take(rows * sub_blocks, torch.float32), take(rows * sub_blocks, torch.int64)
    support = Support(
        None,
        None,
        None,
        threshold_ptr=take(requests, torch.int64),
        cut_ptr=take(requests, torch.int32),
        maxima_ptr=take(requests * groups, torch.float32),
        groups_ptr=take(requests * groups, torch.int32),
        keys_ptr=take(requests * FILTER_LIST, torch.int32),
        ids_ptr=take(requests * FILTER_LIST, torch.int32),
    )
    return sub_block_max, sub_block_sumexp, support


@workspaces.declare(OP)
def _needs(requests: int, drafts: int, vocab: int) -> tuple[int, int]:
    return workspaces.measured(_counters, requests, drafts), workspaces.measured(_scratch, requests, drafts, vocab)


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
    vocab_size: int | None = None,
    first_draft: int = 0,
    head_state: Tensor | None = None,
    noise: Noise = "draft",
    state_indices: Tensor | None = None,
    keep_logits: bool = False,
    out: DraftBlock | None = None,
    workspace: workspaces.Workspace | None = None,
) -> DraftBlock:
    """Draft positions first_draft + 1 .. first_draft + K of every request, left to right, in one launch.

    Args:
        base_logits: [R, K, V] bf16, fp16 or fp32, last dimension contiguous: the backbone's logits.
        anchors: int64 or int32 [S] (R without `state_indices`), the last emitted token of each request; where first_draft > 0,
            the token of draft first_draft instead.
        head: MarkovHead, GatedMarkovHead, RnnMarkovHead (w1 [V1, r] by target id, w2 [V, r]) or None for independent positions.
        anchor_positions: int64 or int32 [S], absolute position of the anchor; draft k is decided for position + k.
        sampling: settings per slot; None = every row greedy, and so is a row of temperature <= 0. Penalties, logit_bias and mask
            are applied to base logits + bias of the head, before these are rounded. Penalties count the drafts of this call
            before a position and, where `out` is wider than K, those in the columns before. logit_bias and mask are by target
            id; token_bitmask is [S, K, words] for the positions of this call. The proposal holds -inf where filters removed an id.
        hidden: [R, K, H], needed by `confidence`, gated and rnn heads.
        confidence: ConfidenceHead; its weight is [H], or [H + r] with the Markov input.
        candidates: C, 1 to 256: restrict each position to its C best base logits after penalties, logit_bias and mask (ties keep
            the lowest ids). The proposal is then sparse. An id gets the same noise as without `candidates`.
        bigrams: int32 or int64 [V, B], with `candidates` only: row x has the successors of token x, ids of the head's vocabulary
            (-1 = unused) that join the candidates of a position after x. A position then has C + B entries.
        draft_to_target: int64 [V], the target's id of every id of the draft vocabulary; each at most once; a negative
            entry, or one that W1, bias or mask do not know, stands for no token.
            The tokens of the block, the rows of W1, the addresses of the noise and the order of ties are target ids. For a table
            of offsets (target = draft + offset, as in EAGLE-3's d2t) see `ids_from_offsets`.
        vocab_size: the vocabulary is the first vocab_size columns of base_logits and rows of w2; the rest is padding and never
            read. None = all of them.
        first_draft: number of positions drafted before this call; drafters with a pass per draft call with K = 1 and
            first_draft = 0, 1, 2, ...
        head_state: fp32 [S, r], the state of an rnn head: written by every call, read where first_draft > 0.
        noise: "draft", or "coupled" where acceptance uses the coupled rule.
        state_indices: int32 or int64 [R], request slot of each row, -1 = padding row.
        keep_logits: store the logits of a greedy block too; its proposal is then dense with temperature 0.
        out: a DraftBlock to write, [S, K]; or wider, and draft first_draft + k goes to column first_draft + k - 1.
        workspace: scratch memory; with `out` and `workspace` nothing is allocated. A gated or rnn head needs one with room for
            its latents: Workspace(..., markov_rank=r).

    Returns:
        DraftBlock. Its proposal is dense (logits in base_logits' dtype, lse) with `sampling`, one-hot without. With `candidates` it
        is sparse instead: ids in ascending order of the head's vocabulary, then the successors. An entry without a candidate
        (V < C, an unused or repeated successor, an id that stands for no token) is id 0 with logit -inf.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or stride.
        RuntimeError: no Triton, or CPU tensors without its interpreter.
    """
    base_logits, head = _check_vocabulary(base_logits, head, vocab_size)
    rows, drafts, vocab = _check_inputs(base_logits, anchors, anchor_positions, state_indices)
    device, slots = base_logits.device, anchors.shape[0]
    check_choice("noise", noise, NOISES)
    check_int("first_draft", first_draft, low=0)
    check_optional("draft_to_target", draft_to_target, dtype=torch.int64, shape=(vocab,), device=device, contiguous=True)
    targets = _check_sampling(sampling, head, draft_to_target, slots, drafts, vocab, device)
    hidden_size = _check_hidden(hidden, head, confidence, rows, drafts, device)
    _check_head(head, head_state, vocab, hidden_size, first_draft, slots, device)
    _check_confidence(confidence, hidden_size, head, drafts, first_draft, device)
    if candidates is not None:
        return draft_candidates(
            base_logits, anchors, head, anchor_positions=anchor_positions, sampling=sampling, hidden=hidden,
            confidence=confidence, candidates=candidates, bigrams=bigrams, draft_to_target=draft_to_target, targets=targets,
            first_draft=first_draft, head_state=head_state, noise=noise, state_indices=state_indices, keep_logits=keep_logits,
            out=out, workspace=workspace,
        )  # fmt: skip
    if bigrams is not None:
        raise ValueError("bigrams: expected None without `candidates`, got a tensor")

    common = (base_logits, slots, rows, sampling, confidence)
    if out is None:
        column = 0
        out = allocate(*common, keep_logits=keep_logits, scattered=state_indices is not None, draft_to_target=draft_to_target)
    else:
        column = check_out(out, *common, first_draft, draft_to_target=draft_to_target)
    if rows == 0:
        return out
    dense = out.proposal if isinstance(out.proposal, DenseProposal) else None
    room = latent_room(head, rows, drafts)
    lent = workspaces.lend(OP, workspace, rows, drafts, vocab, device, **room)
    arguments = Arguments(
        base_logits=base_logits,
        anchors=anchors,
        anchor_positions=anchor_positions,
        head=MixedHead(*weights_of(head)),
        hidden=hidden if confidence is not None or has_latents(head) else None,
        confidence_head=confidence_weights(confidence),
        sampling=flatten(sampling),
        draft_to_target=draft_to_target,
        state_indices=state_indices,
        tokens=out.tokens,
        confidence=out.confidence,
        confidence_logits=out.confidence_logits,
        logits=None if dense is None else dense.logits,
        lse=None if dense is None else dense.lse,
        flags=out.flags,
        head_state=head_state,
        lent=lent,
        targets=targets,
        first_draft=first_draft,
        column=column,
        coupled=noise == "coupled",
    )
    _draft_block(arguments)
    return out


def _check_vocabulary(base_logits: Tensor, head: MarkovHead | None, vocab_size: int | None) -> tuple[Tensor, MarkovHead | None]:
    """base_logits and head without their padding."""
    if vocab_size is None:
        return base_logits, head
    check_tensor("base_logits", base_logits, dtype=LOGIT_DTYPES, shape=("R", "K", "V"), last_contiguous=True)
    check_int("vocab_size", vocab_size, low=1, high=base_logits.shape[2])
    if head is not None:
        check_type("head", head, MarkovHead)
        if head.w2.shape[0] < vocab_size:
            raise ValueError(f"head.w2: expected at least vocab_size = {vocab_size} rows, got {head.w2.shape[0]}")
        scale = None if head.w2_scale is None else head.w2_scale[:vocab_size]
        head = dataclasses.replace(head, w2=head.w2[:vocab_size], w2_scale=scale)
    return base_logits[:, :, :vocab_size], head


def _check_inputs(
    base_logits: Tensor, anchors: Tensor, anchor_positions: Tensor, state_indices: Tensor | None
) -> tuple[int, int, int]:
    """(R, K, V)."""
    check_tensor("base_logits", base_logits, dtype=LOGIT_DTYPES, shape=("R", "K", "V"), last_contiguous=True)
    rows, drafts, vocab = base_logits.shape
    device = base_logits.device
    if drafts == 0 or vocab == 0:
        raise ValueError(f"base_logits: expected K >= 1 and V >= 1, got shape {list(base_logits.shape)}")
    slots: int | str = rows if state_indices is None else "S"
    check_tensor("anchors", anchors, dtype=INT_DTYPES, shape=(slots,), device=device)
    check_tensor("anchor_positions", anchor_positions, dtype=INT_DTYPES, shape=(anchors.shape[0],), device=device)
    check_optional("state_indices", state_indices, dtype=INT_DTYPES, shape=(rows,), device=device, contiguous=True)
    return rows, drafts, vocab


def _check_sampling(
    sampling: SamplingTensors | None,
    head: MarkovHead | None,
    draft_to_target: Tensor | None,
    slots: int,
    drafts: int,
    vocab: int,
    device: torch.device,
    columns: int | None = None,
) -> int:
    """Number of target ids that all tables have; an entry of `draft_to_target` at or above it stands for no token.

    columns: those of the map that are not padding, None = all.
    """
    known = [2**31 - 1 if draft_to_target is not None else vocab]
    if sampling is not None:
        check_type("sampling", sampling, SamplingTensors)
        if sampling.token_bitmask is not None:
            words = check_tensor("sampling.token_bitmask", sampling.token_bitmask, shape=(slots, drafts, "words")).shape[2]
            known.append(32 * words)
        if sampling.logit_bias is not None:
            known.append(sampling.logit_bias.shape[1])
        check_sampling(sampling, slots=slots, vocab=known[-1], mask_shape=(slots, drafts), device=device)
    if draft_to_target is not None:
        targets = min(known + ([] if head is None else [head.w1.shape[0]]))
        check_distinct("draft_to_target", draft_to_target, targets, columns)
        return targets
    if min(known) < vocab:
        raise ValueError(f"sampling: expected logit_bias and token_bitmask for {vocab} ids, got room for {min(known)}")
    return vocab


def _check_hidden(
    hidden: Tensor | None,
    head: MarkovHead | None,
    confidence: ConfidenceHead | None,
    rows: int,
    drafts: int,
    device: torch.device,
) -> int:
    """H, 0 where nothing reads `hidden`."""
    reader = "`confidence`" if confidence is not None else None
    if isinstance(head, (GatedMarkovHead, RnnMarkovHead)):
        reader = f"a {type(head).__name__}"
    if reader is None:
        return 0
    if hidden is None:
        raise ValueError(f"hidden: expected [R, K, H] because {reader} is given, got None")
    check_tensor("hidden", hidden, dtype=LOGIT_DTYPES, shape=(rows, drafts, "H"), device=device, last_contiguous=True)
    return hidden.shape[2]


def _check_head(
    head: MarkovHead | None,
    head_state: Tensor | None,
    vocab: int,
    hidden_size: int,
    first_draft: int,
    slots: int,
    device: torch.device,
) -> None:
    if head is not None:
        check_type("head", head, MarkovHead)
        check_tensor("head.w1", head.w1, device=device)
        check_tensor("head.w2", head.w2, shape=(vocab, head.rank), device=device)
        check_optional("head.w2_scale", head.w2_scale, device=device, contiguous=True)
    if isinstance(head, GatedMarkovHead):
        check_tensor("head.gate_weight", head.gate_weight, shape=(head.rank, hidden_size + head.rank), device=device)
        check_tensor("head.gate_bias", head.gate_bias, device=device, contiguous=True)
    if isinstance(head, RnnMarkovHead):
        check_tensor("head.joint_weight", head.joint_weight, shape=(3 * head.rank, 2 * head.rank + hidden_size), device=device)
        check_tensor("head.joint_bias", head.joint_bias, device=device, contiguous=True)
        if first_draft > 0 and head_state is None:
            raise ValueError("head_state: expected fp32 [S, r] because an RnnMarkovHead goes on at first_draft > 0, got None")
        check_optional("head_state", head_state, dtype=torch.float32, shape=(slots, head.rank), device=device, last_contiguous=True)
    elif head_state is not None:
        raise ValueError(f"head_state: expected None because {type(head).__name__} has no state, got a tensor")


def _check_confidence(
    confidence: ConfidenceHead | None,
    hidden_size: int,
    head: MarkovHead | None,
    drafts: int,
    first_draft: int,
    device: torch.device,
) -> None:
    if confidence is None:
        return
    check_type("confidence", confidence, ConfidenceHead)
    width = confidence.weight.shape[0]
    markov = width == hidden_size + head.rank if head is not None else False
    if width != hidden_size and not markov:
        wanted = f"[{hidden_size}]" + ("" if head is None else f" or [{hidden_size + head.rank}]")
        raise ValueError(f"confidence.weight: expected shape {wanted}, got [{width}]")
    check_tensor("confidence.weight", confidence.weight, device=device)
    temperatures = confidence.sts_temperatures
    if temperatures is not None and temperatures.shape[0] < first_draft + drafts:
        raise ValueError(
            f"confidence.sts_temperatures: expected at least {first_draft + drafts} entries, got {temperatures.shape[0]}"
        )


class Arguments(NamedTuple):
    """The op as torch.library knows it."""

    base_logits: Tensor
    anchors: Tensor
    anchor_positions: Tensor
    head: MixedHead
    hidden: Tensor | None
    confidence_head: ConfidenceWeights
    sampling: Flat
    draft_to_target: Tensor | None
    state_indices: Tensor | None
    tokens: Out[Tensor]
    confidence: Out[Tensor | None]
    confidence_logits: Out[Tensor | None]
    logits: Out[Tensor | None]
    lse: Out[Tensor | None]
    flags: Out[Tensor]
    head_state: Out[Tensor | None]
    lent: workspaces.Lent
    targets: int
    first_draft: int
    column: int
    coupled: bool


@library.register("draft_block", Arguments)
def _draft_block(a: Arguments) -> None:
    device, sampling = a.base_logits.device, a.sampling
    kernels = library.kernels("draft.dense", device)
    rows, drafts, vocab = a.base_logits.shape
    gpu = arch.current(device)
    adjust = adjust_settings(sampling) if sampling.adjusts else None
    filtered = sampling.filters is not None
    one_tile = draft_launch.is_one_tile(rows)
    head, dot_type, widening = head_record(a.head)
    rank = 1 if head is None else head.rank
    mixed, widened = a.head.mix_weight is not None, a.head.w2_scale is not None
    ranks = draft_launch.ranks_per_dot(gpu, rank, mixed, widened, sampling.adjusts, filtered)
    config = draft_launch.pick(gpu, vocab, rank, dot_type.itemsize, one_tile, ranks)
    if filtered:
        config = draft_launch.beside_filters(gpu, config)
    if widening == "fp8":
        widening, config = draft_launch.decode_fp8(config, one_tile)
    one_dot = rank <= config.block_r
    most = draft_launch.most_requests(gpu, sampling.adjusts or filtered, not one_dot or widening == "fp8_by_bits")

    counters, take = workspaces.Carver(a.lent.counters), workspaces.Carver(a.lent.scratch).take
    barrier = counters.take(2 * workspaces.RESERVED, torch.int32)
    sub_block_max, sub_block_sumexp, support = _scratch(take, rows, drafts, vocab)
    best, status = _counters(counters.take, rows, drafts)
    memory = BlockScratch(
        best_ptr=best, status_ptr=status, barrier_ptr=barrier, sub_block_max_ptr=sub_block_max,
        sub_block_sumexp_ptr=sub_block_sumexp
    )  # fmt: skip
    kind, projection, mix_type = projection_record(a.head, a.hidden, a.head_state, rows * drafts, rows, 2 * rows, dot_type, take)
    if sampling.filters is not None:
        top_k, top_p, min_p = sampling.filters
        support = support._replace(top_k_ptr=top_k, top_p_ptr=top_p, min_p_ptr=min_p)
    groups = -(-vocab // MAX_GROUP)
    kernels.launch_draft_dense(
        min(-(-vocab // config.block_v), gpu.multiprocessors * config.programs_per_sm),
        (
            BlockInputs(
                base_ptr=a.base_logits, anchors_ptr=a.anchors, positions_ptr=a.anchor_positions, slots_ptr=a.state_indices,
                map_ptr=a.draft_to_target, hidden_ptr=a.hidden, temperature_ptr=sampling.temperature, seed_ptr=sampling.seed,
            ),
            head, projection, adjust, support if filtered else None,
            confidence_record(a.confidence_head, a.confidence, a.confidence_logits),
            BlockResults(tokens_ptr=a.tokens, logits_ptr=a.logits, lse_ptr=a.lse, flags_ptr=a.flags), memory,
        ),
        (
            rows, a.anchors.shape[0], drafts,
            BlockWidths(vocab=vocab, num_targets=a.targets, hidden=0 if a.hidden is None else a.hidden.shape[2]),
            a.first_draft, a.column,
            BlockStrides(
                base_request=a.base_logits.stride(0), base_position=a.base_logits.stride(1), anchors=a.anchors.stride(0),
                positions=a.anchor_positions.stride(0), hidden_request=stride_of(a.hidden, 0),
                hidden_position=stride_of(a.hidden, 1), tokens=a.tokens.stride(0), logits=stride_of(a.logits, 0),
                logits_position=stride_of(a.logits, 1), lse=stride_of(a.lse, 0),
            ),
        ),
        drafts=drafts,
        projection=kind,
        widening=widening,
        dot_type=type_name(dot_type),
        mix_type=type_name(mix_type),
        coupled=a.coupled,
        with_markov=a.confidence_head.with_markov(a.hidden),
        one_dot=one_dot,
        joint=sampling.joint and filtered,
        groups=max(2, 1 << (groups - 1).bit_length()) if filtered else 2,
        filtered=filtered,
        rows=draft_launch.request_tile(rows, most),
        fast_log2=gpu.vendor == "nvidia",
        config=config,
    )  # fmt: skip


def head_record(head: MixedHead) -> tuple[Head | None, torch.dtype, str]:
    """(the head's record, type of its product with W2, how W2 is widened; "fp8" is decided by the launch)."""
    w1, w2 = head.w1, head.w2
    if w1 is None or w2 is None:  # neither: there is no head
        return None, torch.float32, "by_cast"
    dot_type, widening = product_type(w1, w2), "by_cast"
    if w2.dtype == torch.float8_e4m3fn:
        # As bytes: not every GPU's compiler takes pointers to e4m3.
        widening, w2 = "fp8", w2.view(torch.uint8)
    record = Head(
        w1_ptr=w1, w2_ptr=w2, scale_ptr=head.w2_scale, stride_w1=w1.stride(0), stride_w2=w2.stride(0), vocab=w1.shape[0],
        rank=w1.shape[1],
    )  # fmt: skip
    return record, dot_type, widening


def projection_record(
    head: MixedHead,
    hidden: Tensor | None,
    head_state: Tensor | None,
    products: int,
    latents: int,
    states: int,
    dot_type: torch.dtype,
    take: workspaces.Take,
) -> tuple[str | None, Projection | None, torch.dtype]:
    """(kind, Projection, type of its products) of a head with latents.

    products, latents, states: rows of its scratch, as `workspaces.latents_of` takes them with `take`.
    """
    if head.mix_weight is None:
        return None, None, torch.float32
    assert head.w1 is not None and hidden is not None  # what latents are made of
    rank = head.w1.shape[1]
    parts = head.mix_weight.shape[0] // rank
    kind = "gated" if parts == 1 else "rnn"
    # Input order: [h; W1[x]] of a gated head, [state; W1[x]; h] of an rnn.
    hidden_column, w1_column = (0, hidden.shape[2]) if kind == "gated" else (2 * rank, rank)
    precomputed, latent, state = workspaces.latents_of(take, products, latents, states, rank, parts, dot_type)
    projection = Projection(
        weight_ptr=head.mix_weight,
        bias_ptr=head.mix_bias,
        stride_weight=head.mix_weight.stride(0),
        hidden_column=hidden_column,
        w1_column=w1_column,
        precomputed_ptr=precomputed,
        latent_ptr=latent,
        state_ptr=state,
        carried_ptr=head_state,
        stride_carried=stride_of(head_state, 0),
    )
    same = head.mix_weight.dtype == head.w1.dtype == hidden.dtype
    return kind, projection, head.mix_weight.dtype if same else torch.float32


def confidence_record(head: ConfidenceWeights, confidence: Tensor | None, confidence_logits: Tensor | None) -> Confidence | None:
    if head.weight is None:
        return None
    assert confidence is not None and confidence_logits is not None  # written where there is a head
    return Confidence(
        weight_ptr=head.weight, bias_ptr=head.bias, sts_ptr=head.sts_temperatures, scores_ptr=confidence,
        raw_ptr=confidence_logits, stride_scores=confidence.stride(0), stride_raw=confidence_logits.stride(0),
    )  # fmt: skip
