"""Llama 4, the text model: https://ai.meta.com/blog/llama-4-multimodal-intelligence. Experts see weighted inputs."""

from typing import Any

from transformers import PreTrainedConfig

from ...model.configuration_hf_moe import HfMoeConfig
from .family import DECODER_FIELDS, Computed, Family, same
from .moe_rows import ROUTING_FIELDS
from .regions import Stacked

_OURS, _THEIRS = "model.layers.{layer}.mlp.", "model.layers.{layer}.feed_forward."
PROJECTIONS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def mlp_layer_types(config: PreTrainedConfig) -> list[str]:
    return ["sparse" if layer in config.moe_layers else "dense" for layer in range(config.num_hidden_layers)]


def moe_layers(config: HfMoeConfig) -> dict[str, Any]:
    return {"moe_layers": [layer for layer, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]}


def rope_layers(config: PreTrainedConfig) -> list[int]:
    return config.no_rope_layers[: config.num_hidden_layers]


LLAMA4_TEXT = Family(
    model_type="llama4_text",
    fields={
        **DECODER_FIELDS,
        **ROUTING_FIELDS,
        **same("head_dim", "attention_bias", "layer_types", "attention_chunk_size", "floor_scale", "attn_scale"),
        "attention_output_bias": "attention_bias",
        "intermediate_size": "intermediate_size_mlp",
        "num_experts": "num_local_experts",
        "moe_intermediate_size": "intermediate_size",
        "mlp_layer_types": Computed(("moe_layers",), mlp_layer_types, moe_layers),
        "qk_norm": Computed(
            ("use_qk_norm",),
            lambda config: "l2" if config.use_qk_norm else None,
            lambda config: {"use_qk_norm": config.qk_norm == "l2"},
        ),
        "no_rope_layers": Computed(
            ("no_rope_layers",),
            rope_layers,
            lambda config: {"no_rope_layers": config.no_rope_layers or [1] * config.num_hidden_layers},
        ),
        "attn_temperature_tuning": Computed(
            ("attn_temperature_tuning",),
            lambda config: config.attn_temperature_tuning and 0 in rope_layers(config),
            lambda config: {"attn_temperature_tuning": config.attn_temperature_tuning},
        ),
    },
    constants={
        "rope_interleave": True,
        "n_shared_experts": 1,
        "router_type": "sigmoid_topk",
        "expert_input_scaling": True,
    },
    # The config class works the first two into moe_layers and no_rope_layers; no model reads the third.
    neutral=frozenset({"interleave_moe_layer_step", "no_rope_layer_interval", "router_jitter_noise"}),
    tensors={
        **{f"{_OURS}{name}": (f"{_THEIRS}{name}",) for name in PROJECTIONS},
        **{f"{_OURS}shared_experts.{name}": (f"{_THEIRS}shared_expert.{name}",) for name in PROJECTIONS},
        f"{_OURS}gate.weight": (f"{_THEIRS}router.weight",),
        f"{_OURS}experts.gate_up_proj": (Stacked(f"{_THEIRS}experts.gate_up_proj", transposed=True),),
        f"{_OURS}experts.down_proj": (Stacked(f"{_THEIRS}experts.down_proj", transposed=True),),
    },
)
