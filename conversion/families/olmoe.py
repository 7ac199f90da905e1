"""OLMoE: arXiv 2409.02060. RMSNorm over all heads of q and k at once, optional clipping of q, k and v."""

from .family import DECODER_FIELDS, Family, same
from .moe_rows import LAYOUTS, ROUTING_FIELDS

OLMOE = Family(
    model_type="olmoe",
    fields={
        **DECODER_FIELDS,
        **ROUTING_FIELDS,
        **same("attention_bias", "clip_qkv", "num_experts", "norm_topk_prob"),
        "attention_output_bias": "attention_bias",
        "moe_intermediate_size": "intermediate_size",
    },
    constants={"router_type": "softmax_topk", "qk_norm": "projection"},
    # Transformers' class reads both from a config that has them, and then contradicts itself.
    required={"head_dim": None, "sliding_window": None},
    undeclared=frozenset({"head_dim", "sliding_window"}),
    layouts=LAYOUTS,
)
