"""Any decoder of Transformers with a mixture of experts where its dense feed-forward networks stood.

The host's own class builds the model; attention, caches, heads and names stay its own. Shapes: B batch, S sequence,
T = B S tokens, D hidden size, E routed experts, K experts per token, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils.output_capturing import OutputRecorder

from .configuration_hf_moe_graft import HfMoeGraftConfig, has_parts
from .feed_forward import FeedForward, find_feed_forwards, narrowed
from .hashing import HfMoeHashTables
from .host import CACHE, OF_GENERATE, PASSED_ON
from .losses import asked_parts, with_parts
from .modeling_hf_moe import HfMoeExperts, HfMoeSparseMoeBlock, draw
from .outputs import HfMoeModelOutput, with_fields_of
from .padding import valid_tokens
from .parallel_plans import block_ep_plan, block_tp_plan, in_all_layers, standing, within
from .recomputation import HfMoeCheckpointing
from .router import HfMoeRouter, HfMoeRouters
from .router_losses import HfMoeRouterLosses
from .unquantized import HfMoeUnquantized

TRIED = 1e-4  # how far a block of one expert may be from the network that it stands for, relative


class Text:
    """What the blocks are told of a forward's tokens, since the host's layers hand hidden states alone on.

    now: token_mask [B, S], False on padding; input_ids [B, S], for hash routers; a list for what routers answer.
    """

    def __init__(self):
        self.now: tuple[torch.Tensor | None, torch.Tensor | None, list | None] = (None, None, None)

    @contextmanager
    def read(self, token_mask, input_ids, routings) -> Iterator[None]:
        before, self.now = self.now, (token_mask, input_ids, routings)
        try:
            yield
        finally:
            self.now = before


class LayerConfig:
    """The graft's config as the block of one layer reads it: with that layer's sizes and activation."""

    def __init__(self, config: HfMoeGraftConfig, place: int, network: FeedForward):
        self._config = config
        self.hidden_size, self.intermediate_size = network.hidden, network.width
        self.expert_hidden_size, self.moe_latent_size, self.num_hash_layers = network.hidden, None, 0
        self.gated_mlp, self.mlp_bias = network.gated, network.bias
        self.hidden_act, self.act_fn = network.hidden_act, network.act_fn
        self.moe_intermediate_size = at(config.moe_intermediate_size, place) or network.width
        shared = at(config.shared_expert_intermediate_size, place)
        self.shared_expert_intermediate_size = shared or self.moe_intermediate_size
        self.network = network

    def __getattr__(self, name: str) -> Any:
        if name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


def at(size: int | list[int] | None, place: int) -> int | None:
    return size[place] if isinstance(size, list) else size


@use_experts_implementation
class HfMoeGraftedExperts(HfMoeExperts):
    """Experts of another model's form: the gate may have a factor, and a norm may stand before the down projection."""

    def __init__(self, config: LayerConfig):
        super().__init__(config)
        self.factor, self.norm = config.network.gate_multiplier, config.network.norm

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = self.act_fn(gate if self.factor == 1 else gate * self.factor) * up
        return hidden if self.norm is None else self.norm(hidden)


class HfMoeGraftedBlock(HfMoeSparseMoeBlock):
    """A sparse block in the place of a dense network, called as that is called."""

    def __init__(self, config: LayerConfig, layer: int, text: Text):
        super().__init__(config, layer)
        self.text, self.scale, self.dropout = text, config.network.scale, config.network.dropout

    def make_experts(self, config: LayerConfig) -> HfMoeExperts:
        return HfMoeGraftedExperts(config)

    @property
    def learns_together(self) -> bool:
        """Whether the experts share what is learned: of that a rank with some of them would have its own gradient."""
        return any(True for child in self.experts.children() for _ in child.parameters())

    def tp_rules(self) -> dict[str, str]:
        if self.learns_together:
            return {}
        cut = not self.experts.has_bias and self.experts.norm is None
        return block_tp_plan(self.experts.has_gate, cut, self.shared_experts is not None)

    def ep_rules(self) -> dict[str, str]:
        return {} if self.learns_together else block_ep_plan(self.experts.has_gate, self.experts.has_bias)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[..., D] to [..., D], plus the residual where the host's network adds it."""
        token_mask, input_ids, _ = self.text.now
        output = super().forward(hidden_states, token_mask, input_ids)
        if self.scale != 1:
            output = output * self.scale
        if self.dropout:
            output = nn.functional.dropout(output, self.dropout, self.training)
        return output if residual is None else output + residual

    def route(self, tokens: torch.Tensor, mask: torch.Tensor | None, ids: torch.Tensor | None) -> tuple:
        routing, routings = super().route(tokens, mask, ids), self.text.now[2]
        if routings is not None:
            routings.append(routing)
        return routing


