"""Recorded decoding for Transformers' own mixtures of experts, and for grafts."""

from functools import cache
from itertools import chain
from typing import TypeVar

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMixin
from transformers.utils import logging

from .model.decoding import HfMoeDecoding, obstacles, wishes

logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)

# Layers of a cache whose place one with room for a whole text can take: masks know of windows.
CACHED = {DynamicLayer, DynamicSlidingWindowLayer}
HOSTS_EXPERTS = ("eager", "grouped_mm", "batched_mm")  # which may wait for the device, or copy weights


class FastGeneration(HfMoeDecoding):
    """`generate()` of a host's model with recorded steps, or one warning why it is as before."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *sizes):
        reasons = chain(wishes(generation_config, model_kwargs, generation_mode), obstacles(self))
        if (reason := next(reasons, None)) is not None:
            logger.warning_once(f"Generating as before fast_generate: {reason}.")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *sizes)

    def __reduce_ex__(self, protocol):
        """Pickled by the host's class: this one is found under no name."""
        return empty, (type(self).__bases__[1],), self.__dict__


def fast_generate(model: Model) -> Model:
    """The same model, whose `generate()` from now on replays a recorded step for each token, greedy or sampled.

    On a GPU, once the model is there. Its experts become "hf_moe" where they are one of Transformers'; attention,
    norms, routers and experts of the classes in `hf_moe.kernels.decode.host_models` get kernels for few tokens, others
    are recorded as they are. What can't be recorded is generated as before, and a warning says why. What the model
    computes elsewhere, and what is saved of it, stays. Raises ValueError where the model has no experts behind
    Transformers' interface, or decodes in a way that no graph can hold.
    """
    if isinstance(model, HfMoeDecoding):  # one of ours, or made fast before
        return model
    if (reason := refusal(model)) is not None:
        raise ValueError(f"fast_generate can't record {type(model).__name__}: {reason}.")
    if model.config._experts_implementation in HOSTS_EXPERTS:
        model.set_experts_implementation("hf_moe")
    model.__class__ = faster(type(model))
    return model


def refusal(model) -> str | None:
    """Why no step of such a model can be recorded, wherever it is."""
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        return "it is no model of Transformers that generates (of one with adapters, give model.get_base_model())"
    if model.config.is_encoder_decoder or model.input_modalities not in ("text", ("text",)):
        return "it reads more than one text"
    if not any(hasattr(module, "has_gate") for module in model.modules()):
        return "it has no experts that Transformers' experts interface calls"
    layers = DynamicCache(config=model.config).layers
    others = {type(layer).__name__ for layer in layers if type(layer) not in CACHED}
    if others or len(layers) != model.config.num_hidden_layers:
        return f"its cache is more than a key and a value a token and layer ({', '.join(sorted(others))})"
    if not model._can_compile_fullgraph:
        return "Transformers says that its forward decides by values (_can_compile_fullgraph)"
    return None


@cache
def faster(kind: type) -> type:
    """The class with recorded decoding before its own; by its name, which savers and Transformers go by."""
    same = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (FastGeneration, kind), same)


def empty(kind: type) -> PreTrainedModel:
    return object.__new__(faster(kind))
