"""What moves in routers without a gradient: once per optimizer step, in float32, saved with adapters.

That is the selection bias of aux-loss-free balancing (https://arxiv.org/abs/2408.15664; DeepSeek-V3,
https://arxiv.org/abs/2412.19437, 2.1.2), by one of three rules (`BIAS_UPDATES`), and what a router moves itself.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_moe.model.balancing import Routed, quantile_bias, update_selection_bias, update_with_zero_mean
from hf_moe.routers import BIASES, Router, find_routers

from .counts import Layers

BIAS_FILE = "router_bias.safetensors"
BIAS = BIASES[0]  # of every router in that file, whatever its family calls it
BY_COUNTS = {"sign": update_selection_bias, "zero_mean": update_with_zero_mean}


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
    from a copy. `rule` is one of `BIAS_UPDATES`, `top_k` what "quantile" needs.
    """

    def __init__(self, routers: dict[str, Router], rule: str = "sign", top_k: int = 1):
        self.routers, self.rule, self.top_k = routers, rule, top_k
        self.copies = {}
        self.sizes = {}  # router, and whether it is for its bias -> how much is to be known of a batch
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
        """One step of every bias from the tokens of each expert over the whole optimizer step, by a rule of counts."""
        if self.rule not in BY_COUNTS:
            return
        self.restore()
        for name, bias in self.biases.items():
            BY_COUNTS[self.rule](bias.data[..., : len(counts[name])], counts[name], speed)
        self.remember()

    @torch.no_grad()
    def observed(self, layers: list[Layers], device: torch.device) -> torch.Tensor | None:
        """What routers that move something themselves want to know of a batch, and what a bias does that moves by
        scores: one after the other in one vector."""
        found = {}
        for names, _, batch in layers:
            for i, name in enumerate(names):
                router, moves = self.routers[name], self.rule not in BY_COUNTS and self.routers[name].bias is not None
                if not moves and not hasattr(router.module, "observed"):
                    continue
                one = Routed(*(x[i] if isinstance(x, torch.Tensor) else x for x in batch))
                if hasattr(router.module, "observed"):
                    found[name, False] = router.module.observed(one)
                if moves:
                    found[name, True] = self.wanted(router, one)
        kinds = ((name, of_bias) for name in self.routers for of_bias in (False, True))
        found = {kind: found[kind].to(device) for kind in kinds if found.get(kind) is not None}
        self.sizes = {kind: len(x) for kind, x in found.items()}
        return torch.cat(list(found.values())) if found else None

    def wanted(self, router: Router, batch: Routed) -> torch.Tensor:
        """[E + 1] the bias by the quantiles of a batch, times its tokens, and the tokens.

        Raises ValueError where some logits are of no expert.
        """
        scores_TE, experts = router.affinity(batch.logits_TE), batch.chosen_TE.shape[-1]
        if scores_TE.shape[-1] != experts:
            raise ValueError(
                f"router_bias_update is quantile, but of {scores_TE.shape[-1]} choices {experts} are experts: set it "
                "to sign or zero_mean."
            )
        bias_E, tokens = router.bias.to(scores_TE).view(-1), batch.mask_T.sum()
        return torch.cat((quantile_bias(scores_TE, bias_E, self.top_k, batch.mask_T) * tokens, tokens.view(1)))

    @torch.no_grad()
    def move(self, total: torch.Tensor, speed: float = 0.0) -> None:
        """One step of theirs, from the sum of what was observed; a bias goes `speed` of its way."""
        self.restore()
        for (name, of_bias), part in zip(self.sizes, total.split(list(self.sizes.values())), strict=True):
            router = self.routers[name]
            if of_bias:
                wanted_E = part[:-1] / part[-1]
                router.bias.data.view(-1).lerp_(wanted_E.to(router.bias.device), speed)
            else:
                router.module.moved(part.to(next(router.module.buffers()).device))
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
