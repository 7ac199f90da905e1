"""Qwen1.5-MoE and Qwen2-MoE: arXiv 2407.10671. A shared expert behind a sigmoid gate beside the routed ones."""

from .family import DECODER_FIELDS, Family, same
from .moe_rows import LAYOUTS, MLP_LAYER_TYPES, ROUTING_FIELDS, SHARED_EXPERT, SHARED_EXPERT_WIDTH, SLIDING_WINDOW

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    fields={
        **DECODER_FIELDS,
        **ROUTING_FIELDS,
        **same("head_dim", "layer_types", "num_experts", "moe_intermediate_size", "norm_topk_prob"),
        "shared_expert_intermediate_size": SHARED_EXPERT_WIDTH,
        "attention_bias": "qkv_bias",
        "sliding_window": SLIDING_WINDOW,
        "mlp_layer_types": MLP_LAYER_TYPES,
    },
    constants={"router_type": "softmax_topk", "n_shared_experts": 1, "shared_expert_gate": True},
    # The config class has already worked these into layer_types and sliding_window.
    neutral=frozenset({"use_sliding_window", "max_window_layers"}),
    undeclared=frozenset({"head_dim"}),
    tensors=SHARED_EXPERT,
    layouts=LAYOUTS,
)
