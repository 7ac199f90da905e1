"""A dense model that is to become a mixture, and the mixture's shape: in hf_moe's own architecture, or in its own."""

import re
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from ...model.configuration_hf_moe import HfMoeConfig
from ...model.configuration_hf_moe_graft import HfMoeGraftConfig
from ...model.feed_forward import FeedForward as Network
from ...model.modeling_hf_moe import HfMoeForCausalLM
from ...model.modeling_hf_moe_graft import HfMoeGraftForCausalLM, block_path
from ...reading import auto_class
from ..files.file_backed import stored_names
from ..files.graft_source import GraftSource
from ..files.source import Source, tensor_shapes
from ..files.text_part import TextCheckpoint
from ..files.writer import Output
from .feed_forward import FeedForward


class NativeDense:
    """A source that becomes an HfMoeForCausalLM."""

    def __init__(self, source: Source):
        self.source = source
        self.becomes = f"hf_moe's own architecture, which has a table for {source.model_type}"
        if isinstance(source.checkpoint, TextCheckpoint):
            self.becomes += "; it reads no pictures, which --graft keeps"
        self.layers = range(source.hf_moe_fields["num_hidden_layers"])
        self.config = source.hf_moe_config(mlp_layer_types=["dense"] * len(self.layers))
        self.hidden_size = self.config.hidden_size
        self.outputs = source.outputs(self.config)
        self.embedding = "model.embed_tokens.weight"

    def feed_forward(self, layer: int) -> FeedForward:
        prefix = self.path(layer)
        found = {name: output for name, output in self.outputs.items() if name.startswith(f"{prefix}.")}
        return FeedForward({name.removeprefix(f"{prefix}."): output for name, output in found.items()})

    def path(self, layer: int) -> str:
        """Of the module whose inputs are those of the layer's network."""
        return f"model.layers.{layer}.mlp"

    def act_fn(self, layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return ACT2FN[self.config.hidden_act]

    def needs_whole(self, layer: int) -> str | None:
        """Why the layer's network cannot be cut, None where it can."""
        return None

    def model(self) -> PreTrainedModel:
        """The dense model in float32, its weights still to come."""
        with no_init_weights():
            return HfMoeForCausalLM._from_config(self.config, attn_implementation="eager", dtype=torch.float32)

    def mixture(self, layers: list[int], sizes: Mapping[str, Any]) -> HfMoeConfig:
        kinds = ["sparse" if layer in layers else "dense" for layer in self.layers]
        # Weights that sum to 1, so that equal experts give the dense output.
        return self.source.hf_moe_config(mlp_layer_types=kinds, router_type="topk_softmax", **sizes)

    def shapes(self, config: HfMoeConfig) -> dict[str, tuple[int, ...]]:
        return tensor_shapes(config)

    def place(self, name: str) -> tuple[int, str] | None:
        """The layer of a mixture's tensor, and what it is in the sparse block; None outside of these networks."""
        found = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.(.+)", name)
        return found and (int(found[1]), found[2])

    def own(self, layer: int, kind: str) -> Output | None:
        """A tensor of the sparse block that is the network's own; None for what a strategy makes."""
        return None


class GraftDense:
    """A source that stays the model it is, with experts in it: a graft."""

    def __init__(self, source: GraftSource):
        self.source = source
        self.config = source.config.get_text_config()
        whose = "its" if self.config is source.config else "its decoder's"
        kept = f"a graft: the {source.model_type} stays as it is, with experts in the place of"
        self.becomes = f"{kept} {whose} feed-forward networks"
        self.layers = sorted(source.networks)
        self.hidden_size = source.networks[self.layers[0]].hidden
        self.outputs = source.outputs()
        model = source.model
        self.embedding = next(f"{n}.weight" for n, x in model.named_modules() if x is model.get_input_embeddings())

    def feed_forward(self, layer: int) -> FeedForward:
        network, found = self.source.networks[layer], {}
        for name, part in network.parts.items():
            stored = self.outputs[f"{network.path}.{part.tensor}"]
            shape = part.of(torch.empty(stored.shape, device="meta")).shape
            found[name] = stored._replace(shape=tuple(shape), pieces=partial(pieces, part, stored))
        if network.bias:  # one that the network lacks is 0
            weights = {name: found[name] for name in found if name.endswith("weight")}
            for name, weight in weights.items():
                zeros = torch.zeros(weight.shape[0], dtype=weight.dtype)
                absent = Output("", weight.dtype, tuple(zeros.shape), lambda zeros=zeros: [zeros])
                found.setdefault(name.replace("weight", "bias"), absent)
        return FeedForward(found)

    def path(self, layer: int) -> str:
        network = self.source.networks[layer]
        return f"{network.path}.{network.loose[0]}" if network.loose else network.path

    def act_fn(self, layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        network = self.source.networks[layer]
        factor = network.gate_multiplier
        return network.act_fn if factor == 1 else lambda gate: network.act_fn(gate * factor)

    def needs_whole(self, layer: int) -> str | None:
        network = self.source.networks[layer]
        if network.norm is not None:
            return f"{network.path} has a {type(network.norm).__name__} over all its neurons"
        if isinstance(network.act_fn, nn.Module) and next(network.act_fn.parameters(), None) is not None:
            return f"{network.path} learns its {type(network.act_fn).__name__}"
        return None

    def model(self) -> PreTrainedModel:
        with no_init_weights():
            return auto_class(self.source.config).from_config(
                self.source.config, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
            )

    def mixture(self, layers: list[int], sizes: Mapping[str, Any]) -> HfMoeGraftConfig:
        chosen = None if layers == self.layers else layers
        return HfMoeGraftConfig(backbone=self.source.config, sparse_layers=chosen, router_type="topk_softmax", **sizes)

    def shapes(self, config: HfMoeGraftConfig) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            model = HfMoeGraftForCausalLM(config)
        state = model.state_dict()
        return {name: tuple(state[name].shape) for name in stored_names(model)}

    @cached_property
    def _prefixes(self) -> dict[str, int]:
        return {f"{block_path(network)}.": layer for layer, network in self.source.networks.items()}

    def place(self, name: str) -> tuple[int, str] | None:
        return next(((layer, name.removeprefix(p)) for p, layer in self._prefixes.items() if name.startswith(p)), None)

    def own(self, layer: int, kind: str) -> Output | None:
        """Of an expert's activation or norm that has parameters, those of the network's own."""
        network: Network = self.source.networks[layer]
        for name, module in (("act_fn", network.act_fn), ("norm", network.norm)):
            if kind.startswith(f"experts.{name}.") or kind.startswith(f"shared_experts.{name}."):
                children = self.source.model.get_submodule(network.path).named_children()
                child = next(child for child, x in children if x is module)
                return self.outputs[f"{network.path}.{child}.{kind.split(f'.{name}.')[1]}"]
        return None


def pieces(part, stored: Output) -> list[torch.Tensor]:
    (tensor,) = stored.pieces()
    return [part.of(tensor)]
