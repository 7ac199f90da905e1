"""An adapter merged into the weights in float32, and how many routes that changed."""

from collections.abc import Iterable

import torch
from torch import nn

from hf_moe.routers import captured, find_routers, routed_experts

from .quantized import dequantize
from .selection_bias import SelectionBias, base_model

INPUTS = ("input_ids", "attention_mask", "position_ids")


@torch.no_grad()
def routes(model: nn.Module, batches: Iterable[dict]) -> torch.Tensor:
    """[routers, tokens, K]: the experts of each token that is not padding, in order of their number."""
    model.eval()
    base = base_model(model)
    routers, top_k = find_routers(base), routed_experts(base.config)[1]
    chosen = []
    for batch in batches:
        inputs = {name: batch[name].to(base.device) for name in INPUTS if name in batch}
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).reshape(-1).bool()
        with captured(routers, top_k) as routings:
            model(**inputs, use_cache=False)
        chosen.append(torch.stack([x.index_SK.sort(dim=-1).values[mask].cpu() for x in routings.values()]))
    return torch.cat(chosen, dim=1)


def merge_adapter(model: nn.Module, dtype: torch.dtype, batches: list[dict]) -> tuple[nn.Module, int, int]:
    """The base of a PEFT model with its adapter added in float32 and rounded once to `dtype`; `model` is used up. Of
    weights in 4 bits these are the values that the adapter was trained beside.

    Also how many of a router's choices for a token in `batches` are another set of experts than with the adapter
    beside the weights, and out of how many. Selection biases stay float32.
    """
    before = routes(model, batches)
    dequantize(model)
    bias = SelectionBias(find_routers(base_model(model)))
    merged = model.float().merge_and_unload(safe_merge=True).to(dtype)
    bias.restore()
    after = routes(merged, batches)
    return merged, (before != after).any(dim=-1).sum().item(), before[..., 0].numel()
