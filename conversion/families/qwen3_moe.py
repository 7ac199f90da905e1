"""Qwen3-MoE: arXiv 2505.09388. RMSNorm over each head of q and k, no shared expert."""

from .family import DECODER_FIELDS, Family, same
from .moe_rows import LAYOUTS, MLP_LAYER_TYPES, ROUTING_FIELDS, SLIDING_WINDOW

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    fields={
        **DECODER_FIELDS,
        **ROUTING_FIELDS,
        **same("head_dim", "attention_bias"),
        **same("num_experts", "moe_intermediate_size", "norm_topk_prob"),
        "attention_output_bias": "attention_bias",
        "mlp_layer_types": MLP_LAYER_TYPES,
        "sliding_window": SLIDING_WINDOW,
    },
    constants={"router_type": "softmax_topk", "qk_norm": "head"},
    neutral=frozenset({"use_sliding_window"}),  # the config class has already worked it into sliding_window
    undeclared=frozenset({"head_dim"}),
    layouts=LAYOUTS,
)