class HfMoeGraft(HfMoeRouterLosses, HfMoeCheckpointing, HfMoeUnquantized, HfMoeHashTables, HfMoeRouters):
    """What a graft adds to the host's class: its blocks, and the losses of their routers."""

    config_class = HfMoeGraftConfig

    def __init__(self, config: HfMoeGraftConfig):
        super().__init__(config.backbone)
        self.config, self.name_or_path = config, config.name_or_path
        config._attn_implementation_internal = config.backbone._attn_implementation  # which the host has settled
        config._experts_implementation = self.get_correct_experts_implementation(config._experts_implementation)
        text, networks = Text(), find_feed_forwards(self)
        for place, layer in enumerate(chosen_layers(config, networks)):
            network = networks[layer]
            check(self.get_submodule(network.path), network)
            graft(self, network, HfMoeGraftedBlock(LayerConfig(config, place, network), layer, text))
        self.text = text
        records = [x._can_record_outputs or () for x in self.modules() if isinstance(x, PreTrainedModel)]
        self.recordable = {f"output_{name}" for names in records for name in names}
        self.__module__ = type(self).__module__  # FSDP2 changes the class to one of PyTorch's own
        self.post_init()
        self.plan_blocks()

    def plan_blocks(self):
        """The host's plans name what stands, and the blocks as hf_moe's own architecture does."""
        tp_plan, ep_plan = standing(self.tp_plan, self), standing(self.ep_plan, self)
        for name, block in self.named_modules():
            if isinstance(block, HfMoeGraftedBlock):
                tp_plan |= within(in_all_layers(name), block.tp_rules())
                ep_plan |= within(in_all_layers(name), block.ep_rules())
        self._tp_plan, self._ep_plan = tp_plan, ep_plan

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, (HfMoeExperts, HfMoeRouter)):
            draw(module, getattr(self.config, "initializer_range", 0.02))

    @classmethod
    def is_custom_code(cls) -> bool:
        """As the host: loading passes over other code's modules without parameters, and those of Transformers' own may
        have buffers that are computed then (Falcon-H1)."""
        return cls.host_class.is_custom_code()

    def initialize_weights(self):
        """As Transformers' own; blocks by this class, since the decoder around them initialises by its own."""
        for module in self.modules():
            if isinstance(module, HfMoeGraftedBlock):
                module.apply(self._initialize_weights)
        super().initialize_weights()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = torch.utils.checkpoint.checkpoint, **kwargs
    ):
        def told(function: Callable, *args, **kwargs):
            """The repeated forward is told of its tokens what the first one was."""
            token_mask, input_ids, routings = self.text.now

            def again(*args, **kwargs):
                first = self.text.now[2] is routings is not None
                with self.text.read(token_mask, input_ids, routings if first else None):
                    return function(*args, **kwargs)

            return gradient_checkpointing_func(again, *args, **kwargs)

        told.keywords = getattr(gradient_checkpointing_func, "keywords", {})
        super()._set_gradient_checkpointing(enable, told, **kwargs)

    def set_attn_implementation(self, *args, **kwargs):
        """As the host: a dict names its parts, which the config of a graft has within."""
        grafted, self.config = self.config, self.config.backbone
        try:
            super().set_attn_implementation(*args, **kwargs)
        finally:
            self.config = grafted
        grafted._attn_implementation_internal = grafted.backbone._attn_implementation

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the host remembers its own class's answer, which this one would inherit

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str | None:
        """As Transformers' own; none for the backbone, which has no experts and is built first."""
        ours = self.config.model_type == HfMoeGraftConfig.model_type
        return super().get_correct_experts_implementation(requested_experts) if ours else None

    def per_mtp_router(self, rows) -> list:
        """A graft has no modules for multi-token prediction."""
        return []

    def grafted_forward(self, forward: Callable, said: dict[str, Any], output_router_logits: bool | None):
        """The host's forward, and in training router losses whose coefficients are not 0, as in HfMoeForCausalLM."""
        labels, return_dict = said.get("labels"), said.get("return_dict")
        parts = asked_parts(self, labels, output_router_logits, False)
        routings, token_mask = [] if parts else None, read_mask(said, getattr(self.config, "layer_types", None))
        with self.text.read(token_mask, said.get("input_ids"), routings):
            outputs = forward(self, **(said | {"return_dict": True} if parts else said))
        if not parts:
            return outputs
        answers = [tuple(x[place] for x in routings) for place in range(5)] if routings else [()] * 5
        tokens, loss_inputs = (None if not x or x[0] is None else x for x in answers[3:])
        recorded = HfMoeModelOutput(
            last_hidden_state=outputs.logits,
            router_logits=answers[0],
            router_indices=answers[2],
            router_tokens=tokens,
            router_loss_inputs=loss_inputs,
            token_mask=token_mask,
        )
        items = said.get("num_items_in_batch")
        loss, told = with_parts(self, parts, recorded, outputs.logits, labels, items, outputs.loss)
        told |= {"router_logits": recorded.router_logits, "router_indices": recorded.router_indices}
        output = with_fields_of(type(outputs))(**(dict(outputs) | {"loss": loss} | told))
        return output.to_tuple() if return_dict is False else output


