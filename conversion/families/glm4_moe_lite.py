"""GLM-4.7-Flash: https://huggingface.co/zai-org/GLM-4.7-Flash. GLM-4.5's routing over latent attention."""

from .deepseek_rows import AS_V3, BIASED_SIGMOID, GROUPS, LATENT_ATTENTION, LISTED_MLP_LAYERS, SHARED_EXPERTS_FIELDS
from .family import DECODER_FIELDS, Family, same
from .moe_rows import LAYOUTS, MTP, NEXTN, NEXTN_LAYERS

GLM4_MOE_LITE = Family(
    model_type="glm4_moe_lite",
    fields={
        **DECODER_FIELDS,
        **SHARED_EXPERTS_FIELDS,
        **LATENT_ATTENTION,
        **GROUPS,
        **same("routed_scaling_factor", "output_router_logits", "norm_topk_prob", "rope_interleave"),
        "attention_output_bias": "attention_bias",
        "num_mtp_layers": NEXTN_LAYERS,
        "mlp_layer_types": LISTED_MLP_LAYERS,
    },
    constants={**BIASED_SIGMOID, "attention_type": "mla"},
    required=AS_V3,
    neutral=frozenset({"pretraining_tp", "qk_head_dim"}),  # how training was spread; a size that follows from others
    undeclared=frozenset({*AS_V3, "partial_rotary_factor", "qk_head_dim", "first_k_dense_replace", NEXTN}),
    layouts=LAYOUTS,
    mtp=MTP._replace(field=NEXTN),
)
