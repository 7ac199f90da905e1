"""Flint: https://huggingface.co/RecursiveSI/flint. Sigmoid scores without a bias, sinks, RoPE in windows only."""

from .family import DECODER_FIELDS, Family, same
from .moe_rows import LAYOUTS, MLP_LAYER_TYPES, ROUTING_FIELDS, SHARED_EXPERT, SHARED_EXPERT_WIDTH
from .rope_rows import ROPE_IN_WINDOWS

_ATTENTION = "model.layers.{layer}.self_attn."

FLINT = Family(
    model_type="flint",
    fields={
        **DECODER_FIELDS,
        **ROUTING_FIELDS,
        **same("head_dim", "attention_bias", "layer_types", "sliding_window"),
        **same("num_experts", "moe_intermediate_size", "norm_topk_prob"),
        "attention_output_bias": "attention_bias",
        "shared_expert_intermediate_size": SHARED_EXPERT_WIDTH,
        "mlp_layer_types": MLP_LAYER_TYPES,
        "no_rope_layers": ROPE_IN_WINDOWS,
    },
    constants={
        "router_type": "sigmoid_topk",
        "qk_norm": "head",
        "attention_sinks": True,
        "n_shared_experts": 1,
    },
    tensors=SHARED_EXPERT,
    layouts={
        "per-expert": {**LAYOUTS["per-expert"], f"{_ATTENTION}sinks": (f"{_ATTENTION}softmax_offset",)},
        "fused": {},
    },
)
