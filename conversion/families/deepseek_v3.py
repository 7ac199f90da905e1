"""DeepSeek-V3 and R1: arXiv 2412.19437. Sigmoid scores, a bias that only selects, node-limited routing."""

from .deepseek_rows import AS_V3, DEEPSEEK_FIELDS, GROUPS, LATENT_ATTENTION
from .family import Family, same
from .moe_rows import LAYOUTS, MTP

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    fields={
        **DEEPSEEK_FIELDS,
        **LATENT_ATTENTION,
        **same("routed_scaling_factor", "output_router_logits", "norm_topk_prob"),
        **same("rope_interleave", "num_mtp_layers"),
        **GROUPS,
    },
    constants={"attention_type": "mla", "router_type": "sigmoid_topk", "router_args": {"selection_bias": True}},
    required=AS_V3,
    # How training was spread; sizes that follow from others.
    neutral=frozenset({"pretraining_tp", "ep_size", "head_dim", "qk_head_dim"}),
    undeclared=frozenset({*AS_V3, "ep_size", "head_dim", "qk_head_dim", "aux_loss_alpha", "seq_aux"}),
    layouts=LAYOUTS,
    mtp=MTP,
)
