"""A model's balance losses over an optimizer step: coefficients, counts, and each micro-batch's share.

Shapes: B sequences, T tokens, E routed experts.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments

from hf_moe.model.balancing import LOSSES, PENALTY, Routed, Statistics, routed, statistics
from hf_moe.routers import Router, Routing, routed_experts, token_mask

from .moe_arguments import MoeArguments, moe_argument
from .multi_token import mtp_coefficient, multi_token_decoder

# The losses that need the number of tokens or sequences of a step only; the others weigh scores by who was chosen.
COUNT_TOKENS = ("seq_aux_loss_coef", "router_z_loss_coef")
MOST = 2**26  # logits that are looked at in one launch: what is made of them is several times as large


class Layers(NamedTuple):
    """Routers of which one launch counts all: what they did, and what losses look at, with a first dimension L."""

    names: list[str]
    routing: Routing
    batch: Routed


def stacked(routings: dict[str, Routing], kinds: dict[str, object]) -> Iterator[tuple[list[str], Routing]]:
    """Routers of one kind, shape and device as one routing with a first dimension L."""
    groups: dict[tuple, list[str]] = {}
    for name, routing in routings.items():
        seen = tuple((x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else x for x in routing)
        groups.setdefault((kinds[name], seen), []).append(name)
    for names in groups.values():
        size = max(1, MOST // max(1, routings[names[0]].logits_TE.numel()))
        for start in range(0, len(names), size):
            part = names[start : start + size]
            fields = zip(*(routings[name] for name in part), strict=True)
            yield part, Routing(*(torch.stack(x) if isinstance(x[0], torch.Tensor) else x[0] for x in fields))


def together(counted: dict[str, Statistics], names: list[str], device: torch.device) -> Statistics:
    """Counts of these routers with a first dimension L."""
    parts = zip(*(counted[name] for name in names), strict=True)
    return Statistics(*(torch.stack(part).to(device) for part in parts))


class Balance:
    """What the router losses of one model are, and how much each weighs.

    A coefficient in the arguments goes before the configuration's. The load-balancing loss of Transformers' own
    models is K at balance and ours 1, so the coefficient in their configuration counts K times: it trains as strongly.
    `quiet` are inputs under which the model adds no losses of its own.
    """

    def __init__(self, model: nn.Module, routers: dict[str, Router], args: TrainingArguments):
        self.config = config = model.config.get_text_config()
        self.routers = routers
        self.top_k = routed_experts(config)[1]
        self.n_group = getattr(config, "n_group", None) or 1
        self.groups = SimpleNamespace(topk_group=getattr(config, "topk_group", None) or 1)
        scale = {} if hasattr(model, "active_losses") else {"router_aux_loss_coef": self.top_k}
        coefficients = {}
        unknown = [
            name
            for name in moe_argument(args, "loss_coefs") or {}
            if name not in LOSSES or hasattr(MoeArguments, name)
        ]
        if unknown:
            raise ValueError(
                f"loss_coefs holds {unknown[0]}, which is no loss that a plugin has added to "
                "hf_moe.model.balancing.LOSSES: name its file (plugins), or take its own argument if it has one."
            )
        for name in LOSSES:
            given = moe_argument(args, name)
            if given is None:
                coefficients[name] = (getattr(config, name, None) or 0.0) * scale.get(name, 1)
            else:
                coefficients[name] = given
                if hasattr(config, name):
                    setattr(config, name, given / scale.get(name, 1))
        self.coefficients = {name: value for name, value in coefficients.items() if value}
        self.penalty = next((x.own.penalty for x in routers.values() if getattr(x.own, "penalty", None)), None)
        if self.penalty is not None:
            self.coefficients[PENALTY] = 1.0
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False  # the model would add its own losses
        given = mtp_coefficient(args, 0)
        if given is not None:
            config.mtp_loss_coef = given
        self.multi_token = multi_token_decoder(model)
        accepted = inspect.signature(type(model).forward).parameters
        self.quiet = {"output_router_logits": False} if "output_router_logits" in accepted else {}
        light = {"use_cache": False, "logits_to_keep": 1}  # a forward for its routing alone
        self.light = self.quiet | {name: value for name, value in light.items() if name in accepted}

    @property
    def needs_forward(self) -> bool:
        """Whether only a forward tells what the losses need to know of a step."""
        return any(name not in COUNT_TOKENS for name in self.coefficients) or self.multi_token is not None

    def read(self, routings: dict[str, Routing], inputs: dict) -> list[Layers]:
        """What the losses look at of a batch with these inputs."""
        mask_BS = token_mask(inputs)
        layers = []
        affinities = {name: self.routers[name].affinity for name in routings}
        for names, routing in stacked(routings, affinities):
            affinity = affinities[names[0]](routing.logits_TE.float())[..., : routing.experts]
            if affinity.shape[-2] != mask_BS.numel():
                raise ValueError(
                    f"{names[0]} routed {affinity.shape[-2]} tokens of a batch of {mask_BS.numel()}: virtual tokens "
                    "(prompt tuning) and padding-free batches with an attention mask cannot be counted; train them "
                    "with Transformers' or TRL's own trainer."
                )
            mask = mask_BS.reshape(-1).expand(len(names), -1) if routing.mask_T is None else routing.mask_T
            batch = routed(
                routing.logits_TE, affinity, routing.index_SK, mask, routing.token_S, sequences=len(mask_BS)
            )
            layers.append(Layers(names, routing, batch))
        return layers

    def count(self, layers: list[Layers]) -> dict[str, Statistics]:
        """Router by router."""
        counted = {}
        for names, _, batch in layers:
            parts = zip(*statistics(batch, self.n_group), strict=True)
            counted |= {name: Statistics(*part) for name, part in zip(names, parts, strict=True)}
        return {name: counted[name] for name in self.routers if name in counted}

    def losses(self, layers: list[Layers], counted: dict[str, Statistics]) -> dict[str, torch.Tensor]:
        """Coefficient -> each router's loss [routers], not weighted: this batch's share of the loss of all counted."""
        counts = [together(counted, names, batch.mask_T.device) for names, _, batch in layers]

        def loss(name: str) -> torch.Tensor:
            values = {}
            for (names, routing, batch), part in zip(layers, counts, strict=True):
                if name == PENALTY:
                    found = self.penalty(batch, part, self.config, routing.loss_input)
                else:
                    found = LOSSES[name](batch, part, self.groups)
                values |= dict(zip(names, found, strict=True))
            device = next(iter(values.values())).device  # layers may live on several
            return torch.stack([values[router].to(device) for router in counted])

        return {name: loss(name) for name in self.coefficients}

    def weighted(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sum over losses of coefficient times the mean over routers."""
        return sum(self.coefficients[name] * value.mean() for name, value in losses.items())


def count_tokens(inputs: dict) -> Statistics:
    """The part of `statistics` that needs no forward."""
    mask_BS = token_mask(inputs).float()
    empty = mask_BS.new_zeros(0)
    return Statistics(mask_BS.sum(), (mask_BS.sum(dim=-1) > 0).sum().float(), empty, empty)


def over_processes(accelerator: Accelerator, counted: dict[str, Statistics]) -> dict[str, Statistics]:
    """Counts of all processes together, in one reduction."""
    if accelerator.num_processes == 1:
        return counted
    return summed(counted, accelerator.device, partial(accelerator.reduce, reduction="sum"))


def summed(
    counted: dict[str, Statistics], device: torch.device, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Statistics]:
    """What `reduce` makes of all counts in one vector."""
    parts = [part for counts in counted.values() for part in counts]
    flat = torch.cat([part.reshape(-1).float().to(device) for part in parts])
    sums = reduce(flat).split([part.numel() for part in parts])
    whole = iter([x.view(part.shape).to(part.device) for x, part in zip(sums, parts, strict=True)])
    return {name: Statistics(*(next(whole) for _ in counts)) for name, counts in counted.items()}
