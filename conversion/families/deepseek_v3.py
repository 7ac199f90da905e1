"""DeepSeek-V3 and R1: arXiv 2412.19437. Sigmoid scores, a bias that only selects, node-limited routing."""

from .deepseek_rows import DEEPSEEK_FIELDS, LATENT_ATTENTION, groups
from .family import Computed, Family, same
from .moe_rows import LAYOUTS, MTP

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    fields={
        **DEEPSEEK_FIELDS,
        **LATENT_ATTENTION,
        **same("routed_scaling_factor", "output_router_logits", "norm_topk_prob"),
        **same("rope_interleave", "num_mtp_layers"),
        "n_group": Computed(("n_group",), lambda config: config.n_group or 1, groups),
        "topk_group": Computed(("topk_group",), lambda config: config.topk_group or 1),
    },
    constants={"attention_type": "mla", "router_type": "sigmoid_topk", "router_args": {"selection_bias": True}},
    # Transformers' class computes the same whatever these are; the code of the release does not.
    required={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    # How training was spread; sizes that follow from others.
    neutral=frozenset({"pretraining_tp", "ep_size", "head_dim", "qk_head_dim"}),
    undeclared=frozenset(
        {
            "scoring_func",
            "topk_method",
            "moe_layer_freq",
            "ep_size",
            "head_dim",
            "qk_head_dim",
            "aux_loss_alpha",
            "seq_aux",
        }
    ),
    layouts=LAYOUTS,
    mtp=MTP,
)
