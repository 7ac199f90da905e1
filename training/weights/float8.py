"""Mixed-precision training with the products of linear layers in float8, by torchao, where the card has it.

Weights, gradients and optimizer states stay as they are: forward and both backward products scale their operands to
float8 (e4m3, gradients e5m2) as they are needed, a scale for each tensor. Routed experts are no linear layers, and the
router, the embeddings and the head stay in the precision they had.
"""

from importlib.util import find_spec

import torch
from torch import nn

CAPABILITY = (8, 9)  # Ada, Hopper and later multiply in float8


def check_float8(device: torch.device) -> None:
    """Raises ValueError where the package or the card for it is missing."""
    if find_spec("torchao") is None:
        raise ValueError("float8 is true, which needs torchao: pip install 'hf_moe[float8]'.")
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if found is None or found < CAPABILITY:
        has = "a CPU" if found is None else f"compute capability {found[0]}.{found[1]}"
        raise ValueError(f"float8 is true, which needs a GPU of compute capability 8.9 or more, and this is {has}.")


def suits(module: nn.Module, name: str) -> bool:
    """Whether a linear layer may multiply in float8: not the head, and sides that are multiples of 16."""
    return isinstance(module, nn.Linear) and "lm_head" not in name and all(x % 16 == 0 for x in module.weight.shape)


def compute_in_float8(model: nn.Module, emulate: bool = False) -> str:
    """Swap the linear layers of `model` that suit it; returns what that did, in words. `emulate`: without such a card.

    Raises ValueError where none suits.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    linear = [name for name, module in model.named_modules() if suits(module, name)]
    if not linear:
        raise ValueError("float8 is true, but no linear layer has sides that are multiples of 16.")
    convert_to_float8_training(model, config=Float8LinearConfig(emulate=emulate), module_filter_fn=suits)
    swapped = [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]
    assert swapped == linear, (swapped, linear)
    count = sum(model.get_submodule(name).weight.numel() for name in linear)
    whole = sum(x.numel() for x in model.parameters())
    return f"float8 products in {len(linear)} linear layers: {count:,} of {whole:,} parameters ({count / whole:.2%})"
