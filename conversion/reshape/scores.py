"""What each expert is worth by a text that the model reads, one layer in memory at a time.

Shapes: T tokens, D hidden size, E routed experts, K experts per token.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from ...routers import Router, find_routers
from ..files import file_backed
from .model import Mixture


class Seen(NamedTuple):
    """Of a layer's experts: the tokens that went to each, and over those the sums of the norm of what it answered and
    of that times the router's weight, [E]; the inner products of their logits over all tokens, [E, E]. float64."""

    tokens: torch.Tensor
    norms: torch.Tensor
    weighted: torch.Tensor
    alike: torch.Tensor

    @classmethod
    def nothing(cls, experts: int) -> "Seen":
        return cls(*torch.zeros(3, experts, dtype=torch.float64), torch.zeros(experts, experts, dtype=torch.float64))


def reap(seen: Seen, generator: torch.Generator) -> torch.Tensor:
    """Mean over an expert's tokens of its router weight times the norm of its output.

    Router-weighted expert activation pruning, https://arxiv.org/abs/2510.13999, eq. 9; 0 without a token.
    """
    return seen.weighted / seen.tokens.clamp_min(1)


def output_norm(seen: Seen, generator: torch.Generator) -> torch.Tensor:
    """Mean over an expert's tokens of the norm of its output."""
    return seen.norms / seen.tokens.clamp_min(1)


def frequency(seen: Seen, generator: torch.Generator) -> torch.Tensor:
    """Tokens that an expert got."""
    return seen.tokens


def at_random(seen: Seen, generator: torch.Generator) -> torch.Tensor:
    """A number from 0 to 1: what the others have to be better than."""
    return torch.rand(len(seen.tokens), generator=generator, dtype=torch.float64)


# `by` -> the score of each expert [E]; the larger, the more it is worth.
SCORES: dict[str, Callable[[Seen, torch.Generator], torch.Tensor]] = {
    "reap": reap,
    "frequency": frequency,
    "output": output_norm,
    "random": at_random,
}


@torch.no_grad()
def watch(mixture: Mixture, windows: list[torch.Tensor], progress: bool) -> dict[str, Seen]:
    """The name of each layer -> what its experts did with windows of token ids [T]; of none, nothing."""
    folder, experts, seen = mixture.source.checkpoint.folder, mixture.config.num_experts, {}
    if not windows:
        return seen
    with file_backed.loaded(folder, mixture.source.config) as model:
        handles = []
        for name, router in find_routers(model).items():
            layer = re.search(r"\.layers\.(\d+)\.", f".{name}")
            if layer is None:  # of a module for multi-token prediction, which a forward does not run
                continue
            if router.layer is None or not hasattr(router.layer.experts, "has_gate"):
                raise ValueError(f"What the experts beside {router.name} answer cannot be seen: choose another --by.")
            found = seen[f"model.layers.{layer[1]}"] = Seen.nothing(experts)
            handles += watch_layer(router, found)
        bar = tqdm(windows, desc="calibration", unit="window", disable=not progress)
        for ids in bar:
            model.base_model(input_ids=ids[None], use_cache=False)
        for handle in handles:
            handle.remove()
    return seen


def watch_layer(router: Router, seen: Seen):
    experts: nn.Module = router.layer.experts

    def hook(module, args, kwargs):
        hidden_TD, index_TK, weights_TK = (*args, *kwargs.values())
        of_experts = index_TK.reshape(-1) < len(seen.tokens)
        rows = hidden_TD.repeat_interleave(index_TK.shape[1], dim=0)[of_experts]
        index_S = index_TK.reshape(-1)[of_experts]
        # Not called as a module, whose hook would come here again.
        answers = module.forward(rows, index_S.unsqueeze(-1), rows.new_ones(len(rows), 1))
        norm_S = answers.double().norm(dim=-1)
        seen.tokens.index_add_(0, index_S, torch.ones_like(norm_S))
        seen.norms.index_add_(0, index_S, norm_S)
        seen.weighted.index_add_(0, index_S, norm_S * weights_TK.reshape(-1)[of_experts].double())

    def compare(module, args, output):
        logits_TE = router.logits_of(output)[:, : len(seen.alike)].double()  # not those of null experts
        seen.alike.add_(logits_TE.T @ logits_TE)

    return experts.register_forward_pre_hook(hook, with_kwargs=True), router.module.register_forward_hook(compare)
