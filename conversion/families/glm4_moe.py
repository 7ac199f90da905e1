"""GLM-4.5 to 4.7: arXiv 2508.06471. DeepSeek-V3's routing over grouped-query attention, RoPE on half of each head."""

from .deepseek_rows import BIASED_SIGMOID, GROUPS, SHARED_EXPERTS_FIELDS
from .family import DECODER_FIELDS, Computed, Family, same
from .moe_rows import LAYOUTS, MTP
from .rope_rows import PARTIAL_ROPE

GLM4_MOE = Family(
    model_type="glm4_moe",
    fields={
        **DECODER_FIELDS,
        **SHARED_EXPERTS_FIELDS,
        **GROUPS,
        **same("head_dim", "routed_scaling_factor", "output_router_logits", "norm_topk_prob"),
        **same("num_mtp_layers"),
        "rope_parameters": PARTIAL_ROPE,
        "qk_norm": Computed(
            ("use_qk_norm",),
            lambda config: "head" if config.use_qk_norm else None,
            lambda config: {"use_qk_norm": config.qk_norm == "head"},
        ),
    },
    constants=BIASED_SIGMOID,
    undeclared=frozenset({"head_dim", "partial_rotary_factor"}),
    layouts=LAYOUTS,
    mtp=MTP,
)
