"""The routers of a model, Transformers' own ones too: where they are, and what they did in one forward.

Shapes: T tokens, S rows of an assignment, E routed experts, K experts per token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from ..model.padding import valid_tokens
from .probe import BIASES, Found, known, probed


class Routing(NamedTuple):
    """What one router answered, and the mask it was given, if any.

    The first `experts` logits are experts'; an index of `experts` or more is a choice of none, which counts nowhere.
    `token_S` names each row's token; None: row t is token t's. `loss_input` is what a loss of the router's own reads.
    """

    logits_TE: torch.Tensor
    weights_SK: torch.Tensor
    index_SK: torch.Tensor
    experts: int
    token_S: torch.Tensor | None = None
    mask_T: torch.Tensor | None = None
    loss_input: torch.Tensor | None = None


class Router(NamedTuple):
    """A router found in a model; its forward has the logits at place `logits` of its output.

    Of Transformers' own: the `layer` around it, which has the experts, the model's text config, what errors call it.
    """

    module: nn.Module
    logits: int
    layer: nn.Module | None = None
    config: PreTrainedConfig | None = None
    name: str = "the router"

    @property
    def own(self):
        """What hf_moe's routers are by their name, None of Transformers' own."""
        return getattr(self.module, "router", None)

    @property
    def found(self) -> Found:
        """What the layer's call of its experts showed."""
        if self.layer is None:
            return known(self.config)._replace(reason="it stands beside no experts")
        return probed(self.layer, self.module, self.logits, self.config)

    @property
    def affinity(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Logits to the scores that losses read: hf_moe's routers name theirs, others are tried.

        Raises ValueError where that did not tell.
        """
        if hasattr(self.own, "affinity"):
            return self.own.affinity
        if self.found.affinity is None:
            raise ValueError(
                f"What {self.name} scores experts by is unknown ({self.found.reason}): its balance losses and "
                "entropies cannot be computed. Set their coefficients to 0 to train without, and report the model."
            )
        return self.found.affinity

    def logits_of(self, output) -> torch.Tensor:
        """[T, E] in what its forward returned."""
        return (output if isinstance(output, tuple) else (output,))[self.logits].flatten(0, -2)

    def weights(self, logits: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """[T, K] in float32: what experts that were chosen elsewhere weigh, by these logits, in one of Transformers'
        own. Raises ValueError where no call of the experts showed it."""
        if self.found.scale is None:
            raise ValueError(f"What {self.name} makes of scores is unknown: its experts cannot be chosen elsewhere.")
        scores_TK = self.affinity(logits.float()).gather(-1, index_TK)
        return self.found.scale * (scores_TK / scores_TK.sum(-1, keepdim=True) if self.found.normalized else scores_TK)

    @property
    def policy(self) -> bool:
        """Whether it learns by REINFORCE."""
        return getattr(self.own, "policy", False)

    @property
    def bias(self) -> torch.Tensor | None:
        """The selection bias [E], in the router or in the layer around it."""
        if self.own is not None or self.layer is None:
            tensors = (getattr(part, name, None) for part in self.module.modules() for name in BIASES)
            return next((x for x in tensors if x is not None), None)
        place = self.found.bias
        if place is None:
            return None
        owner, _, name = place.rpartition(".")
        return getattr(self.layer.get_submodule(owner), name)

    def experts(self, logits: int) -> int:
        """How many of the logits are experts': ZAYA's last skips the layer, LongCat's last hand the token on, those of
        hf_moe's null experts do nothing."""
        config = self.config if self.own is None else self.module.config
        said = 1 if config is None else routed_experts(config)[0]
        return min(said, logits) if said > 1 else logits

    def mask(self, args: tuple) -> torch.Tensor | None:
        """Which tokens count, in what forward was given: hf_moe's routers are told, which differs between those of
        multi-token prediction."""
        return args[1] if hasattr(self.module, "router") and len(args) > 1 else None

    def read(self, mask: torch.Tensor | None, output, top_k: int) -> Routing:
        """The routing in what forward returned, (logits, weights, indices, rows' tokens if given), and its `mask`.

        Where it holds no indices, the layer around the router takes the K largest logits (DBRX, Llama 4, JetMoE).
        """
        parts = output if isinstance(output, tuple) else (output,)
        logits = self.logits_of(output)
        experts = self.experts(logits.shape[-1])
        index = parts[2] if len(parts) > 2 else None
        if index is not None and index.dim() > 1 and not index.is_floating_point():
            index = index.flatten(0, -2)
            weights = parts[1].detach().flatten(0, -2)
            # Elsewhere they are something else.
            token, loss_input = parts[3:5] if self.own is not None and len(parts) > 4 else (None, None)
            weights = weights if weights.shape == index.shape else torch.ones_like(index)
            if experts < logits.shape[-1]:  # ZAYA names its first expert, with a weight of 0, where it chose none
                index = index.masked_fill(weights == 0, experts)
            return Routing(logits, weights, index, experts, token, mask, loss_input)
        index = logits.detach().topk(top_k, dim=-1).indices
        if self.found.affinity is None:
            return Routing(logits, torch.ones_like(index, dtype=logits.dtype), index, experts)
        scores = self.found.affinity(logits.detach().float()).gather(-1, index)
        weights = scores / scores.sum(-1, keepdim=True) if self.found.normalized else scores
        return Routing(logits, weights, index, experts)


def find_routers(model: nn.Module) -> dict[str, Router]:
    """Name -> router: the modules that the model's classes say router logits come from (`_can_record_outputs`)."""
    recorders = [
        recorder if isinstance(recorder, OutputRecorder) else OutputRecorder(recorder)
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
        for recorder in as_list((getattr(part, "_can_record_outputs", None) or {}).get("router_logits"))
    ]
    found = {
        name: recorder.index
        for name, part in model.named_modules()
        for recorder in recorders
        if isinstance(part, recorder.target_class)
    }
    # A layer may be named beside the router inside it: the innermost is the router.
    found = {name: x for name, x in found.items() if not any(other.startswith(f"{name}.") for other in found)}
    routers = {name: router(model, name, place) for name, place in found.items()}
    routers |= unnamed(model, routers)
    return {name: routers[name] for name, _ in model.named_modules() if name in routers}


def unnamed(model: nn.Module, routers: dict[str, Router]) -> dict[str, Router]:
    """Those that no class names, as hash routers, where a call of their layer shows what they are."""
    layers, found = [x.layer for x in routers.values()], {}
    for name, part in model.named_modules():
        inside = next((x for x in ("gate", "router") if isinstance(getattr(part, x, None), nn.Module)), None)
        if inside is None or not isinstance(getattr(part, "experts", None), nn.Module):
            continue
        if not any(part is layer for layer in layers):
            new = router(model, f"{name}.{inside}", 0)
            if new.found.affinity is not None:
                found[f"{name}.{inside}"] = new
    return found


def router(model: nn.Module, name: str, place: int) -> Router:
    module, layer, around = model.get_submodule(name), None, name
    while around and layer is None:
        around = around.rpartition(".")[0]
        part = model.get_submodule(around)
        layer = part if isinstance(getattr(part, "experts", None), nn.Module) else None
        if isinstance(part, nn.ModuleList):
            break
    config = getattr(model, "config", None)
    text = None if config is None else config.get_text_config()
    return Router(module, place, layer, text, f"{name} of {type(model).__name__}")


def token_mask(inputs: dict) -> torch.Tensor:
    """[B, S] 1 where a token of a model's inputs counts, 0 on padding, whatever the form of their attention_mask."""
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"][..., 0]
    valid = valid_tokens(inputs.get("attention_mask"), *tokens.shape)
    return torch.ones_like(tokens, dtype=torch.long) if valid is None else valid.long()


def as_list(value) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def routed_experts(config: PreTrainedConfig) -> tuple[int, int]:
    """E and K of a config, 1 and 1 where it is dense."""
    text = config.get_text_config()
    places = (text, getattr(text, "ffn_config", None))  # DBRX has them one level below

    def first(*names: str) -> int:
        return next((value for place in places for name in names if (value := getattr(place, name, None))), 1)

    experts = first("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return experts, first("num_experts_per_tok", "moe_top_k", "moe_topk", "top_k_experts")


@contextmanager
def captured(
    routers: dict[str, Router],
    top_k: int,
    model: nn.Module | None = None,
    see: Callable[[dict[str, Routing]], None] = lambda routings: None,
) -> Iterator[dict[str, Routing]]:
    """Collect what each router does in the first forward inside the context, with its gradient, and `see` it once.

    At the end of the context, or of the forward of `model`: what its caller does with its output may wait for the
    device, which then has this to do. A forward that checkpointing repeats in the backward pass comes after the
    context and is not seen. Nothing is computed in a layer: a checkpointed one would miss it when it is repeated.
    """
    calls, routings = {}, {}

    def keep(name):
        def hook(module, args, output):
            # Not the tokens: of all layers they are as large as what checkpointing keeps.
            calls.setdefault(name, (routers[name].mask(args), output))

        return hook

    def read(*_) -> None:
        if calls and not routings:
            routings.update({name: routers[name].read(*calls[name], top_k) for name in routers if name in calls})
            see(routings)

    handles = [router.module.register_forward_hook(keep(name)) for name, router in routers.items()]
    if model is not None:
        handles.append(model.register_forward_hook(read))
    try:
        yield routings
    finally:
        for handle in handles:
            handle.remove()
    read()
