"""SamplingTensors on their way to a kernel: checked against the call, flat through torch.library, bundled for a launch.

What the settings do is said in types.SamplingTensors; the device functions are kernels/primitives/{adjust,filters}.py.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..checks import check_optional, check_tensor, check_type
from ..kernels.args import Adjustments, Bias, FilterSettings, Mask, Penalties
from ..types import DenseProposal, OneHotProposal, SamplingTensors, SparseProposal

AnyProposal = TypeVar("AnyProposal", bound=OneHotProposal | DenseProposal | SparseProposal | None)


class Flat(NamedTuple):
    """Sampling settings as an op's arguments; all None for a greedy call."""

    temperature: Tensor | None = None
    seed: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    logit_bias: Tensor | None = None
    token_bitmask: Tensor | None = None
    listed: Tensor | None = None
    counts: Tensor | None = None
    repetition: Tensor | None = None
    presence: Tensor | None = None
    frequency: Tensor | None = None
    joint: bool = False

    @property
    def filters(self) -> FilterSettings | None:
        """The filters; None if none is given."""
        if self.top_k is None and self.top_p is None and self.min_p is None:
            return None
        return FilterSettings(self.top_k, self.top_p, self.min_p)

    @property
    def adjusts(self) -> bool:
        return not (self.logit_bias is None and self.token_bitmask is None and self.listed is None)


def flatten(sampling: SamplingTensors | None) -> Flat:
    if sampling is None:
        return Flat()
    penalties = sampling.penalties
    return Flat(
        sampling.temperature,
        sampling.seed,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.logit_bias,
        sampling.token_bitmask,
        None if penalties is None else penalties.token_ids,
        None if penalties is None else penalties.counts,
        None if penalties is None else penalties.repetition,
        None if penalties is None else penalties.presence,
        None if penalties is None else penalties.frequency,
        sampling.filter_order == "joint",
    )


def adjust_settings(sampling: SamplingTensors | Flat | None) -> Adjustments:
    """The settings that kernels apply to logits before temperature."""
    flat = sampling if isinstance(sampling, Flat) else flatten(sampling)
    bias = None if flat.logit_bias is None else Bias(flat.logit_bias, flat.logit_bias.stride(0))
    mask = None
    if flat.token_bitmask is not None:
        words = flat.token_bitmask.flatten(0, -2)  # [S, K, words] of a drafter: row slot * K + k
        mask = Mask(words, words.stride(0))
    penalties = None
    if flat.listed is not None and flat.counts is not None:  # both or neither
        penalties = Penalties(
            flat.listed, flat.listed.stride(0), flat.counts, flat.counts.stride(0), flat.listed.shape[1],
            flat.repetition, flat.presence, flat.frequency,
        )  # fmt: skip
    return Adjustments(bias, mask, penalties)


def check_sampling(sampling: SamplingTensors | None, *, slots: int | None, vocab: int, mask_shape: tuple[int, ...],
                   device: torch.device) -> None:  # fmt: skip
    """Check settings against a call. slots: S where known; vocab: V; mask_shape: leading shape of token_bitmask."""
    if sampling is None:
        return
    check_type("sampling", sampling, SamplingTensors)
    check_tensor("sampling.temperature", sampling.temperature, shape=("S" if slots is None else slots,), device=device)
    check_optional("sampling.logit_bias", sampling.logit_bias, shape=(sampling.temperature.shape[0], vocab), device=device)
    if sampling.token_bitmask is not None:
        mask = check_tensor("sampling.token_bitmask", sampling.token_bitmask, device=device, shape=(*mask_shape, -(-vocab // 32)))
        if mask.dim() == 3 and mask.shape[0] > 1 and mask.stride(0) != mask.shape[1] * mask.stride(1):
            raise ValueError(
                f"sampling.token_bitmask: expected slots that follow each other without gaps, got strides {list(mask.stride())}"
            )
    penalties = sampling.penalties
    if penalties is not None:
        check_tensor("sampling.penalties.token_ids", penalties.token_ids, device=device,
                     shape=(sampling.temperature.shape[0], "T"))  # fmt: skip


def of_scaled_target(sampling: SamplingTensors | None, proposal: AnyProposal) -> tuple[SamplingTensors | None, AnyProposal]:
    """Settings and proposal for target rows that were divided by their temperature already.

    The target's temperature is 1, or 0 where a row is greedy: one launch of torch. A proposal keeps the temperature of `sampling`
    where it has none of its own. What comes before temperature is refused; a bit mask gives the same before and after.
    """
    if sampling is None:
        return None, proposal
    for name in ("logit_bias", "penalties"):
        if getattr(sampling, name) is not None:
            raise ValueError(f"sampling.{name}: expected None with target_scaled, because it acts before temperature, got a value")
    if isinstance(proposal, (DenseProposal, SparseProposal)) and proposal.temperature is None:
        proposal = dataclasses.replace(proposal, temperature=sampling.temperature)
    return dataclasses.replace(sampling, temperature=sampling.temperature.sign()), proposal


def needs_no(op: str, sampling: SamplingTensors | None, fields: tuple[str, ...], why: str) -> None:
    """Refuse settings that an op's variant does not support."""
    for name in fields:
        if sampling is not None and getattr(sampling, name) is not None:
            raise NotImplementedError(f"{op}: sampling.{name}: not supported {why}")
