"""What the check of a draft block needs beside the reference: latents of a head in one precision, and the logits before filters."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import dspark_kernels as dk


def latents_of(head, embedded: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Latents [K, r] of one request in `dtype`."""
    embedded, hidden = embedded.to(dtype), hidden.to(dtype)
    if isinstance(head, dk.GatedMarkovHead):
        gate = torch.cat([hidden, embedded], -1) @ head.gate_weight.to(dtype).T + head.gate_bias.to(dtype)
        return torch.sigmoid(gate) * embedded
    if not isinstance(head, dk.RnnMarkovHead):
        return embedded
    state, found = torch.zeros(head.rank, dtype=dtype), []
    for e, h in zip(embedded, hidden, strict=True):
        gate, candidate, output = (head.joint_weight.to(dtype) @ torch.cat([state, e, h]) + head.joint_bias.to(dtype)).chunk(3)
        gate = torch.sigmoid(gate)
        state = gate * state + (1 - gate) * torch.tanh(candidate)
        found.append(torch.tanh(output))
    return torch.stack(found)


def unfiltered(inputs: dict, block: dk.DraftBlock) -> Tensor:
    """The logits that the filters were applied to: the same drafts again, one position per call, without filters."""
    given = inputs | dict(sampling=dataclasses.replace(inputs["sampling"], top_k=None, top_p=None), confidence=None)
    rows = []
    for k in range(block.tokens.shape[1]):
        anchors = inputs["anchors"] if k == 0 else block.tokens[:, k - 1].contiguous()
        base = inputs["base_logits"][:, k : k + 1]
        rows.append(dk.draft_block(**given | dict(base_logits=base, anchors=anchors, first_draft=k)).proposal.logits)
    return torch.cat(rows, 1)