def read_mask(said: dict[str, Any], layer_types: list[str] | None) -> torch.Tensor | None:
    """[B, S] False on padding, of what a forward was given; None where there is none."""
    mask = said.get("attention_mask")
    tokens = said.get("input_ids") if said.get("input_ids") is not None else said.get("inputs_embeds")
    if mask is None or tokens is None:
        return None
    caches = [said[name] for name in (CACHE, "past_key_values") if isinstance(said.get(name), Cache)]
    by_position = not isinstance(mask, dict) and len(mask.shape) == 2  # whatever the cache has room for
    return valid_tokens(mask, *tokens.shape[:2], None if by_position or not caches else caches[0], layer_types)


def chosen_layers(config: HfMoeGraftConfig, networks: dict[int, FeedForward]) -> list[int]:
    """The layers that become sparse. Raises ValueError where one has no network that could."""
    kind = config.backbone.model_type
    if not networks:
        raise ValueError(f"No layer of a {kind} has a dense feed-forward network that experts could stand for.")
    if config.sparse_layers is None:
        return list(networks)
    missing = [layer for layer in config.sparse_layers if layer not in networks]
    if missing:
        raise ValueError(
            f"sparse_layers has {missing[0]}, a layer of a {kind} without a dense feed-forward network; these have "
            f"one: {', '.join(map(str, networks))}."
        )
    return config.sparse_layers


@torch.no_grad()
def check(module: nn.Module, network: FeedForward) -> None:
    """Raise ValueError unless a block of one expert gives what the network gives, tried with small random weights."""
    if network.loose:
        return
    with torch.device("cpu"):
        twin, small = narrowed(module, network)
        one = HfMoeGraftConfig(num_experts=1, num_experts_per_tok=1, router_aux_loss_coef=0.0)
        one._experts_implementation = "eager"
        block = HfMoeGraftedBlock(LayerConfig(one, 0, small), 0, Text()).float().eval()
        if block.gate.weight.is_meta:  # accelerate's init_empty_weights gives no parameter memory, whatever the device
            return
        found = {name: part.of(twin.get_parameter(part.tensor)) for name, part in small.parts.items()}
        for name, tensor in block.experts.named_parameters(recurse=False):
            tensor.copy_(expert_tensor(name, found, tensor.shape[1:])[None])
        generator = torch.Generator("cpu").manual_seed(1)
        x, residual = torch.randn(2, 1, 5, small.hidden, generator=generator, dtype=torch.float32)
        given = (x, residual) if network.residual else (x,)
        try:
            expected = twin(*given)
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{network.path} cannot be tried as a feed-forward network: {error}") from error
        if not torch.allclose(block(*given), expected, rtol=TRIED, atol=TRIED * expected.abs().max().item()):
            raise ValueError(
                f"{network.path} ({type(module).__name__}) computes something else than its projections and its "
                "activation say, so that no experts can stand for it: leave its layer out of sparse_layers."
            )


# What of the dense network the rows of each expert tensor are, in order.
EXPERT_PARTS = {
    "gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
    "gate_up_proj_bias": ("gate_proj.bias", "up_proj.bias"),
    "up_proj": ("up_proj.weight",),
    "up_proj_bias": ("up_proj.bias",),
    "down_proj": ("down_proj.weight",),
    "down_proj_bias": ("down_proj.bias",),
}


