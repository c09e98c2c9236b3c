"""Runs of arguments that several ops of drafting have, as torch.library knows them; all None where a call has no such thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import workspace as workspaces
from ...kernels.draft.args import BaseLogits, SparseOutputs
from ...library import Out
from ...types import ConfidenceHead, DraftBlock, GatedMarkovHead, MarkovHead, RnnMarkovHead, SparseProposal


class MixedHead(NamedTuple):
    """A head of a dense block or of a tree of known shape."""

    w1: Tensor | None = None
    w2: Tensor | None = None
    w2_scale: Tensor | None = None
    mix_weight: Tensor | None = None
    mix_bias: Tensor | None = None

    @property
    def outputs(self) -> int:
        """Rows of the weight that latents are made with."""
        return 0 if self.mix_weight is None else self.mix_weight.shape[0]


class LatentHead(NamedTuple):
    """A head of a block on candidates or of a best-first tree."""

    w1: Tensor | None = None
    w2: Tensor | None = None
    w2_scale: Tensor | None = None
    latent_weight: Tensor | None = None
    latent_bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.w1 is None else self.w1.shape[1]

    @property
    def outputs(self) -> int:
        """Rows of the weight that latents are made with."""
        return 0 if self.latent_weight is None else self.latent_weight.shape[0]


Weights = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def weights_of(head: MarkovHead | None) -> Weights:
    """The fields of a MixedHead or a LatentHead for this head."""
    if head is None:
        return None, None, None, None, None
    return head.w1, head.w2, head.w2_scale, *mixing(head)


def mixing(head: MarkovHead | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight [P r, inputs] and bias [P r] from which a head makes its latents; None for vanilla and no head."""
    if isinstance(head, GatedMarkovHead):
        return head.gate_weight, head.gate_bias
    if isinstance(head, RnnMarkovHead):
        return head.joint_weight, head.joint_bias
    return None, None


def has_latents(head: MarkovHead | None) -> bool:
    return mixing(head)[0] is not None


def latent_room(
    head: MarkovHead | None, requests: int, drafts: int, words: Callable[[int, int, int, int], int] = workspaces.latent_words
) -> dict[str, int]:
    """What `workspace.lend` must know of a head: the rank of its latents, and the scratch that they need by `words`."""
    weight, _ = mixing(head)
    if head is None or weight is None:
        return dict(rank=0, latents=0)
    return dict(rank=head.rank, latents=words(requests, drafts, head.rank, weight.shape[0] // head.rank))


class ConfidenceWeights(NamedTuple):
    """A confidence head."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    sts_temperatures: Tensor | None = None

    def with_markov(self, hidden: Tensor | None) -> bool:
        """Whether it reads W1[x] beside the hidden states [R, K, H]."""
        return self.weight is not None and hidden is not None and self.weight.shape[0] > hidden.shape[2]


def confidence_weights(confidence: ConfidenceHead | None) -> ConfidenceWeights:
    if confidence is None:
        return ConfidenceWeights()
    return ConfidenceWeights(confidence.weight, confidence.bias, confidence.sts_temperatures)


class SparseResults(NamedTuple):
    """What a block on candidates writes."""

    tokens: Out[Tensor]
    confidence: Out[Tensor | None]
    confidence_logits: Out[Tensor | None]
    ids: Out[Tensor | None]
    logits: Out[Tensor | None]
    lse: Out[Tensor | None]
    flags: Out[Tensor]

    def outputs(self) -> SparseOutputs:
        return SparseOutputs(
            tokens_ptr=self.tokens,
            stride_tokens=self.tokens.stride(0),
            ids_ptr=self.ids,
            stride_ids=stride_of(self.ids, 0),
            stride_ids_position=stride_of(self.ids, 1),
            logits_ptr=self.logits,
            stride_logits=stride_of(self.logits, 0),
            stride_logits_position=stride_of(self.logits, 1),
            lse_ptr=self.lse,
            stride_lse=stride_of(self.lse, 0),
            flags_ptr=self.flags,
        )


def sparse_results(block: DraftBlock) -> SparseResults:
    sparse = block.proposal if isinstance(block.proposal, SparseProposal) else None
    return SparseResults(
        tokens=block.tokens,
        confidence=block.confidence,
        confidence_logits=block.confidence_logits,
        ids=None if sparse is None else sparse.ids,
        logits=None if sparse is None else sparse.logits,
        lse=None if sparse is None else sparse.lse,
        flags=block.flags,
    )


def base_record(base_logits: Tensor) -> BaseLogits:
    return BaseLogits(ptr=base_logits, stride_request=base_logits.stride(0), stride_position=base_logits.stride(1))


def stride_of(tensor: Tensor | None, dim: int) -> int:
    return 0 if tensor is None else tensor.stride(dim)


def product_type(w1: Tensor, w2: Tensor) -> torch.dtype:
    """Type of the operands of latent x W2: that of W1 where W2 has the same or is exact in it, else fp32."""
    return w1.dtype if w2.dtype in (w1.dtype, torch.int8, torch.float8_e4m3fn) else torch.float32


def type_name(dtype: torch.dtype) -> str:
    """The name of a dtype in launch configurations and kernels."""
    return str(dtype).removeprefix("torch.")


def weights_name(w2: Tensor | None) -> str:
    return "bfloat16" if w2 is None else type_name(w2.dtype)
