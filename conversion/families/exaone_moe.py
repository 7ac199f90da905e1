"""K-EXAONE: https://huggingface.co/LGAI-EXAONE/K-EXAONE-236B-A23B. DeepSeek-V3's routing, RoPE in windows only."""

from .deepseek_rows import AS_V3, BIASED_SIGMOID, GROUPS, LISTED_MLP_LAYERS, shared_experts
from .family import DECODER_FIELDS, Family, same
from .moe_rows import LAYOUTS
from .rope_rows import ROPE_IN_WINDOWS

BIAS = {"model.layers.{layer}.mlp.gate.e_score_correction_bias": ("model.layers.{layer}.mlp.e_score_correction_bias",)}

EXAONE_MOE = Family(
    model_type="exaone_moe",
    fields={
        **DECODER_FIELDS,
        **GROUPS,
        **same("head_dim", "layer_types", "sliding_window", "moe_intermediate_size", "num_experts"),
        **same("num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob", "output_router_logits"),
        "n_shared_experts": shared_experts("num_shared_experts"),
        "mlp_layer_types": LISTED_MLP_LAYERS,
        "no_rope_layers": ROPE_IN_WINDOWS,
    },
    constants={**BIASED_SIGMOID, "qk_norm": "head"},
    required=AS_V3,
    neutral=frozenset({"sliding_window_pattern"}),  # the config class has already worked it into layer_types
    undeclared=frozenset({"head_dim", *AS_V3}),
    layouts={"per-expert": {**LAYOUTS["per-expert"], **BIAS}, "fused": {}},
    dropped_mtp=(r"mtp\..+",),  # a block of another kind than the last layer
)
