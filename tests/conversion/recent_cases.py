"""Tiny configs of the families of 2025 and 2026, of every kind of checkpoint that was released."""

from transformers import CONFIG_MAPPING

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
GROUPS = {"n_group": 3, "topk_group": 2, "norm_topk_prob": False}
# Routed as in DeepSeek-V3, with biases that are far from 0.
AS_V3 = {
    **{"num_experts_per_tok": 3, "moe_intermediate_size": 20, "routed_scaling_factor": 1.7, "norm_topk_prob": True},
    **{"initializer_range": 0.2},
}
SHARED = {**AS_V3, "n_routed_experts": 6, "n_shared_experts": 2}
LATENT = {
    **{"num_key_value_heads": 4, "kv_lora_rank": 14, "q_lora_rank": 15, "qk_nope_head_dim": 10},
    **{"qk_rope_head_dim": 6, "v_head_dim": 9},
}
MOE = {"num_experts_per_tok": 3, "router_aux_loss_coef": 0.03}
ERNIE = {
    **{"moe_k": 3, "moe_num_experts": 6, "moe_num_shared_experts": 2, "moe_intermediate_size": 20},
    **{"router_aux_loss_coef": 0.03, "initializer_range": 0.2},
}
EXAONE = {**AS_V3, "num_experts": 6, "num_shared_experts": 1, "sliding_window": 5, "layer_types": MIXED}
GRANITE_SWA = {
    **{**MOE, "num_local_experts": 5, "attention_multiplier": 0.3, "embedding_multiplier": 3.0},
    **{"residual_multiplier": 0.7, "logits_scaling": 2.5, "sliding_window": 5, "layer_types": MIXED},
}

