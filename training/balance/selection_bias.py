"""The selection bias of aux-loss-free balancing: moved once per optimizer step, in float32, saved with adapters.

Paper: https://arxiv.org/abs/2408.15664; DeepSeek-V3, https://arxiv.org/abs/2412.19437, 2.1.2.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_moe.model.balancing import update_selection_bias
from hf_moe.routers import BIASES, Router, find_routers

BIAS_FILE = "router_bias.safetensors"
BIAS = BIASES[0]  # of every router in that file, whatever its family calls it


class SelectionBias:
    """The biases of some routers.

    A step of 1e-3 vanishes in bfloat16, so the biases stay in float32: what `model.to(torch.bfloat16)` rounded is put
    back from a copy.
    """

    def __init__(self, routers: dict[str, Router]):
        self.routers = {name: router for name, router in routers.items() if router.bias is not None}
        self.copies = {}
        self.restore()

    @property
    def biases(self) -> dict[str, torch.Tensor]:
        """Those the model has now: a cast puts new tensors in their place."""
        return {name: router.bias for name, router in self.routers.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Make every bias float32 again."""
        for name, bias in self.biases.items():
            if bias.dtype != torch.float32:
                bias.data = self.copies.get(name, bias).to(bias.device, torch.float32)
        if not self.copies:
            self.remember()

    def remember(self) -> None:
        """The biases are right as they are now."""
        self.copies = {name: bias.detach().clone() for name, bias in self.biases.items()}

    def update(self, counts: dict[str, torch.Tensor], speed: float) -> None:
        """One step of every bias from the tokens of each expert over the whole optimizer step."""
        self.restore()
        for name, bias in self.biases.items():
            update_selection_bias(bias.data[..., : len(counts[name])], counts[name], speed)
        self.remember()


def base_name(name: str) -> str:
    """A module's name without what PEFT puts around it."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "modules_to_save", "default"))


def save_router_bias(model: nn.Module, folder: str | Path) -> None:
    """Write the selection biases beside an adapter, which leaves them out; nothing where there are none."""
    biases = {
        f"{base_name(name)}.{BIAS}": router.bias.detach().float().cpu().contiguous()
        for name, router in find_routers(base_model(model)).items()
        if router.bias is not None
    }
    if biases:
        aside = Path(folder) / f".{BIAS_FILE}"
        save_file(biases, aside)
        aside.replace(Path(folder) / BIAS_FILE)


@torch.no_grad()
def load_router_bias(model: nn.Module, folder: str | Path) -> None:
    """Give `model`, with or without its adapter, the selection biases that were saved beside an adapter.

    Raises FileNotFoundError where there is no such file, ValueError where it lacks a router of the model.
    """
    path = Path(folder) / BIAS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {BIAS_FILE}: hf_moe's trainers write it beside an adapter.")
    saved = load_file(path)
    for name, router in find_routers(base_model(model)).items():
        if router.bias is not None:
            key = f"{base_name(name)}.{BIAS}"
            if key not in saved or saved[key].shape != router.bias.shape:
                raise ValueError(f"{path} has no {key} of {len(router.bias)} experts: it is another model's.")
            router.bias.data = saved[key].to(router.bias.device)


def base_model(model: nn.Module) -> nn.Module:
    """The model without its adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
