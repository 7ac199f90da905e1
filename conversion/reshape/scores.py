"""What each expert is worth by a text that the model reads, one layer in memory at a time.

Shapes: T tokens, D hidden size, E routed experts, K experts per token.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ...routers import Router, captured, find_routers
from ...texts import texts
from ..files import file_backed
from ..files.texts import cut
from ..files.tokenizer import load_tokenizer
from ..verify import check_memory
from .model import Mixture

T = TypeVar("T")


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


def windows_of(mixture: Mixture, calibration: str | Path, tokens: int) -> list[torch.Tensor]:
    """The first tokens of a text, so many, in windows of token ids. Raises ValueError or OSError of one line."""
    tokenizer = load_tokenizer(mixture.source.checkpoint.folder)
    if tokenizer is None:
        raise ValueError(f"{mixture.source.name} has no tokenizer to read {calibration} with.")
    if tokens < 1:
        raise ValueError(f"calibration_tokens is {tokens}; it must be at least 1.")
    return cut(texts(str(calibration), tokenizer), tokenizer, mixture.source.config.get_text_config(), tokens)


def memory(mixture: Mixture, windows: list[torch.Tensor]) -> int:
    """About how many bytes `watch` takes, however many layers there are: one in float32, and what it makes of a window
    in attention, in the experts and in what watches them."""
    if not windows:
        return 0
    config, tokens = mixture.config, max(map(len, windows))
    heads = 2 * config.num_attention_heads * tokens
    answers = 2 * config.num_experts_per_tok * (2 * config.hidden_size + 3 * config.moe_intermediate_size)
    activations = 4 * tokens * (heads + answers + 8 * config.hidden_size)
    return file_backed.memory(mixture.source.config, mixture.source.checkpoint.entries) + activations


@contextmanager
def reader(mixture: Mixture, windows: list[torch.Tensor]) -> Iterator[tuple[PreTrainedModel, dict[str, Router]]]:
    """The model, a layer in memory at a time, and the name of each layer that it runs -> its router.

    Raises ValueError where the memory for that is not free.
    """
    as_it_lies = "import the model first (hf-moe import), which is then read as it lies there"
    check_memory(memory(mixture, windows), "Reading the calibration text", as_it_lies)
    with file_backed.loaded(mixture.source.checkpoint.folder, mixture.source.config) as model:
        routers = {}
        for name, router in find_routers(model).items():
            layer = re.search(r"\.layers\.(\d+)\.", f".{name}")
            if layer is not None:  # else of a module for multi-token prediction, which a forward does not run
                routers[f"model.layers.{layer[1]}"] = router
        yield model, routers


def shown(windows: list[torch.Tensor], progress: bool) -> tqdm:
    return tqdm(windows, desc="calibration", unit="window", disable=not progress)


@torch.no_grad()
def watch(mixture: Mixture, windows: list[torch.Tensor], progress: bool) -> dict[str, Seen]:
    """The name of each layer -> what its experts did with windows of token ids [T]; of none, nothing.

    Raises ValueError as `reader`, or where an expert's answers cannot be seen.
    """
    seen: dict[str, Seen] = {}
    if not windows:
        return seen
    with reader(mixture, windows) as (model, routers):
        handles = []
        for layer, router in routers.items():
            if router.layer is None or not hasattr(router.layer.experts, "has_gate"):
                raise ValueError(f"What the experts beside {router.name} answer cannot be seen: choose another --by.")
            seen[layer] = Seen.nothing(mixture.config.num_experts)
            handles += watch_layer(router, seen[layer])
        for ids in shown(windows, progress):
            model.base_model(input_ids=ids[None], use_cache=False)
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def loads(mixture: Mixture, windows: list[torch.Tensor], progress: bool) -> dict[str, list[int]]:
    """The name of each layer -> how many tokens of windows [T] went to each of its experts. Raises as `reader`."""
    experts, top_k = mixture.config.num_experts, mixture.config.num_experts_per_tok
    with reader(mixture, windows) as (model, routers):
        tokens_E = {layer: torch.zeros(experts, dtype=torch.long) for layer in routers}
        for ids in shown(windows, progress):
            with captured(routers, top_k) as routings:
                model.base_model(input_ids=ids[None], use_cache=False)
            for layer, routing in routings.items():
                tokens_E[layer] += routing.index_SK.flatten().bincount(minlength=experts)[:experts]
    return {layer: tokens.tolist() for layer, tokens in tokens_E.items()}


def of_all_layers(mixture: Mixture, found: dict[str, T], nothing: T) -> dict[str, T]:
    """Also of modules for multi-token prediction, which a forward does not run: they are as the last layer is."""
    last = list(found.values())[-1] if found else nothing
    return {layer: found.get(layer, last) for layer in mixture.layers}


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
