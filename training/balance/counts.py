"""A model's balance losses over an optimizer step: coefficients, counts, and each micro-batch's share.

Shapes: B sequences, T tokens, E routed experts.
"""

import inspect
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments

from hf_moe.model.balancing import LOSSES, Routed, Statistics, routed, statistics
from hf_moe.routers import Router, Routing, routed_experts, token_mask

from .moe_arguments import moe_argument
from .multi_token import mtp_coefficient, multi_token_decoder

# The losses that weigh scores by who was chosen; the others need the number of tokens or sequences only.
NEED_LOADS = ("router_aux_loss_coef", "device_aux_loss_coef", "comm_aux_loss_coef")


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
        for name in LOSSES:
            given = moe_argument(args, name)
            if given is None:
                coefficients[name] = (getattr(config, name, None) or 0.0) * scale.get(name, 1)
            else:
                coefficients[name] = given
                if hasattr(config, name):
                    setattr(config, name, given / scale.get(name, 1))
        self.coefficients = {name: value for name, value in coefficients.items() if value}
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
        return any(name in self.coefficients for name in NEED_LOADS) or self.multi_token is not None

    def read(self, routings: dict[str, Routing], inputs: dict) -> dict[str, Routed]:
        """What the losses look at, router by router, of a batch with these inputs."""
        mask_BS = token_mask(inputs)
        batches = {}
        for name, routing in routings.items():
            affinity_TE = self.routers[name].affinity(routing.logits_TE.float())[..., : routing.experts]
            if len(affinity_TE) != mask_BS.numel():
                raise ValueError(
                    f"{name} routed {len(affinity_TE)} tokens of a batch of {mask_BS.numel()}: virtual tokens (prompt "
                    "tuning) and padding-free batches with an attention mask cannot be counted; train them with "
                    "Transformers' or TRL's own trainer."
                )
            mask_T = mask_BS.reshape(-1) if routing.mask_T is None else routing.mask_T
            batch = routed(
                routing.logits_TE, affinity_TE, routing.index_SK, mask_T, routing.token_S, sequences=len(mask_BS)
            )
            batches[name] = batch._replace(chosen_TE=batch.chosen_TE[..., : routing.experts])
        return batches

    def count(self, batches: dict[str, Routed]) -> dict[str, Statistics]:
        """Router by router."""
        return {name: statistics(batch, self.n_group) for name, batch in batches.items()}

    def losses(self, batches: dict[str, Routed], counted: dict[str, Statistics]) -> dict[str, torch.Tensor]:
        """Coefficient -> each router's loss [routers], not weighted: this batch's share of the loss of all counted."""

        def loss(name: str) -> torch.Tensor:
            values = [LOSSES[name](batch, counted[router], self.groups) for router, batch in batches.items()]
            return torch.stack([value.to(values[0].device) for value in values])  # layers may live on several devices

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
    parts = [part for counts in counted.values() for part in counts]
    flat = torch.cat([part.reshape(-1).float().to(accelerator.device) for part in parts])
    sums = accelerator.reduce(flat, reduction="sum").split([part.numel() for part in parts])
    whole = iter([x.view(part.shape).to(part.device) for x, part in zip(sums, parts, strict=True)])
    return {name: Statistics(*(next(whole) for _ in counts)) for name, counts in counted.items()}
