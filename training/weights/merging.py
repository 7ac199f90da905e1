"""An adapter merged into the weights in float32, and how many routes and likeliest tokens that changed."""

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from hf_moe.routers import captured, find_routers, routed_experts, token_mask

from ..balance.selection_bias import SelectionBias, base_model
from .quantized import dequantize

INPUTS = ("input_ids", "attention_mask", "position_ids")


class Changes(NamedTuple):
    """How many of a router's choices for a token are another set of experts, and how many likeliest next tokens are
    another token, each out of how many."""

    routes: int
    all_routes: int
    tokens: int
    all_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.routes:,} of {self.all_routes:,} routes ({self.routes / self.all_routes:.2%}) and "
            f"{self.tokens:,} of {self.all_tokens:,} likeliest next tokens ({self.tokens / self.all_tokens:.2%})"
        )


@torch.no_grad()
def choices(model: nn.Module, batches: Iterable[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token that is not padding its experts [routers, tokens, K], in order of their number, and the likeliest
    token after it [tokens]."""
    model.eval()
    base = base_model(model)
    routers, top_k = find_routers(base), routed_experts(base.config)[1]
    chosen, likeliest = [], []
    for batch in batches:
        inputs = {name: batch[name].to(base.device) for name in INPUTS if name in batch}
        mask = token_mask(inputs).reshape(-1).bool()
        with captured(routers, top_k) as routings:
            logits = model(**inputs, use_cache=False).logits
        likeliest.append(logits.argmax(dim=-1).reshape(-1)[mask].cpu())
        chosen.append(torch.stack([x.index_SK.sort(dim=-1).values[mask].cpu() for x in routings.values()]))
    return torch.cat(chosen, dim=1), torch.cat(likeliest)


def merge_adapter(model: nn.Module, dtype: torch.dtype, batches: list[dict]) -> tuple[nn.Module, Changes]:
    """The base of a PEFT model with its adapter added in float32 and rounded once to `dtype`; `model` is used up. Of
    weights in 4 bits these are the values that the adapter was trained beside.

    Also what that changed in `batches`, beside the adapter at the side of the weights. Selection biases stay float32.
    """
    from .adapters import merge_one_by_one  # with PEFT, which MoeTrainer does without

    before, tokens = choices(model, batches)
    dequantize(model)
    bias = SelectionBias(find_routers(base_model(model)))
    merge_one_by_one(model, dtype)
    with warnings.catch_warnings():  # rows of new tokens are still to be merged
        warnings.filterwarnings("ignore", "All adapters are already merged")
        merged = model.merge_and_unload(safe_merge=True).to(dtype)
    bias.restore()
    after, tokens_after = choices(merged, batches)
    routes = (before != after).any(dim=-1).sum().item(), before[..., 0].numel()
    return merged, Changes(*routes, (tokens != tokens_after).sum().item(), tokens.numel())
