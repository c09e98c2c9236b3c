"""DSpark: the block backbone, a sequential head that makes every draft depend on the one before, and a confidence head.

    draft distribution of position k = softmax((base_k + bias(x_{k-1})) / T),  confidence_k = sigmoid(w . [h_k; W1[x_{k-1}]] + b)

x_0 is the anchor. Heads: vanilla, gated, rnn (dspark_kernels.types); the biases and the choice of tokens are
ops.draft_block's. Source: "DSpark: Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation",
arXiv 2607.05147.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dspark_kernels.types import ConfidenceHead, GatedMarkovHead, MarkovHead, RnnMarkovHead

from ..model import Target, Weights
from .block import Block


class DSpark(Block):
    """The published format (`Qwen3DSparkModel`).

    config: as for Block, and `markov_rank` (0 = no head), `markov_head_type`, `enable_confidence_head`,
    `confidence_head_with_markov`; optionally `sts_temperatures`, K numbers that calibrate the confidence. tensors: as
    for Block, and markov_head.* and confidence_head.proj.{weight, bias}. Raises ValueError as Block does.
    """

    def __init__(self, config: Mapping, tensors: Mapping[str, Tensor], target: Target):
        super().__init__(config, tensors, target)
        take, d = Weights(tensors, target.device, target.dtype), self.shape.hidden
        rank = config.get("markov_rank", 0)
        if rank:
            self.head = _sequential_head(
                config.get("markov_head_type", "vanilla"), rank, self.shape.vocab, self.draft_vocab, d, take
            )
        if config.get("enable_confidence_head", False):
            width = d + (rank if config.get("confidence_head_with_markov", False) else 0)
            sts = config.get("sts_temperatures")
            if sts is not None and len(sts) != self.max_drafts:
                raise ValueError(f"config: expected {self.max_drafts} sts_temperatures, got {len(sts)}")
            self.confidence = ConfidenceHead(
                take("confidence_head.proj.weight", 1, width)[0],
                take("confidence_head.proj.bias", 1),
                None if sts is None else torch.tensor(sts, dtype=torch.float32, device=target.device),
            )


def _sequential_head(kind: str, rank: int, vocab: int, draft_vocab: int, d: int, take: Weights) -> MarkovHead:
    tables = take("markov_head.markov_w1.weight", vocab, rank), take("markov_head.markov_w2.weight", draft_vocab, rank)
    if kind == "vanilla":
        return MarkovHead(*tables)
    if kind == "gated":
        gate = take("markov_head.gate_proj.weight", rank, d + rank)
        return GatedMarkovHead(*tables, gate_weight=gate, gate_bias=take("markov_head.gate_proj.bias", rank))
    if kind == "rnn":
        joint = take("markov_head.joint_proj.weight", 3 * rank, 2 * rank + d)
        return RnnMarkovHead(*tables, joint_weight=joint, joint_bias=take("markov_head.joint_proj.bias", 3 * rank))
    raise ValueError(f"config: expected markov_head_type 'vanilla', 'gated' or 'rnn', got {kind!r}")
