"""Activation functions inside kernels: each returns its value and its slope; in the forward slopes are dead code."""

import triton
import triton.language as tl


@triton.jit
def silu(x):
    gate = tl.sigmoid(x)
    return x * gate, gate * (1 + x * (1 - gate))


@triton.jit
def quick_gelu(x):
    gate = tl.sigmoid(1.702 * x)
    return x * gate, gate * (1 + 1.702 * x * (1 - gate))


@triton.jit
def gelu(x):
    normal_cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return x * normal_cdf, normal_cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def gelu_tanh(x):
    inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 sqrt(2 / pi): (1 + tanh(z)) / 2 is sigmoid(2 z)
    gate = tl.sigmoid(inner)
    return x * gate, gate + x * gate * (1 - gate) * 1.5957691216057308 * (1 + 0.134145 * x * x)


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)


@triton.jit
def relu2(x):
    positive = tl.maximum(x, 0.0)
    return positive * positive, 2 * positive


@triton.jit
def linear(x):
    return x, x * 0 + 1


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """What an expert makes of gate and up (of gate alone unless GATED), and its slopes along both; see `Formula`."""
    kept, factor = gate, up
    if LIMIT is not None:
        kept = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        factor = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    value, gate_slope = ACTIVATION(kept)
    up_slope = value
    if LIMIT is not None:
        gate_slope = tl.where(gate > LIMIT, 0.0, gate_slope)
        up_slope = tl.where(tl.abs(up) > LIMIT, 0.0, value)
    if GATED:
        if SHIFT != 0:
            factor += SHIFT
        value *= factor
        gate_slope *= factor
    return value, gate_slope, up_slope


ACTIVATIONS = {
    "silu": silu,
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "relu2": relu2,
    "linear": linear,
}
