"""Records that kernels of several folders take: pointers, each with its strides beside it. Needs no Triton: ops build them.

A record is one kernel argument. A field that is None compiles to nothing, and its branches are left out. Symbols: S request slots,
V vocabulary, T penalised tokens of a slot, N forward rows, L logit rows, R requests.
"""

from typing import Any, NamedTuple

Pointer = Any  # a tensor in an op, a pointer in a kernel


@property
def functions_key(record) -> str:
    """`cache_key` of a record with functions that is one constexpr.

    Triton's disk cache names a tuple by its text, in which a function is its name alone: a binary would be taken from there after
    the function's source has changed. With this attribute it asks the record.
    """
    return "-".join(getattr(field, "cache_key", str(field)) for field in record)


class Bias(NamedTuple):
    """Added to logits, [S, V]."""

    ptr: Pointer
    stride: int


class Mask(NamedTuple):
    """Bits of the ids that are allowed, int32 [rows, words]."""

    ptr: Pointer
    stride: int


class Penalties(NamedTuple):
    """Tokens int32 or int64 [S, T] and how often each was emitted, int32 [S, T]; each penalty fp32 [S] or None."""

    token_ids_ptr: Pointer
    stride_ids: int
    counts_ptr: Pointer
    stride_counts: int
    num_tokens: int
    repetition_ptr: Pointer | None
    presence_ptr: Pointer | None
    frequency_ptr: Pointer | None


class Adjustments(NamedTuple):
    """What is done to a logit before temperature (primitives/adjust.py)."""

    bias: Bias | None
    mask: Mask | None
    penalties: Penalties | None


class FilterSettings(NamedTuple):
    """top-k int32, top-p and min-p fp32, each [S] or None."""

    top_k_ptr: Pointer | None
    top_p_ptr: Pointer | None
    min_p_ptr: Pointer | None
