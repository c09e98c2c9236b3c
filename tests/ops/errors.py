"""Bound on a float result: eager PyTorch's own error against fp64, in the same dtype."""

import torch

# One unit in the last place of fp32: below this, two correct fp32 computations differ by their order of summation alone.
ULP = 2.0**-23


def excess_error(actual, eager, exact, what, summed=0.0):
    """Fail unless max |actual - exact| <= 2 max |eager - exact| + one fp32 ulp of the largest value.

    actual and eager in the op's dtype, exact in fp64. Twice, because the largest of a few rounding errors is itself random.
    summed: the largest sum of |terms| that a value was made from, where terms cancel: its ulp counts, not that of what is left.
    Values that are not finite must be the same.
    """
    actual, eager, exact = (x.double() for x in (actual, eager, exact))
    finite = exact.isfinite() & eager.isfinite()
    assert torch.equal(actual[~finite], eager[~finite]), f"{what}: values that are not finite differ"
    if not finite.any():
        return
    error = (actual - exact)[finite].abs().max().item()
    bound = 2 * (eager - exact)[finite].abs().max().item() + ULP * max(1.0, exact[finite].abs().max().item(), summed)
    assert error <= bound, f"{what}: error {error:.3g} exceeds {bound:.3g}"
