"""Mixed-precision training in FP8 as DeepSeek-V3's, https://arxiv.org/abs/2412.19437, 3.3: which parts compute in it.

Routed experts, and the linear layers of attention, dense MLPs and shared experts; all three products of each.
Embeddings, norms, routers, the head and attention's own products stay as they are, as do weights, gradients and
optimizer states. The kernels are hf_moe's own (hf_moe/kernels/fp8).
"""

from collections import Counter
from importlib.util import find_spec

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_moe.kernels.fp8.experts import obstacle, ragged
from hf_moe.kernels.fp8.format import BLOCK
from hf_moe.kernels.fp8.linear import LEAST, Fp8Linear, suits
from hf_moe.kernels.fp8.linear import compute_in_fp8 as compute_linear

from ..host import can_choose_experts
from .groups import parts_of

CAPABILITY = (9, 0)  # Hopper: its tensor cores and its copies of tiles are what the kernels are made for
LINEAR = ("attention", "dense_mlp", "shared_experts")
OURS = (None, "auto", "hf_moe")  # experts implementations that leave it to these kernels


def check_fp8(device: torch.device) -> None:
    """Raises ValueError where Triton or the card for it is missing."""
    if find_spec("triton") is None:
        raise ValueError("fp8 is true, which needs Triton: pip install 'hf_moe[kernels]'.")
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if found is None or found < CAPABILITY:
        has = "a CPU" if found is None else f"compute capability {found[0]}.{found[1]}"
        raise ValueError(f"fp8 is true, which needs a GPU of compute capability 9.0 (Hopper) or more; this is {has}.")


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of routed experts whose computation can be chosen."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "has_gate")}


def check_sizes(model: PreTrainedModel) -> None:
    """Raises ValueError where the hidden size or an expert's inner size is no multiple of 128; needs no weights."""
    hidden = model.config.get_text_config().hidden_size
    wrong = [f"hidden_size is {hidden}"] if hidden % BLOCK else []
    wrong += [f"{name} {reason}" for name, module in experts_of(model).items() if (reason := ragged(module))]
    if wrong:
        raise ValueError(
            f"fp8 is true, whose blocks are {BLOCK} x {BLOCK}, but {wrong[0]}: leave fp8 out, or take float8, "
            "which is for linear layers alone, with sides that are multiples of 16."
        )


def compute_in_fp8(model: PreTrainedModel, least: int = LEAST) -> str:
    """Let experts of `model` that suit compute in FP8, and linear layers of at least so many numbers, since smaller
    ones take longer than in bf16; returns which, and what does not, in words.

    On a CPU they compute by the kernels' definition, in PyTorch. Raises ValueError as `check_sizes`, or if none suits.
    """
    check_sizes(model)
    parts = parts_of(model)
    linear = {name: module for name, module in model.named_modules() if suits(module)}
    linear = [module for name, module in linear.items() if parts.get(f"{name}.weight") in LINEAR]
    large = [module for module in linear if module.weight.numel() >= least]
    for module in large:
        compute_linear(module)
    experts = experts_of(model) if can_choose_experts(model) else {}
    left = {reason for module in experts.values() if (reason := obstacle(module))}
    if experts and not left:
        model.set_experts_implementation("fp8")
    held = {id(x) for x in weights_in_fp8(model)}
    if not held:
        raise ValueError(
            f"fp8 is true, but no experts of {type(model).__name__} compute in it, and no linear layer, which needs "
            f"{least:,} numbers or more to gain from it: leave fp8 out."
        )
    because = [f"the kernels {min(left)}"] if left else []
    if len(large) < len(linear):
        because.append(f"a linear layer of fewer than {least:,} numbers takes longer in FP8 than in bf16")
    return said(model, parts, held, because)


def weights_in_fp8(model: nn.Module) -> list[nn.Parameter]:
    """The matrices that `model` multiplies with in FP8."""
    linear = [module.weight for module in model.modules() if isinstance(module, Fp8Linear)]
    experts = [x for x in experts_of(model).values() if x.config._experts_implementation == "fp8"]
    return linear + [x for module in experts for x in module.parameters(recurse=False) if x.dim() == 3]


def said(model: nn.Module, parts: dict[str, str], held: set[int], because: list[str]) -> str:
    """Which parts compute in FP8, how much of the model that is, and what stays."""
    weights = [(parts[name], weight) for name, weight in model.named_parameters()]
    matrices = [(parts[name], x) for name, x in model.named_parameters() if x.dim() > 1 and not name.endswith("bias")]
    ours = [(part, weight) for part, weight in weights if id(weight) in held]
    others = [part for part, x in matrices if part in (*LINEAR, "routed_experts") and id(x) not in held]
    numbers, whole = (sum(x.numel() for _, x in found) for found in (ours, weights))
    stays = ["embeddings", "norms", "routers", "head", "attention's own products"]
    stays += [f"{count} matrices of {part}" for part, count in Counter(others).items()]
    in_fp8 = ", ".join(f"{count} matrices of {part}" for part, count in Counter(part for part, _ in ours).items())
    why = f" ({'; '.join(because)})" if because else ""
    share = f"{numbers:,} of {whole:,} parameters ({numbers / whole:.2%})"
    return f"fp8 products with {in_fp8}: {share}; not in fp8: {', '.join(stays)}{why}"
