"""dots.llm1: arXiv 2506.05767. DeepSeek-V3's routing over Qwen3's attention."""

from .deepseek_rows import AS_V3, BIASED_SIGMOID, GROUPS, SHARED_EXPERTS_FIELDS
from .family import DECODER_FIELDS, Family, same
from .moe_rows import LAYOUTS

DOTS1 = Family(
    model_type="dots1",
    fields={
        **DECODER_FIELDS,
        **SHARED_EXPERTS_FIELDS,
        **GROUPS,
        **same("head_dim", "layer_types", "sliding_window", "routed_scaling_factor", "norm_topk_prob"),
        **same("output_router_logits"),
        "attention_output_bias": "attention_bias",
    },
    constants={**BIASED_SIGMOID, "qk_norm": "head"},
    required=AS_V3,
    neutral=frozenset({"max_window_layers"}),  # the config class has already worked it into layer_types
    undeclared=frozenset({"head_dim", *AS_V3}),
    layouts=LAYOUTS,
)
