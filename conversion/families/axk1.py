"""A.X K1: https://huggingface.co/skt/A.X-K1. DeepSeek-V3's shape with one more norm behind MLPs with experts."""

from .deepseek_rows import BIASED_SIGMOID, GROUPS, LATENT_ATTENTION, LISTED_MLP_LAYERS, SHARED_EXPERTS_FIELDS
from .family import DECODER_FIELDS, Computed, Family, same
from .moe_rows import LAYOUTS

METHOD = "noaux_tc"  # choose by score and bias; any other one has no bias

NORM = "model.layers.{layer}.post_feedforward_layernorm.weight"

AXK1 = Family(
    model_type="axk1",
    fields={
        **DECODER_FIELDS,
        **SHARED_EXPERTS_FIELDS,
        **LATENT_ATTENTION,
        **GROUPS,
        **same("routed_scaling_factor", "output_router_logits", "norm_topk_prob", "rope_interleave"),
        "attention_output_bias": "attention_bias",
        "mlp_layer_types": LISTED_MLP_LAYERS,
        "router_args": Computed(
            ("topk_method",),
            lambda config: {"selection_bias": getattr(config, "topk_method", METHOD) == METHOD},
            lambda config: {"topk_method": METHOD if config.router_args.get("selection_bias") else "greedy"},
        ),
    },
    constants={
        **{name: value for name, value in BIASED_SIGMOID.items() if name != "router_args"},
        "attention_type": "mla",
        "sparse_output_norm": True,
    },
    # Transformers' class computes the same whatever this is; the code of the release does not.
    required={"scoring_func": "sigmoid"},
    neutral=frozenset({"pretraining_tp", "ep_size", "head_dim", "qk_head_dim"}),  # sizes that follow from others
    undeclared=frozenset(
        {"scoring_func", "topk_method", "ep_size", "head_dim", "qk_head_dim"}
        | {"first_k_dense_replace", "moe_layer_freq"}
    ),
    layouts={
        "per-expert": {**LAYOUTS["per-expert"], NORM: ("model.layers.{layer}.post_mlp_layernorm.weight",)},
        "fused": {NORM: ("model.layers.{layer}.mlp.post_mlp_layernorm.weight",)},
    },
    # The release has the norm for dense layers, too, where nothing reads it.
    ignored_tensors=(r"model\.layers\.\d+\.post_mlp_layernorm\.weight",),
)
