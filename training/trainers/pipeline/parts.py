"""A model cut into the stages of a pipeline, by its `base_model_pp_plan`: a process keeps the modules of its own.

They keep their names, so that what a process has is part of the whole model's weights. The model's own code runs each
stage: with the layers of the stage in their places, something that hands its input on in all others, and what was
received from the stage before in place of the embedding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_moe.model.multi_token import shifted

NAMES = ("embed_tokens", "layers", "norm")  # of most decoders, those without a plan too, as of OLMoE


class Elsewhere(nn.Module):
    """In place of a module that another stage has."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x


class Received(nn.Module):
    """In place of the embedding: the hidden states [B, S, D] of the stage before."""

    hidden_states: torch.Tensor

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.hidden_states


class Part(nn.Module):
    """One stage of a model. Called with what the stage before sent and the number of a micro-batch, it asks `run`.

    `own` are the modules that it has, `layers` the decoder's list with only its own layers in it.
    """

    def __init__(self, model: PreTrainedModel, stage: int, stages: int, layers: nn.ModuleList, own: list[nn.Module]):
        super().__init__()
        self.stage, self.first, self.last = stage, stage == 0, stage == stages - 1
        self.own = nn.ModuleList(own)
        self.whole = [model]  # in a list: not a module of the part's
        self.layers_here = [layers]
        self.run: Callable | None = None

    @property
    def computes_again(self) -> bool:
        """Whether layers are computed again in the backward pass."""
        return any(getattr(part, "gradient_checkpointing", False) for part in self.modules())

    @property
    def embeds_twice(self) -> bool:
        return self.last and len(getattr(self.whole[0].base_model, "mtp_layers", ())) > 1

    def forward(self, received: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        return self.run(self, received, int(number))

    @contextmanager
    def in_place(self, received: torch.Tensor, input_ids: torch.Tensor) -> Iterator[None]:
        """The whole model is this stage alone, and its embedding gives what was received."""
        decoder = self.whole[0].base_model
        embedding, layers, norms = plan_of(decoder)
        swapped = {layers: self.layers_here[0]}
        if not self.last:
            swapped |= dict.fromkeys(norms, Elsewhere())
        if not self.first:
            swapped[embedding] = Received()
            swapped[embedding].hidden_states = received
        ahead = reading_ahead(decoder, decoder.get_submodule(embedding), input_ids)
        were = {name: decoder._modules[name] for name in swapped}
        decoder._modules.update(swapped)
        unscaled = not self.first and hasattr(decoder, "scaled")
        if unscaled:
            decoder.scaled = lambda x: x
        try:
            with ahead if self.last and not self.first else nullcontext():
                yield
        finally:
            decoder._modules.update(were)
            if unscaled:
                del decoder.scaled


@contextmanager
def reading_ahead(decoder: nn.Module, embedding: nn.Module, input_ids: torch.Tensor) -> Iterator[None]:
    """MTP modules read the embeddings of tokens, where the decoder has hidden states of the stage before."""

    def read(depth: int) -> Callable:
        def hook(module, args):
            embedded = type(decoder).scaled(decoder, embedding(input_ids))
            return args[0], shifted(embedded, depth)

        return hook

    modules = enumerate(getattr(decoder, "mtp_layers", ()), start=1)
    handles = [module.register_forward_pre_hook(read(depth)) for depth, module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plan_of(decoder: PreTrainedModel) -> tuple[str, str, list[str]]:
    """The decoder's embedding, its layers, and what comes after them, by the names in its plan.

    Raises ValueError where it has none, and other modules than most.
    """
    names = list(decoder.config.base_model_pp_plan or NAMES)
    lists = [name for name in names if isinstance(getattr(decoder, name, None), nn.ModuleList)]
    if len(lists) != 1 or lists == names[:1] or any(not hasattr(decoder, name) for name in names):
        raise ValueError(
            f"{type(decoder).__name__} has no base_model_pp_plan, which says where it may be cut for a pipeline: "
            "hf-moe import makes an hf_moe model of many, which has."
        )
    place = names.index(lists[0])
    return names[place - 1], lists[0], names[place + 1 :]


def is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def cut(model: PreTrainedModel, stages: int, own: list[int]) -> list[Part]:
    """The stages `own` of `stages`; `model` loses the modules of all others.

    The embedding is in the last stage, too, where a head or MTP modules read it.
    """
    decoder = model.base_model
    embedding, layers, norms = plan_of(decoder)
    whole, beside = list(getattr(decoder, layers)), [x for x in model.children() if x is not decoder]
    beside += [getattr(decoder, name) for name in norms] + list(getattr(decoder, "mtp_layers", ()))
    embeds_last = is_tied(model) or len(getattr(decoder, "mtp_layers", ())) > 0
    each, last = len(whole) // stages, stages - 1
    kept = {n for stage in own for n in range(stage * each, (stage + 1) * each)}

    parts = []
    for stage in own:
        here = range(stage * each, (stage + 1) * each)
        listed = nn.ModuleList(layer if n in here else Elsewhere() for n, layer in enumerate(whole))
        modules = [getattr(decoder, embedding)] if stage == 0 or (stage == last and embeds_last) else []
        modules += beside if stage == last else []
        modules += [whole[n] for n in here]
        parts.append(Part(model, stage, stages, listed, modules))

    for n in range(len(whole)):
        if n not in kept:
            getattr(decoder, layers)[n] = Elsewhere()
    if 0 not in own and not (last in own and embeds_last):
        setattr(decoder, embedding, Elsewhere())
    if last not in own:
        for name in norms:
            setattr(decoder, name, Elsewhere())
        for name, module in list(model.named_children()):
            if module is not decoder:
                setattr(model, name, Elsewhere())
        if hasattr(decoder, "mtp_layers"):
            decoder.mtp_layers = nn.ModuleList()
    return parts
