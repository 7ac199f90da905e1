"""The experts in float32, one token's choice at a time in order, for autograd to differentiate."""

import torch
from torch.nn import functional as F

ACTIVATIONS = {
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "linear": lambda x: x,
}


def experts(x, index, weights, up, down, up_bias, down_bias, low, widen, narrow, *formula):
    assert low is widen is narrow is None
    activation, gated, transposed, interleaved, limit, shift = formula
    if transposed:
        up, down = up.mT, down.mT
    act = ACTIVATIONS[activation]
    output = torch.zeros_like(x)
    for expert in range(len(up)):
        token, slot = torch.where(index == expert)
        hidden = F.linear(x[token], up[expert], None if up_bias is None else up_bias[expert])
        if gated:
            gate, hidden = (hidden[:, ::2], hidden[:, 1::2]) if interleaved else hidden.chunk(2, -1)
            if limit is not None:
                gate, hidden = gate.clamp(max=limit), hidden.clamp(-limit, limit)
            hidden = act(gate) * (hidden + shift)
        else:
            hidden = act(hidden)
        rows = F.linear(hidden, down[expert], None if down_bias is None else down_bias[expert])
        output = output.index_add(0, token, rows * weights[token, slot, None])
    return output
