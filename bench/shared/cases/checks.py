"""What the check of a case compares: exact conditions, fp64 bounds, outcomes by request."""

from __future__ import annotations

from torch import Tensor

ULP = 2.0**-23


def require(condition, message: str) -> None:
    """Assert, also under python -O."""
    if not condition:
        raise AssertionError(message)


def close(actual, exact, bound: float, what: str) -> None:
    """max |actual - exact| <= bound, exact in fp64; NaN never passes."""
    error = (actual.double() - exact).abs().max().item()
    require(error <= bound, f"{what}: error {error:.3g} exceeds {bound:.3g}")


def largest(x: Tensor) -> float:
    return max(1.0, x.abs().max().item())


def by_request(*columns) -> dict[int, tuple]:
    return dict(enumerate(zip(*(column.tolist() for column in columns), strict=True)))