def expert_tensor(name: str, parts: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """One expert's tensor of a dense network's parts; a bias that the network lacks is 0."""
    rows = shape[0] // len(EXPERT_PARTS[name])
    return torch.cat([parts[part] if part in parts else torch.zeros(rows) for part in EXPERT_PARTS[name]])


def block_path(network: FeedForward) -> str:
    """Where the block stands: where the network does, or of one whose parts are the layer's own the last of them."""
    return f"{network.path}.{network.loose[-1]}" if network.loose else network.path


def graft(model: nn.Module, network: FeedForward, block: nn.Module) -> None:
    """Put the block in the network's place."""
    for name in network.loose[:-1]:
        model.set_submodule(f"{network.path}.{name}", nn.Identity())
    model.set_submodule(block_path(network), block)


class HfMoeGraftForCausalLM(HfMoeGraft, PreTrainedModel, GenerationMixin):
    """A causal language model of Transformers with experts in it.

    Constructing or loading one gives an instance of a class that is this one and the host's own, so that it is and
    does all that the host's model is and does. Where the backbone has other parts beside its text it is an
    `HfMoeGraftForImageTextToText`. Raises ValueError of one line where the backbone is no decoder with dense
    feed-forward networks.
    """

    hosts = MODEL_FOR_CAUSAL_LM_MAPPING

    def __new__(cls, config: HfMoeGraftConfig, *args, **kwargs):
        return object.__new__(cls.of(config))

    @classmethod
    def of(cls, config: HfMoeGraftConfig) -> type["HfMoeGraftForCausalLM"]:
        """The class for this config's backbone."""
        if "host_class" in vars(cls):
            return cls
        backbone = config.backbone
        if config.needs_code:
            raise ValueError(
                f"A {backbone.model_type} is made by code that comes with it: look at that, and load the model with "
                "trust_remote_code=True (--trust-remote-code)."
            )
        ours = HfMoeGraftForImageTextToText if has_parts(backbone) else HfMoeGraftForCausalLM
        encodes = any(x.is_encoder_decoder for x in (backbone, backbone.get_text_config(decoder=True)))
        if type(backbone) not in ours.hosts or encodes:
            raise ValueError(f"A {backbone.model_type} is no decoder that writes text: experts need one.")
        if not issubclass(ours, cls):
            raise ValueError(f"A {backbone.model_type} reads no pictures: it is an {ours.__name__}.")
        return grafted(ours, ours.hosts[type(backbone)])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config: Any = None, **kwargs):
        """As Transformers' own, by the class of the backbone."""
        places = {name: kwargs[name] for name in ("cache_dir", "revision", "token", "subfolder") if name in kwargs}
        if getattr(config, "model_type", None) != HfMoeGraftConfig.model_type:  # classes differ where code is remote
            config = HfMoeGraftConfig.from_pretrained(config or pretrained_model_name_or_path, **places)
        if kwargs.get("trust_remote_code"):
            config.run_code(pretrained_model_name_or_path, **places)
            config.run_router_code(pretrained_model_name_or_path, **places)
        if "host_class" not in vars(cls):
            return cls.of(config).from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: HfMoeGraftConfig, **kwargs):
        return super(HfMoeGraftForCausalLM, cls.of(config))._from_config(config, **kwargs)


class HfMoeGraftForImageTextToText(HfMoeGraftForCausalLM):
    """A model of Transformers that reads pictures and text, with experts in the decoder that writes."""

    hosts = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


@cache
def grafted(ours: type, host: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of a graft onto `host`."""
    host_forward = host.forward
    signature = inspect.signature(host_forward)
    # OpenAI's GPT hands on what generate() tells its preparation of inputs.
    prepared = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    known = PASSED_ON.union(signature.parameters, prepared)

    @wraps(host_forward)
    def forward(self, *args, output_router_logits: bool | None = None, **kwargs):
        for name in kwargs:
            if name not in known and name not in OF_GENERATE and name not in self.recordable:
                raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {name!r}")
        kwargs = {name: x for name, x in kwargs.items() if name not in OF_GENERATE or name in known}
        said = signature.bind(self, *args, **kwargs).arguments
        said.pop("self")
        said |= said.pop("kwargs", {})
        return self.grafted_forward(host_forward, said, output_router_logits)

    # Trainers read from it that the losses can be left out.
    own = inspect.Parameter("output_router_logits", inspect.Parameter.KEYWORD_ONLY, default=None)
    shown = [x for x in signature.parameters.values() if x.kind is not x.VAR_KEYWORD]
    rest = [x for x in signature.parameters.values() if x.kind is x.VAR_KEYWORD]
    forward.__signature__ = signature.replace(parameters=[*shown, own, *rest])
    body = {
        "host_class": host,
        "forward": forward,
        "config_class": HfMoeGraftConfig,
        "__module__": ours.__module__,
        "__doc__": f"A {host.__name__} with experts in it.",
        "_can_record_outputs": {**(host._can_record_outputs or {}), "router_logits": OutputRecorder(HfMoeRouter)},
    }
    return type(ours.__name__, (ours, host), body)


__all__ = ["HfMoeGraftForCausalLM", "HfMoeGraftForImageTextToText"]
