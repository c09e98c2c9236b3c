"""Sampling settings of a batch: mixed temperatures, seeds, penalties, biases, bit masks and filters.

    greedy requests stand among sampled ones; every filter is off in some slots; lists of penalised tokens have unused entries

Symbols: S request slots, V vocabulary. Source: `dspark_kernels.types.SamplingTensors`.
"""

from __future__ import annotations

import torch

from dspark_kernels.types import Penalties, SamplingTensors

from .tensors import generator, normal

TEMPERATURES = (0.0, 0.3, 1.0, 1.7)
ADJUSTMENTS = ("bias", "mask", "repetition", "presence", "frequency")
FILTERS = ("top_k", "top_p", "min_p")


def sampling_tensors(
    seed: int,
    slots: int,
    temperatures=TEMPERATURES,
    *,
    vocab: int = 0,
    mask_rows: int | tuple = 0,
    adjust=(),
    filters=(),
    penalised: int = 6,
    filter_order: str = "top_k_first",
    bias_dtype: torch.dtype = torch.float32,
    grid: float | None = None,
) -> SamplingTensors:
    """Mixed temperatures (greedy rows among sampled ones) and 63-bit seeds; `adjust` of ADJUSTMENTS, `filters` of FILTERS.

    mask_rows: leading shape of the bit mask. penalised: entries in each slot's list of penalised tokens, some of them unused. Every
    filter is off in some slots, and the bits beyond a mask's last id are random.
    """
    g = generator(seed)
    choice = torch.randint(0, len(temperatures), (slots,), generator=g)
    tensors = dict(
        temperature=torch.tensor(temperatures, dtype=torch.float32)[choice],
        seed=torch.randint(-(2**63), 2**63 - 1, (slots,), generator=g),
    )

    def pick(values, dtype):
        return torch.tensor(values, dtype=dtype)[torch.randint(0, len(values), (slots,), generator=g)]

    if "top_k" in filters:
        tensors["top_k"] = pick([0, 1, 2, 5, max(1, vocab // 3), vocab], torch.int32)
    if "top_p" in filters:
        tensors["top_p"] = pick([1.0, 0.1, 0.5, 0.9, 0.95], torch.float32)
    if "min_p" in filters:
        tensors["min_p"] = pick([0.0, 0.01, 0.2], torch.float32)
    if "bias" in adjust:
        tensors["logit_bias"] = normal(g, slots, vocab, dtype=bias_dtype, grid=grid)
    if "mask" in adjust:
        rows = mask_rows if isinstance(mask_rows, tuple) else (mask_rows,)
        words = torch.randint(-(2**31), 2**31, (*rows, -(-vocab // 32)), generator=g)
        tensors["token_bitmask"] = (words | torch.randint(-(2**31), 2**31, words.shape, generator=g)).to(torch.int32)
    if set(adjust) & {"repetition", "presence", "frequency"}:
        order = torch.rand(slots, max(vocab, penalised), generator=g).argsort(1)[:, :penalised]
        unused = (torch.rand(order.shape, generator=g) < 0.2) | (order >= vocab)
        strengths = {"repetition": [1.0, 1.25, 0.8], "presence": [0.0, 0.5, -0.25], "frequency": [0.0, 0.25, -0.5]}
        tensors["penalties"] = Penalties(
            token_ids=torch.where(unused, -1, order),
            counts=torch.randint(0, 4, order.shape, generator=g).to(torch.int32),
            **{name: pick(values, torch.float32) for name, values in strengths.items() if name in adjust},
        )
    return SamplingTensors(**tensors, filter_order=filter_order)
