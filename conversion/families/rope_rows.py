"""Rows for RoPE parameters that are not one dict for whole heads."""

from transformers import PreTrainedConfig

from ...model.configuration_hf_moe import HfMoeConfig
from .family import Computed


def by_layer_type(config: PreTrainedConfig) -> dict[str, dict]:
    """One dict for each type of layer that there is. These families rotate whole heads."""
    ropes = {layer_type: config.rope_parameters[layer_type] for layer_type in dict.fromkeys(config.layer_types)}
    for layer_type, rope in ropes.items():
        if rope.get("partial_rotary_factor") not in (None, 1.0):
            raise ValueError(
                f"{config.model_type} field rope_parameters has partial_rotary_factor="
                f"{rope['partial_rotary_factor']!r} for {layer_type}, which cannot be carried: Transformers' "
                f"{config.model_type} does not read it."
            )
    return ropes


def for_each_layer_type(config: HfMoeConfig) -> dict[str, dict]:
    """The same, where one dict is for all types, too."""
    rope = config.rope_parameters
    return {"rope_parameters": rope if config.rope_by_layer_type else dict.fromkeys(config.layer_types, rope)}


ROPE_BY_LAYER_TYPE = Computed(("rope_parameters", "layer_types"), by_layer_type, for_each_layer_type)

# RoPE in layers with a sliding window, none in those with full attention.
ROPE_IN_WINDOWS = Computed(
    ("layer_types",), lambda config: [int(kind == "sliding_attention") for kind in config.layer_types]
)

# RoPE on a part of each head. The factor is always said: a config class may have a default of its own.
PARTIAL_ROPE = Computed(
    ("rope_parameters",),
    lambda config: config.rope_parameters,
    lambda config: {"rope_parameters": {"partial_rotary_factor": 1.0} | config.rope_parameters},
)
