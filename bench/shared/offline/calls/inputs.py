"""Inputs of full size for calls that are captured: never touched, so their memory is never really taken."""

from __future__ import annotations

import dataclasses
import functools

import torch

import dspark_kernels as dk

VOCAB, DRAFTS, RANK, HIDDEN = 151936, 7, 256, 2560  # Qwen3-4B with its published drafter


def empty(*shape, dtype=torch.bfloat16):
    # Never touched, so the memory of full-size tensors is never really taken.
    return torch.empty(*shape, dtype=dtype)


def ints(*shape, dtype=torch.int64):
    return torch.zeros(*shape, dtype=dtype)


def id_map(size):
    return torch.arange(size)


def sampling_of(slots):
    return dk.SamplingTensors(torch.ones(slots), ints(slots))


def head_of(kind, vocab, targets, rank, dtype, w2_dtype):
    tables = empty(targets, rank, dtype=dtype), empty(vocab, rank, dtype=w2_dtype or dtype)
    scale = empty(vocab, dtype=torch.float32) if w2_dtype in (torch.int8, torch.float8_e4m3fn) else None
    if kind == "gated":
        mixing = dict(gate_weight=empty(rank, HIDDEN + rank, dtype=dtype), gate_bias=empty(rank, dtype=dtype))
        return dk.GatedMarkovHead(*tables, scale, **mixing)
    if kind == "rnn":
        mixing = dict(joint_weight=empty(3 * rank, 2 * rank + HIDDEN, dtype=dtype), joint_bias=empty(3 * rank, dtype=dtype))
        return dk.RnnMarkovHead(*tables, scale, **mixing)
    return dk.MarkovHead(*tables, scale)


def settings_of(slots, mask_rows, vocab, adjusted, filtered):
    """Temperatures and seeds; bias, bit mask [*mask_rows, words] and all penalties; all filters."""
    number = functools.partial(torch.ones, slots)
    found = {}
    if adjusted:
        lists = ints(slots, 256), ints(slots, 256, dtype=torch.int32)
        found |= dict(
            logit_bias=empty(slots, vocab, dtype=torch.float32),
            token_bitmask=ints(*mask_rows, -(-vocab // 32), dtype=torch.int32),
            penalties=dk.Penalties(*lists, number(), number(), number()),
        )
    if filtered:
        found |= dict(top_k=ints(slots, dtype=torch.int32), top_p=number(), min_p=number())
    return dataclasses.replace(sampling_of(slots), **found)


def rows_of(requests, drafts):
    """The layout of a full batch, made without a launch."""
    rows = requests * (drafts + 1)
    int32 = functools.partial(ints, dtype=torch.int32)
    return dk.VerifyLayout(
        draft_lens=int32(requests),
        query_start_loc=int32(requests + 1),
        cu_num_logits=int32(requests + 1),
        token_ids=ints(rows),
        positions=ints(rows),
        batch_indices=int32(rows),
        logits_indices=int32(rows),
        num_rows=int32(1),
        flags=int32(requests),
        max_drafts=drafts,
    )


def tree_of(slots, nodes, proposal, drawn):
    links = [ints(slots, nodes, dtype=torch.int32) for _ in range(4)]
    int32 = functools.partial(ints, dtype=torch.int32)
    return dk.DraftTree(ints(slots, nodes), *links, ints(slots, nodes), int32(slots), proposal, drawn, int32(slots))
