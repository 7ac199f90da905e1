"""What moves in routers without a gradient: once per optimizer step, in float32, saved with adapters.

That is the selection bias of aux-loss-free balancing (https://arxiv.org/abs/2408.15664; DeepSeek-V3,
https://arxiv.org/abs/2412.19437, 2.1.2), and what a router of one's own moves itself.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_moe.model.balancing import Routed, update_selection_bias
from hf_moe.routers import BIASES, Router, find_routers

from .counts import Layers

BIAS_FILE = "router_bias.safetensors"
BIAS = BIASES[0]  # of every router in that file, whatever its family calls it


def state_of(routers: dict[str, Router]) -> dict[str, torch.Tensor]:
    """Router and tensor -> what moves in it, as the model has it now: a cast puts new tensors in their place."""
    found = {f"{name}.{BIAS}": router.bias for name, router in routers.items() if router.bias is not None}
    for name, router in routers.items():
        if router.own is not None:
            buffers = router.module.named_buffers(recurse=False)
            found |= {f"{name}.{buffer}": x for buffer, x in buffers if x.is_floating_point()}
    return found


class SelectionBias:
    """The biases of some routers, and what else moves in them.

    A step of 1e-3 vanishes in bfloat16, so they stay in float32: what `model.to(torch.bfloat16)` rounded is put back
    from a copy.
    """

    def __init__(self, routers: dict[str, Router]):
        self.routers = routers
        self.copies = {}
        self.sizes = {}  # router -> how much it wants to know of a batch
        self.restore()

    @property
    def biases(self) -> dict[str, torch.Tensor]:
        return {name: router.bias for name, router in self.routers.items() if router.bias is not None}

    @torch.no_grad()
    def restore(self) -> None:
        """Make all of it float32 again."""
        for name, x in state_of(self.routers).items():
            if x.dtype != torch.float32:
                x.data = self.copies.get(name, x).to(x.device, torch.float32)
        if not self.copies:
            self.remember()

    def remember(self) -> None:
        """It is right as it is now."""
        self.copies = {name: x.detach().clone() for name, x in state_of(self.routers).items()}

    def update(self, counts: dict[str, torch.Tensor], speed: float) -> None:
        """One step of every bias from the tokens of each expert over the whole optimizer step."""
        self.restore()
        for name, bias in self.biases.items():
            update_selection_bias(bias.data[..., : len(counts[name])], counts[name], speed)
        self.remember()

    @torch.no_grad()
    def observed(self, layers: list[Layers], device: torch.device) -> torch.Tensor | None:
        """What routers that move something themselves want to know of a batch, one after the other in one vector."""
        found = {}
        for names, _, batch in layers:
            for i, name in enumerate(names):
                if hasattr(self.routers[name].module, "observed"):
                    parts = (x[i] if isinstance(x, torch.Tensor) else x for x in batch)
                    found[name] = self.routers[name].module.observed(Routed(*parts))
        found = {name: found[name].to(device) for name in self.routers if found.get(name) is not None}
        self.sizes = {name: len(x) for name, x in found.items()}
        return torch.cat(list(found.values())) if found else None

    @torch.no_grad()
    def move(self, total: torch.Tensor) -> None:
        """One step of theirs, from the sum of what was observed."""
        self.restore()
        for name, part in zip(self.sizes, total.split(list(self.sizes.values())), strict=True):
            router = self.routers[name].module
            router.moved(part.to(next(router.buffers()).device))
        self.remember()


def base_name(name: str) -> str:
    """A module's name without what PEFT puts around it."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "modules_to_save", "default"))


def save_router_bias(model: nn.Module, folder: str | Path) -> None:
    """Write what moves in routers beside an adapter, which leaves it out; nothing where there is none."""
    state = state_of(find_routers(base_model(model)))
    biases = {base_name(name): x.detach().float().cpu().contiguous() for name, x in state.items()}
    if biases:
        aside = Path(folder) / f".{BIAS_FILE}"
        save_file(biases, aside)
        aside.replace(Path(folder) / BIAS_FILE)


@torch.no_grad()
def load_router_bias(model: nn.Module, folder: str | Path) -> None:
    """Give `model`, with or without its adapter, the selection biases and the like that were saved beside an adapter.

    Raises FileNotFoundError where there is no such file, ValueError where it lacks a router of the model.
    """
    path = Path(folder) / BIAS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {BIAS_FILE}: hf_moe's trainers write it beside an adapter.")
    saved = load_file(path)
    for name, x in state_of(find_routers(base_model(model))).items():
        key = base_name(name)
        if key not in saved or saved[key].shape != x.shape:
            raise ValueError(f"{path} has no {key} of {len(x)} experts: it is another model's.")
        x.data = saved[key].to(x.device)


def base_model(model: nn.Module) -> nn.Module:
    """The model without its adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