THETAS = {
    "full_attention": {**YARN, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
MELLUM = {
    **{**MOE, "num_experts": 5, "moe_intermediate_size": 20, "head_dim": 10},
    **{"layer_types": MIXED, "sliding_window": 5, "rope_parameters": THETAS},
}
HY = {**AS_V3, "num_experts": 6, "num_shared_experts": 1, "router_scaling_factor": 1.7, "head_dim": 10}
del HY["routed_scaling_factor"], HY["norm_topk_prob"]
FLINT = {
    **{**MOE, "num_experts": 5, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28, "head_dim": 10},
    **{"layer_types": MIXED, "sliding_window": 5, "mlp_only_layers": [0], "initializer_range": 0.2},
}

ARIA = {"moe_num_experts": 5, "moe_topk": 3, "moe_num_shared_experts": 2, "initializer_range": 0.2}
HUNYUAN = {"num_experts": 5, "moe_topk": 3, "head_dim": 10, "initializer_range": 0.2}

CASES = {
    "jetmoe": (
        "jetmoe",
        {
            **{"num_local_experts": 5, "num_experts_per_tok": 2, "kv_channels": 10, "num_key_value_heads": 2},
            **{"aux_loss_coef": 0.03, "initializer_range": 0.2, "rope_parameters": LINEAR},
        },
    ),
    "jetmoe-untied": (
        "jetmoe",
        {
            **{"num_local_experts": 5, "num_experts_per_tok": 3, "kv_channels": 8, "num_key_value_heads": 2},
            **{"num_attention_heads": 6, "tie_word_embeddings": False, "activation_function": "gelu"},
        },
    ),
    "hunyuan_v1_moe": (
        "hunyuan_v1_moe",
        {
            **{**HUNYUAN, "moe_topk": [3, 3, 3], "moe_intermediate_size": [36, 36, 36]},
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0},
        },
    ),
    "hunyuan_v1_moe-bias-tied": (
        "hunyuan_v1_moe",
        {**HUNYUAN, "attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "axk1": (
        "axk1",
        {
            **{**SHARED, **LATENT, "n_group": 1, "topk_group": 1},
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "axk1-groups-half-rope-bias": (
        "axk1",
        {
            **{**SHARED, **LATENT, **GROUPS, "rope_interleave": False, "attention_bias": True},
            **{"mlp_layer_types": ["sparse", "dense", "sparse"], "tie_word_embeddings": True},
        },
    ),
    "aria_text": ("aria_text", ARIA),
    "aria_text-bias-tied": (
        "aria_text",
        {**ARIA, "attention_bias": True, "tie_word_embeddings": True, "head_dim": 8, "rope_parameters": LINEAR},
    ),
    "mellum": ("mellum", MELLUM),
    "mellum-full-dense-bias-tied": (
        "mellum",
        {
            **{**MELLUM, "layer_types": ["full_attention"] * 3, "mlp_layer_types": ["dense", "sparse", "sparse"]},
            **{"attention_bias": True, "tie_word_embeddings": True, "norm_topk_prob": False},
        },
    ),
    "hy_v3": ("hy_v3", HY),
    "hy_v3-bias-tied": (
        "hy_v3",
        {
            **{**HY, "attention_bias": True, "tie_word_embeddings": True, "num_shared_experts": 2},
            **{"mlp_layer_types": ["sparse", "dense", "sparse"], "rope_parameters": YARN},
        },
    ),
    "flint": ("flint", FLINT),
    "flint-sum-every-second-bias-tied": (
        "flint",
        {
            **{**FLINT, "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [], "rope_theta": 77.0},
            **{"attention_bias": True, "tie_word_embeddings": True},
        },
    ),
    "sarvam_moe": ("sarvam_moe", {**SHARED, "head_dim": 8, "first_k_dense_replace": 1}),
    "sarvam_moe-groups-part-rope-bias": (
        "sarvam_moe",
        {
            **{**SHARED, **GROUPS, "head_dim": 12, "attention_bias": True, "use_qk_norm": False},
            **{"partial_rotary_factor": 0.5, "tie_word_embeddings": True},
        },
    ),
    "sarvam_mla": (
        "sarvam_mla",
        {**SHARED, **LATENT, "q_lora_rank": None, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "sarvam_mla-groups-half-rope-bias": (
        "sarvam_mla",
        {
            **{**SHARED, **LATENT, **GROUPS, "rope_interleave": False, "attention_bias": True},
            **{"first_k_dense_replace": 0, "tie_word_embeddings": True},
        },
    ),
    "glm4_moe_lite": ("glm4_moe_lite", {**SHARED, **LATENT, "rope_parameters": {**YARN, "mscale_all_dim": 1.0}}),
    "glm4_moe_lite-groups-half-rope-bias": (
        "glm4_moe_lite",
        {
            **{**SHARED, **LATENT, **GROUPS, "q_lora_rank": None, "rope_interleave": False, "attention_bias": True},
            **{"mlp_layer_types": ["sparse"] * 3, "tie_word_embeddings": True},
        },
    ),
    "solar_open": ("solar_open", {**SHARED, "head_dim": 8, "rope_parameters": YARN}),
    "solar_open-groups-bias-tied": (
        "solar_open",
        {**SHARED, **GROUPS, "head_dim": 12, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "dots1": ("dots1", {**SHARED, "num_key_value_heads": 4, "first_k_dense_replace": 1, "sliding_window": None}),
    "dots1-groups-window-bias": (
        "dots1",
        {**SHARED, **GROUPS, "head_dim": 8, "sliding_window": 5, "max_window_layers": 1, "attention_bias": True},
    ),
    "flex_olmo": ("flex_olmo", {**MOE, "num_experts": 5}),
    "flex_olmo-sum-bias-tied": (
        "flex_olmo",
        {
            **{**MOE, "num_experts": 5, "norm_topk_prob": True, "attention_bias": True, "tie_word_embeddings": True},
            **{"head_dim": 8, "num_key_value_heads": 4, "rope_parameters": LINEAR},
        },
    ),
    "exaone_moe": ("exaone_moe", EXAONE),
    "exaone_moe-groups-all-sliding": (
        "exaone_moe",
        {
            **{**EXAONE, **GROUPS, "layer_types": ["sliding_attention"] * 3, "num_shared_experts": 2, "head_dim": 8},
            **{"mlp_layer_types": ["sparse", "dense", "sparse"], "tie_word_embeddings": True},
        },
    ),
    "ernie4_5_moe": ("ernie4_5_moe", ERNIE),
    "ernie4_5_moe-every-second-untied": (
        "ernie4_5_moe",
        {
            **{**ERNIE, "num_hidden_layers": 5, "moe_layer_interval": 2, "moe_layer_start_index": 0, "head_dim": 8},
            **{"moe_num_shared_experts": 0, "tie_word_embeddings": False, "rope_parameters": LINEAR},
        },
    ),
    "granitemoe_swa": ("granitemoe_swa", {**GRANITE_SWA, "layer_rope_theta": [77.0, 0, 77.0]}),
    "granitemoe_swa-thetas-shared-bias": (
        "granitemoe_swa",
        {
            **{**GRANITE_SWA, "layer_rope_theta": [77.0, 900.0, 0], "shared_intermediate_size": 28, "head_dim": 10},
            **{"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": LINEAR},
        },
    ),
}
RECENT_CASES = {name: case for name, case in CASES.items() if case[0] in CONFIG_MAPPING}  # older hosts have fewer
