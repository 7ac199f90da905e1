"""Rows that several mixture-of-experts families share."""

from typing import Any

from transformers import PreTrainedConfig

from ...model.configuration_hf_moe import HfMoeConfig
from .family import Computed, MultiToken
from .regions import EXPERT


def routing_fields(
    top_k: str = "num_experts_per_tok", coef: str = "router_aux_loss_coef"
) -> dict[str, str | Computed]:
    """The rows of routing with Transformers' balance loss; `top_k` and `coef` are what the family calls those fields.

    That loss is K at perfect balance, ours 1: the coefficient that trains alike is K times theirs.
    """
    return {
        "num_experts_per_tok": top_k,
        "output_router_logits": "output_router_logits",
        "router_aux_loss_coef": Computed(
            (coef, top_k),
            lambda config: (getattr(config, coef) or 0.0) * getattr(config, top_k),
            lambda config: {coef: config.router_aux_loss_coef / config.num_experts_per_tok},
        ),
    }


ROUTING_FIELDS = routing_fields()

# One tensor per expert and projection, as Transformers 4 had them in memory and 5 still writes them.
PER_EXPERT = {
    "model.layers.{layer}.mlp.experts.gate_up_proj": (
        "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    ),
    "model.layers.{layer}.mlp.experts.down_proj": ("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",),
}
LAYOUTS = {"per-expert": PER_EXPERT, "fused": {}}

# The same under Mixtral's names.
_SPARSE = "model.layers.{layer}.block_sparse_moe."
BLOCK_SPARSE = {
    "model.layers.{layer}.mlp.gate.weight": (f"{_SPARSE}gate.weight",),
    "model.layers.{layer}.mlp.experts.gate_up_proj": (
        f"{_SPARSE}experts.{EXPERT}.w1.weight",
        f"{_SPARSE}experts.{EXPERT}.w3.weight",
    ),
    "model.layers.{layer}.mlp.experts.down_proj": (f"{_SPARSE}experts.{EXPERT}.w2.weight",),
}

# Layers for multi-token prediction under DeepSeek-V3's names.
MTP = MultiToken(
    field="num_mtp_layers",
    tensors={"block.": "", "norm.": "shared_head.norm."},
    copies={"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"},
)

# How many, in a release whose class in Transformers leaves them out.
NEXTN = "num_nextn_predict_layers"
NEXTN_LAYERS = Computed(
    (NEXTN,), lambda config: getattr(config, NEXTN, 0), lambda config: {NEXTN: config.num_mtp_layers}
)


def shared_width(config: HfMoeConfig) -> int:
    """The width of all shared experts: together they are one MLP of it."""
    return config.n_shared_experts * config.shared_expert_intermediate_size


def qwen_mlp_layer_types(config: PreTrainedConfig) -> list[str]:
    """Sparse is every decoder_sparse_step-th layer that mlp_only_layers does not name."""
    return [
        "dense" if layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step else "sparse"
        for layer in range(config.num_hidden_layers)
    ]


def qwen_dense_layers(config: HfMoeConfig) -> dict[str, Any]:
    """The same layers, with each dense one named."""
    dense = [layer for layer, kind in enumerate(config.mlp_layer_types) if kind == "dense"]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def qwen_window(config: HfMoeConfig) -> dict[str, Any]:
    used = "sliding_attention" in config.layer_types
    return {"use_sliding_window": used, "sliding_window": config.sliding_window if used else None}


MLP_LAYER_TYPES = Computed(("decoder_sparse_step", "mlp_only_layers"), qwen_mlp_layer_types, qwen_dense_layers)
# The config class has already worked use_sliding_window into it; 0 is one way to say none.
SLIDING_WINDOW = Computed(("sliding_window",), lambda config: config.sliding_window or None, qwen_window)

# One shared expert of a width of its own, under Qwen2-MoE's name.
SHARED_EXPERT_WIDTH = Computed(
    ("shared_expert_intermediate_size",),
    lambda config: config.shared_expert_intermediate_size,
    lambda config: {"shared_expert_intermediate_size": shared_width(config)},
)
SHARED_EXPERT = {
    f"model.layers.{{layer}}.mlp.shared_experts.{projection}.weight": (
        f"model.layers.{{layer}}.mlp.shared_expert.{projection}.weight",
    )
    for projection in ("gate_proj", "up_proj", "down_proj")
}
