"""Logistic function and hyperbolic tangent to fp32 accuracy over the whole range."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    decay = tl.exp2(tl.abs(x) * -1.4426950408889634)
    return tl.where(x < 0.0, decay, 1.0) / (1.0 + decay)


@triton.jit
def tanh(x):
    """Near 0 by its series, where 1 - exp would cancel."""
    y = x * x
    series = x * (1.0 + y * (-0.33333333 + y * (0.13333333 + y * (-0.053968254 + y * 0.021869488))))
    decay = tl.exp2(tl.abs(x) * -2.8853900817779268)
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(y < 0.0625, series, tl.where(x < 0.0, -far, far))
