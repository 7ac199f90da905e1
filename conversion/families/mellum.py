"""Mellum 2: https://huggingface.co/JetBrains/Mellum2-12B-A2.5B-Base. Qwen3-MoE; windows have their own RoPE."""

from .family import DECODER_FIELDS, Family, same
from .moe_rows import LAYOUTS, ROUTING_FIELDS
from .rope_rows import ROPE_BY_LAYER_TYPE

MELLUM = Family(
    model_type="mellum",
    fields={
        **DECODER_FIELDS,
        **ROUTING_FIELDS,
        **same("head_dim", "attention_bias", "layer_types", "sliding_window", "mlp_layer_types"),
        **same("num_experts", "moe_intermediate_size", "norm_topk_prob"),
        "attention_output_bias": "attention_bias",
        "rope_parameters": ROPE_BY_LAYER_TYPE,
    },
    constants={"router_type": "softmax_topk", "qk_norm": "head"},
    # Of layers that Transformers' class leaves out, and whose attention is not that of the last layer.
    neutral=frozenset({"num_mtp_layers", "mtp_layer_types", "mtp_mlp_layer_types"}),
    layouts=LAYOUTS,
    dropped_mtp=(r"mtp\..+",),
)
