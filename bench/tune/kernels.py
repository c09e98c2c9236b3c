"""What is tuned: how the entries of each kernel are compiled, timed and varied."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from bench.shared.cases.accept import Accept
from bench.shared.cases.attention import Attention
from bench.shared.cases.draft import Draft
from bench.shared.cases.layout import Fixed, Schedule


@dataclasses.dataclass(frozen=True)
class Tuned:
    """How the entries of a kernel are compiled, timed and varied.

    call: (bench.shared.offline.calls, shape) -> launches it there; those calls import kernels, which decides that they are compiled,
    so they are given. spec: shape -> the case that times it, or None: then it is compiled only. space: parameter -> values.
    flight: (shape, config) -> bytes that a program has on the way. importance: orders entries, the largest first.
    """

    op: str
    call: Callable
    spec: Callable
    space: dict[str, tuple]
    flight: Callable[[dict, dict], int]
    importance: Callable[[dict], float]


def _bits(kind: str) -> tuple[int, int]:
    """Bytes of an element of queries and of keys."""
    queries, keys = (int(part.split("-")[0]) // 8 for part in kind.split(", "))
    return queries, keys


def _attention_call(calls, shape):
    queries, keys = _bits(shape["kind"])
    group = {16: 2, 32: 4, 64: 8}[shape["block_m"]]
    cache = torch.float8_e4m3fn if keys == 1 else None
    dtype = torch.float32 if queries == 4 else torch.bfloat16
    calls.attention_call(64, group=group, head_dim=shape["head"], dtype=dtype, cache=cache)


def _attention_spec(shape):
    if _bits(shape["kind"]) != (2, 2):
        return None  # bench.kernels has no such case
    group = {16: 2, 32: 4, 64: 8}[shape["block_m"]]
    return Attention(32, 8192, query_heads=8 * group, head_dim=shape["head"])


def _layout_call(calls, shape):
    requests = shape["requests"]
    few = requests <= 256
    calls.layout_call(requests, prefill=not few, paged=True, slots=requests + (44 if few else 76))  # as in the report


def _schedule_requests(shape) -> int:
    return shape["candidates"] // 8


def _draft_call(calls, shape):
    requests, dtype = (1 if shape["one_tile"] else 64), getattr(torch, _OPERANDS[shape["operands"]])
    calls.draft_call(requests, dtype=dtype)


_OPERANDS = {"16 bit": "bfloat16", "32 bit": "float32"}
_ACCEPT = {
    "light": dict(),
    "middle": dict(proposal="one_hot", rule="coupled"),
    "heavy": dict(proposal="no lse"),
    "wide": dict(adjust=True),
}

KERNELS = {
    "draft": Tuned(
        op="draft_block",
        call=_draft_call,
        # bench.kernels has no case in fp32.
        spec=lambda shape: Draft(1 if shape["one_tile"] else 64) if shape["operands"] == "16 bit" else None,
        space=dict(block_v=(64, 128), num_warps=(4, 8), num_stages=(1, 2, 3), programs_per_sm=(1, 2)),
        flight=lambda shape, config: config["num_stages"] * config["block_v"] * (512 if shape["operands"] == "16 bit" else 128),
        importance=lambda shape: 8.0 + shape["one_tile"],
    ),
    "accept": Tuned(
        op="accept_chain",
        call=lambda calls, shape: calls.accept_call(64, **_ACCEPT[shape["work"]]),
        # bench.kernels has no case of the others.
        spec=lambda shape: {"light": Accept(64), "middle": Accept(64, "one_hot", rule="coupled")}.get(shape["work"]),
        space=dict(pairs=(2, 4, 8), num_warps=(4, 8), lag=(2, 3, 4), max_registers=(96, 128, 168)),
        flight=lambda shape, config: 2 * 1024 * config["pairs"],
        importance=lambda shape: 8.5,
    ),
    "attention": Tuned(
        op="tree_attention",
        call=_attention_call,
        spec=_attention_spec,
        space=dict(block_n=(16, 32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3, 4), resident=(1, 2, 3)),
        flight=lambda shape, config: 2 * config["num_stages"] * config["block_n"] * shape["head"] * _bits(shape["kind"])[1],
        importance=lambda shape: 5.0 * (_bits(shape["kind"]) == (2, 2)) * (shape["head"] == 128) + shape["block_m"] / 100,
    ),
    "schedule": Tuned(
        op="schedule_prefixes",
        call=lambda calls, shape: calls.schedule_call(_schedule_requests(shape), max_rows=shape["rows"]),
        spec=lambda shape: Schedule(_schedule_requests(shape), "causal"),
        space=dict(block=(64, 128, 256, 512, 1024), sort=(512, 1024, 2048), num_warps=(1, 2, 4, 8, 16)),
        flight=lambda shape, config: 36 * config["block"],
        importance=lambda shape: 2.0 + 0.5 * (shape["candidates"] == shape["rows"]),
    ),
    "layout": Tuned(
        op="fixed_layout",
        call=_layout_call,
        spec=lambda shape: Fixed(shape["requests"]),
        space=dict(block=(64, 128, 256, 512), num_warps=(1, 2, 4, 8)),
        flight=lambda shape, config: 32 * config["block"],
        importance=lambda shape: 1.0,
    ),
    "plan": Tuned(
        op="plan_attention",
        call=lambda calls, shape: calls.attention_call(shape["requests"], head_dim=None),
        spec=lambda shape: None,
        space=dict(block=(64, 128, 256, 512), num_warps=(2, 4, 8, 16)),
        flight=lambda shape, config: 40 * config["block"],
        importance=lambda shape: 0.5,
    ),
}


def case_bytes(kernel: str, shape: dict) -> int:
    """Bytes of the case that times this entry, 0 where there is none."""
    spec = KERNELS[kernel].spec(shape)
    return 0 if spec is None else spec.bytes
