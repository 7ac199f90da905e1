"""Granite with sliding windows, sinks and RoPE by layer: https://huggingface.co/ibm-granite/granite-swash-3b-a600m."""

from typing import Any

from transformers import PreTrainedConfig

from ...model.configuration_hf_moe import HfMoeConfig
from .family import Computed, Family, plain_rope, same
from .granitemoe import GRANITEMOESHARED, LAYOUTS


def ropes(config: PreTrainedConfig) -> dict[str, Any]:
    """`layer_rope_theta`, 0 of which means no RoPE, as one dict for all layers, or one a layer type."""
    rope, thetas = plain_rope(config), config.layer_rope_theta
    of_type = {
        kind: {theta for theta, other in zip(thetas, config.layer_types, strict=True) if theta and other == kind}
        for kind in dict.fromkeys(config.layer_types)
    }
    if any(len(found) > 1 for found in of_type.values()):
        raise ValueError(
            f"granitemoe_swa field layer_rope_theta={thetas!r} cannot be carried: it may differ by layer type only."
        )
    used = {theta for theta in thetas if theta}
    if len(used) < 2:
        return {**rope, "rope_theta": used.pop() if used else rope["rope_theta"]}
    return {kind: {**rope, "rope_theta": next(iter(found), rope["rope_theta"])} for kind, found in of_type.items()}


def layer_rope_theta(config: HfMoeConfig) -> dict[str, Any]:
    of_type = dict.fromkeys(config.layer_types, config.rope_parameters)
    if config.rope_by_layer_type:
        of_type = config.rope_parameters
    turned = config.no_rope_layers or [1] * config.num_hidden_layers
    thetas = [of_type[kind]["rope_theta"] if has else 0 for kind, has in zip(config.layer_types, turned, strict=True)]
    return {"rope_parameters": config.ropes[0], "layer_rope_theta": thetas}


GRANITEMOE_SWA = Family(
    model_type="granitemoe_swa",
    fields={
        **GRANITEMOESHARED.fields,
        **same("layer_types", "sliding_window"),
        "rope_parameters": Computed(("rope_parameters", "layer_rope_theta", "layer_types"), ropes, layer_rope_theta),
        "no_rope_layers": Computed(
            ("layer_rope_theta",), lambda config: [int(theta > 0) for theta in config.layer_rope_theta]
        ),
    },
    constants={**GRANITEMOESHARED.constants, "attention_sinks": True},
    undeclared=GRANITEMOESHARED.undeclared,
    tensors=GRANITEMOESHARED.tensors,
    layouts={"fused": LAYOUTS["fused-v5"]},
)
