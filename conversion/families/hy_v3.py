"""Hy3: https://huggingface.co/tencent/Hy3-preview. DeepSeek-V3's routing without groups over Qwen3's attention."""

from .deepseek_rows import BIASED_SIGMOID, LISTED_MLP_LAYERS, shared_experts
from .family import DECODER_FIELDS, Computed, Family, same
from .moe_rows import LAYOUTS, MTP, NEXTN, NEXTN_LAYERS

_MLP = "model.layers.{layer}.mlp."
BIAS = f"{_MLP}gate.e_score_correction_bias"
# Transformers' class computes the same whatever these are; the code of the release does not.
RELEASED = {"qk_norm": True, "route_norm": True}

HY_V3 = Family(
    model_type="hy_v3",
    fields={
        **DECODER_FIELDS,
        **same("head_dim", "attention_bias", "num_experts", "num_experts_per_tok", "output_router_logits"),
        "attention_output_bias": "attention_bias",
        "routed_scaling_factor": "router_scaling_factor",
        "n_shared_experts": shared_experts("num_shared_experts"),
        "mlp_layer_types": LISTED_MLP_LAYERS,
        "num_mtp_layers": NEXTN_LAYERS,
        "moe_intermediate_size": Computed(  # also as the release says it
            ("moe_intermediate_size", "expert_hidden_dim"),
            lambda config: config.moe_intermediate_size,
            lambda config: dict.fromkeys(("moe_intermediate_size", "expert_hidden_dim"), config.moe_intermediate_size),
        ),
    },
    constants={**BIASED_SIGMOID, "norm_topk_prob": True, "qk_norm": "head"},
    required={"mlp_bias": False, **RELEASED},  # a bias would be on dense MLPs and shared experts, not on routed ones
    neutral=frozenset({"enable_moe_fp32_combine"}),  # the precision of one sum
    undeclared=frozenset({*RELEASED, "first_k_dense_replace", "expert_hidden_dim", NEXTN}),
    layouts={
        "per-expert": {
            **LAYOUTS["per-expert"],
            f"{_MLP}gate.weight": (f"{_MLP}router.gate.weight",),
            BIAS: (f"{_MLP}expert_bias",),
            **{
                f"{_MLP}shared_experts.{name}_proj.weight": (f"{_MLP}shared_mlp.{name}_proj.weight",)
                for name in ("gate", "up", "down")
            },
        },
        "fused": {BIAS: (f"{_MLP}e_score_correction_bias",)},
    },
    mtp=MTP._replace(field=NEXTN, tensors={"block.": "", "norm.": "final_layernorm."}, copies={}),
)
