"""The parts of a causal language model's loss beside cross-entropy: which are asked for, and each as a term to add.

A part takes the model, the decoder's outputs, the logits [B, S, V], the labels [B, S] and the number of targets of the
whole step (None: of this batch). It returns its term, weighted, or None, and what the model's output tells of it.
"""

from typing import Any

import torch
from torch import nn

from .outputs import HfMoeModelOutput
from .routing import ROUTERS

Part = tuple[torch.Tensor | None, dict[str, Any]]


def multi_token_part(model: nn.Module, outputs: HfMoeModelOutput, logits, labels, items) -> Part:
    """mtp_loss_coef times the loss of multi-token prediction."""
    loss = model.mtp_loss(outputs, labels, items)
    return model.config.mtp_loss_coef * loss, {"mtp_loss": loss}


def policy_part(model: nn.Module, outputs: HfMoeModelOutput, logits, labels, items) -> Part:
    """REINFORCE's, of routers that are policies."""
    return model.policy_loss(outputs, logits, labels, items), {}


def router_part(model: nn.Module, outputs: HfMoeModelOutput, logits, labels, items) -> Part:
    """The sum of the router losses, each times its coefficient, if it has one; nothing without routers."""
    if not outputs.router_logits:
        return None, {}
    aux_loss, losses = model.router_losses(outputs)
    term = sum(getattr(model.config, name, 1.0) * loss for name, loss in losses.items()) if losses else None
    return term, {"aux_loss": aux_loss, "router_losses": losses}


# In the order in which they are added.
PARTS = {"multi_token": multi_token_part, "policy": policy_part, "router": router_part}


def asked_parts(
    model: nn.Module, labels: torch.Tensor | None, router: bool | None, multi_token: bool | None
) -> tuple[str, ...]:
    """The keys of PARTS that a forward computes; `router` and `multi_token` say whether they are asked for.

    None: in training where they have a coefficient, and where the configuration asks. A policy learns in training.
    """
    config = model.config
    learns = model.training and labels is not None
    if router is None:
        router = config.output_router_logits or (learns and bool(model.active_losses()))
    if multi_token is None:
        multi_token = learns and config.mtp_loss_coef > 0
    asked = {
        "multi_token": multi_token and labels is not None and config.num_mtp_layers > 0,
        "policy": learns and ROUTERS[config.router_type].policy,
        "router": router,
    }
    return tuple(name for name in PARTS if asked[name])


def with_parts(
    model: nn.Module,
    parts: tuple[str, ...],
    outputs: HfMoeModelOutput,
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    items: torch.Tensor | int | None,
    loss: torch.Tensor | None,
) -> Part:
    """The loss with the terms of the parts added, None where there is none, and what they tell."""
    told = {}
    for name in parts:
        term, tells = PARTS[name](model, outputs, logits, labels, items)
        told |= tells
        if loss is not None and term is not None:
            loss = loss + term.to(loss.device)
    return loss, told


def recorded_for(parts: tuple[str, ...]) -> dict[str, bool]:
    """What the decoder is to give for the parts."""
    routing = "router" in parts or "policy" in parts
    return {
        "output_router_logits": routing,
        "output_router_indices": routing,
        "output_router_tokens": routing,
        "output_router_loss_inputs": routing,
        "output_mtp_hidden_states": "multi_token" in parts,
    }
