"""DenseMixer: the router learns from all experts, the output is the top-k's.

Yao et al. 2025, https://fengyao.notion.site/moe-posttraining. The choice of the top k passes its gradient straight
through: with the loss's gradient g_t by the layer's output and any expert j, dL/dw_{t,j} = <g_t, FFN_j(x_t)>. For a
chosen expert that is the usual gradient. For the others w_{t,j} = s_{t,j} n_t, their scores s times the factor n_t
between score and weight of the chosen, a constant, as in the authors' code for normalised weights. Nothing else learns
from the experts that were not chosen, and the forward pass is untouched.

Costs one forward pass of those experts in the backward pass; it keeps nothing but the layer's input.

Shapes: T tokens, D hidden size, E routed experts, K experts per token.
"""

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_moe.routers import Router

TOP_K = ("softmax_topk", "topk_softmax", "sigmoid_topk", "sqrtsoftplus_topk")


def check_dense_mixer(model: nn.Module, routers: dict[str, Router]) -> None:
    """Raises ValueError for a router of `model` that this gradient does not fit."""
    if getattr(model.config, "expert_input_scaling", False):
        raise ValueError(
            "densemixer is on, but the model's router weights multiply the experts' input, not their output."
        )
    for name, router in routers.items():
        if router.layer is None or not (chooses_top_k(router.module) and takes_choice(router.layer.experts)):
            raise ValueError(f"densemixer is on, but {name} does not choose the top k of fused experts for a token.")
        router.affinity  # noqa: B018  which may be unknown


def add_dense_mixer(routers: dict[str, Router]) -> list[RemovableHandle]:
    """Give every router this gradient, in training, until the handles are removed."""
    return [handle for router in routers.values() for handle in mix(router, router.layer.experts)]


def chooses_top_k(router: nn.Module) -> bool:
    """Whether it is a router of Transformers' own, or one of hf_moe's whose weights are scores times a factor."""
    return not hasattr(router, "router") or router.config.router_type in TOP_K


def takes_choice(experts: nn.Module) -> bool:
    """Whether their forward is sum_k weight_k FFN_k of (hidden states, indices, weights), as Transformers' interface
    of experts has it."""
    base = experts.get_base_layer() if hasattr(experts, "get_base_layer") else experts
    return hasattr(base, "has_gate")


def mix(router: Router, experts: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
    """Hooks on both: the router's logits are known when the experts have answered."""
    logits = []

    def remember(module, args, output):
        logits.clear()
        if module.training and torch.is_grad_enabled():
            logits.append(router.logits_of(output))

    def learn_from_all(module, args, kwargs, output):
        if not logits:
            return output
        hidden_TD, index_TK, weights_TK = (*args, *kwargs.values())
        weights_TE = other_weights(router.affinity(logits.pop().float()), index_TK, weights_TK)
        return StraightThrough.apply(output, weights_TE, hidden_TD, index_TK, module)

    return router.module.register_forward_hook(remember), experts.register_forward_hook(
        learn_from_all, with_kwargs=True
    )


def other_weights(affinity_TE: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """[T, E]: each expert's score times the factor between score and weight of the chosen ones, a constant."""
    weights_TK = weights_TK.detach().float()
    chosen_TK = affinity_TE.detach().gather(1, index_TK) * (weights_TK != 0)  # 0: a slot that was dropped
    tiny = torch.finfo(torch.float32).tiny
    return affinity_TE * (weights_TK.sum(dim=1, keepdim=True) / chosen_TK.sum(dim=1, keepdim=True).clamp_min(tiny))


class StraightThrough(torch.autograd.Function):
    """output [T, D] as it is; backward, the weights [T, E] of experts not in index [T, K] get <g_t, FFN_j(x_t)>."""

    @staticmethod
    def forward(ctx, output, weights_TE, hidden_TD, index_TK, experts):
        ctx.save_for_backward(hidden_TD, index_TK)
        ctx.experts, ctx.num_experts, device = experts, weights_TE.shape[1], output.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_TD):
        if not ctx.needs_input_grad[1]:
            return grad_TD, None, None, None, None
        hidden_TD, index_TK = ctx.saved_tensors
        others = ctx.num_experts - index_TK.shape[1]
        grad_TE = hidden_TD.new_zeros(len(hidden_TD), ctx.num_experts, dtype=torch.float32)
        if others and len(hidden_TD):
            away_TE = torch.ones_like(grad_TE, dtype=torch.bool).scatter(1, index_TK, False)
            other_TO = away_TE.nonzero()[:, 1].view(-1, others)
            # As many rows at a time as the forward pass has.
            tokens = max(1, len(hidden_TD) * index_TK.shape[1] // others)
            parts = zip(*(x.split(tokens) for x in (hidden_TD, other_TO, grad_TD)), strict=True)
            with torch.autocast(**ctx.autocast):
                products = [expert_products(ctx.experts, *part) for part in parts]
            grad_TE.scatter_(1, other_TO, torch.cat(products))
        return grad_TD, grad_TE, None, None, None


def expert_products(experts: nn.Module, hidden_TD: torch.Tensor, index_TO: torch.Tensor, grad_TD: torch.Tensor):
    """<g_t, FFN_j(x_t)> for the experts j in index [T, O], in float32."""
    rows = hidden_TD.repeat_interleave(index_TO.shape[1], dim=0)
    # Not called as a module, whose hook would come here again.
    output = experts.forward(rows, index_TO.reshape(-1, 1), rows.new_ones(len(rows), 1))
    products = output.float() * grad_TD.repeat_interleave(index_TO.shape[1], dim=0).float()
    return products.sum(dim=1).view_as(index_TO)
