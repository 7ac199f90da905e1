"""Published mixture-of-experts architectures as data, and `preset_config`, which builds the config of one.

Every preset says where its numbers come from (`source`), how it differs from the release (`differs`, None where it
does not), and what was published about its size (`published`), so that a test can hold the built model against it:

- total, active: as printed, in scientific notation, so that the last digit is the precision ("6e11" is 600B to one
  digit, "4.0e11" is 400B to two).
- counts: what the publication counts as active, a key of `ACTIVE_COUNTS`; where it does not say, what its figure fits.
  total_counts: the same of the total, where that is not "all".
- absent: parameters of the release that the preset does not build.
- mismatch: for each figure that does not follow from the release's own dimensions, how far off it is.

A loss coefficient stands as published, and says what it multiplied there, a key of `COEFFICIENTS`: HfMoeConfig has one
convention for all, see its docstring. DeepSeekMoE's and DeepSeek-V2's are the papers', which balance over the batch;
the config.json of their releases names a loss within sequences instead, and so does what is imported.

A preset holds no token ids: they belong to a tokenizer.

The table needs nothing of the package: `hf-moe presets` lists it without the seconds that a model class takes.
"""

import copy
import difflib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..model.configuration_hf_moe import HfMoeConfig

# What is left out of all the parameters that work on one token (`sizes.sizes`).
ACTIVE_COUNTS = {
    "all": (),
    "no input embedding": ("embedding_params",),  # a lookup, no arithmetic
    "no embeddings": ("embedding_params", "head_params"),
}

ENCODER_DECODER = (
    "The release is an encoder-decoder with other positions; this is one causal decoder with the layers of both "
    "stacks, RoPE, and no cross-attention."
)
LLAMA_4 = "Text only: no vision tower, no projector."
LLAMA_4_VISION = 850_960_896 + 20_971_520  # vision tower and projector: in the published total, not in ours
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40, "beta_fast": 32, "beta_slow": 1}
YARN |= {"original_max_position_embeddings": 4096}

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    "switch-base-64": {
        "title": "Switch-Base, 64 experts",
        "source": ["https://arxiv.org/abs/2101.03961", "https://huggingface.co/google/switch-base-64"],
        "differs": ENCODER_DECODER,
        "published": {
            "total": "3.8e9",
            "active": "2.23e8",  # the FLOPs of T5-Base, 223M
            "counts": "all",
            "absent": dict.fromkeys(("total", "active"), 12 * (4 * 768 * 768 + 768)),  # cross-attention and its norm
        },
        "fields": {
            "vocab_size": 32128, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 24,
            "num_attention_heads": 12, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True, "hidden_act": "relu", "gated_mlp": False,
            "mlp_layer_types": {"sparse_every": 2}, "num_experts": 64, "num_experts_per_tok": 1,
            "router_type": "softmax_topk", "router_args": {"jitter": 0.01, "eval_capacity_factor": 2.0},
            "expert_capacity_factor": 1.25, "router_aux_loss_coef": {"per_layer": 0.01},
        },
    },
    "gshard-600b": {
        "title": "GShard, 2048 experts, 36 layers",
        "source": ["https://arxiv.org/abs/2006.16668"],
        "differs": ENCODER_DECODER + " The paper does not print its vocabulary; 64,000 is that of its predecessor M4.",
        "published": {
            "total": "6e11",
            "active": None,
            "counts": "all",
        },
        "fields": {
            "vocab_size": 64000, "hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 36,
            "num_attention_heads": 16, "head_dim": 128, "max_position_embeddings": 1024, "tie_word_embeddings": True,
            "hidden_act": "relu", "gated_mlp": False, "mlp_layer_types": {"sparse_every": 2}, "num_experts": 2048,
            "num_experts_per_tok": 2, "router_type": "gshard", "expert_capacity_factor": 1.0,
        },
    },
    "st-moe-32b": {
        "title": "ST-MoE-32B",
        "source": ["https://arxiv.org/abs/2202.08906"],
        "differs": ENCODER_DECODER + " It is named after the FLOPs of a dense model of 32B.",
        "published": {
            "total": "269e9",
            "active": None,
            "counts": "all",
            "absent": dict.fromkeys(("total", "active"), 27 * (4 * 5120 * 8192 + 5120)),
        },
        "fields": {
            "vocab_size": 32128, "hidden_size": 5120, "intermediate_size": 20480, "num_hidden_layers": 54,
            "num_attention_heads": 64, "head_dim": 128, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
            "hidden_act": "gelu_pytorch_tanh", "mlp_layer_types": {"sparse_every": 4, "stack": 27}, "num_experts": 64,
            "num_experts_per_tok": 2, "router_type": "softmax_topk", "norm_topk_prob": True,
            "router_args": {"eval_capacity_factor": 2.0}, "expert_capacity_factor": 1.25,
            "router_aux_loss_coef": {"per_layer": 0.01}, "router_z_loss_coef": {"per_layer": 0.001},
        },
    },
    "mixtral-8x7b": {
        "title": "Mixtral 8x7B",
        "source": ["https://arxiv.org/abs/2401.04088", "https://huggingface.co/mistralai/Mixtral-8x7B-v0.1"],
        "differs": None,
        "published": {"total": "46.7e9", "active": "12.9e9", "counts": "all"},
        "fields": {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "num_experts": 8, "num_experts_per_tok": 2,
            "router_type": "topk_softmax", "router_aux_loss_coef": {"times_top_k": 0.02},
        },
    },
    "mixtral-8x22b": {
        "title": "Mixtral 8x22B",
        "source": ["https://mistral.ai/news/mixtral-8x22b/", "https://huggingface.co/mistralai/Mixtral-8x22B-v0.1"],
        "differs": None,
        "published": {"total": "141e9", "active": "39e9", "counts": "all"},
        "fields": {
            "vocab_size": 32000, "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56,
            "num_attention_heads": 48, "num_key_value_heads": 8, "max_position_embeddings": 65536,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "num_experts": 8, "num_experts_per_tok": 2,
            "router_type": "topk_softmax", "router_aux_loss_coef": {"times_top_k": 0.001},
        },
    },
    "dbrx": {
        "title": "DBRX",
        "source": ["https://github.com/databricks/dbrx", "https://huggingface.co/databricks/dbrx-base"],
        "differs": None,
        "published": {"total": "132e9", "active": "36e9", "counts": "all"},
        "fields": {
            "vocab_size": 100352, "hidden_size": 6144, "intermediate_size": 10752, "num_hidden_layers": 40,
            "num_attention_heads": 48, "num_key_value_heads": 8, "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "clip_qkv": 8.0,
            "norm_type": "layer_norm", "num_experts": 16, "num_experts_per_tok": 4, "router_type": "topk_softmax",
            "router_aux_loss_coef": {"times_top_k": 0.05},
        },
    },
    "grok-1": {
        "title": "Grok-1",
        "source": ["https://github.com/xai-org/grok-1", "https://x.ai/news/grok-os"],
        "differs": None,
        "published": {
            "total": "314e9",
            "active": None,
            "counts": "all",
            "mismatch": {
                "total": "The dimensions in the release's run.py sum to 316B. It says that 25% of the weights are "
                "active: 2 of 8 experts; with all that is not an expert it is 27%."
            },
        },
        "fields": {
            "vocab_size": 131072, "hidden_size": 6144, "intermediate_size": 32768, "num_hidden_layers": 64,
            "num_attention_heads": 48, "num_key_value_heads": 8, "max_position_embeddings": 8192,
            "attn_logit_softcapping": 30.0, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_placement": "sandwich", "embedding_multiplier": 78.38367176906169, "logits_scaling": 3**0.5,
            "num_experts": 8, "num_experts_per_tok": 2, "router_type": "softmax_topk",
        },
    },
    "deepseek-moe-16b": {
        "title": "DeepSeekMoE 16B",
        "source": ["https://arxiv.org/abs/2401.06066", "https://huggingface.co/deepseek-ai/deepseek-moe-16b-base"],
        "differs": None,
        "published": {"total": "16.4e9", "active": "2.8e9", "counts": "all"},
        "fields": {
            "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
            "num_hidden_layers": 28, "num_attention_heads": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
            "mlp_layer_types": {"first_dense": 1}, "num_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
            "router_type": "softmax_topk", "router_aux_loss_coef": {"per_layer": 0.001}, "initializer_range": 0.006,
        },
    },
    "deepseek-v2": {
        "title": "DeepSeek-V2",
        "source": ["https://arxiv.org/abs/2405.04434", "https://huggingface.co/deepseek-ai/DeepSeek-V2"],
        "differs": None,
        "published": {
            "total": "236e9",
            "active": "21e9",
            "counts": "all",
            "cache": {
                "against": "DeepSeek 67B (95 layers, 8 key-value heads of 128)",
                "elements_per_token": 95 * 2 * 8 * 128,
                "bits": 6,  # the paper's figure is for a cache quantised to 6 bits an element (3.2.3)
                "saved": "0.933",
            },
        },
        "fields": {
            "vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
            "num_hidden_layers": 60, "num_attention_heads": 128, "attention_type": "mla", "q_lora_rank": 1536,
            "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "max_position_embeddings": 163840, "rope_interleave": True,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "rms_norm_eps": 1e-6,
            "mlp_layer_types": {"first_dense": 1}, "num_experts": 160, "num_experts_per_tok": 6, "n_shared_experts": 2,
            "router_type": "softmax_topk", "router_args": {"group_score": "best"}, "n_group": 8, "topk_group": 3,
            "routed_scaling_factor": 16.0, "router_aux_loss_coef": {"per_layer": 0.003},
            "device_aux_loss_coef": {"per_layer": 0.05}, "comm_aux_loss_coef": {"per_layer": 0.02},
            "initializer_range": 0.006,
        },
    },
    "deepseek-v2-lite": {
        "title": "DeepSeek-V2-Lite",
        "source": ["https://arxiv.org/abs/2405.04434", "https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite"],
        "differs": None,
        "published": {
            "total": "15.7e9",
            "active": "2.4e9",
            "counts": "no input embedding",
            "mismatch": {"active": "2.451B, which would round to 2.5B; cut after the first decimal it is 2.4B."},
        },
        "fields": {
            "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
            "num_hidden_layers": 27, "num_attention_heads": 16, "attention_type": "mla", "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840,
            "rope_interleave": True, "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
            "rms_norm_eps": 1e-6, "mlp_layer_types": {"first_dense": 1}, "num_experts": 64, "num_experts_per_tok": 6,
            "n_shared_experts": 2, "router_type": "softmax_topk", "router_aux_loss_coef": 0.0,
            "seq_aux_loss_coef": {"per_layer": 0.001}, "initializer_range": 0.006,
        },
    },
    "deepseek-v3": {
        "title": "DeepSeek-V3",
        "source": ["https://arxiv.org/abs/2412.19437", "https://huggingface.co/deepseek-ai/DeepSeek-V3"],
        "differs": "Without the module for multi-token prediction, which the published 671B do not count either.",
        "published": {"total": "671e9", "active": "37e9", "counts": "no input embedding"},
        "fields": {
            "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
            "num_hidden_layers": 61, "num_attention_heads": 128, "attention_type": "mla", "q_lora_rank": 1536,
            "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "max_position_embeddings": 163840, "rope_interleave": True,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "rms_norm_eps": 1e-6,
            "mlp_layer_types": {"first_dense": 3}, "num_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
            "router_type": "sigmoid_topk", "router_args": {"selection_bias": True, "group_score": "two_best"},
            "norm_topk_prob": True, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
            "router_aux_loss_coef": 0.0, "seq_aux_loss_coef": {"per_layer": 0.0001}, "router_bias_update_speed": 0.001,
            "initializer_range": 0.006,
        },
    },
    "qwen1.5-moe-a2.7b": {
        "title": "Qwen1.5-MoE-A2.7B",
        "source": ["https://qwenlm.github.io/blog/qwen-moe/", "https://huggingface.co/Qwen/Qwen1.5-MoE-A2.7B"],
        "differs": None,
        "published": {"total": "14.3e9", "active": "2.7e9", "counts": "all"},
        "fields": {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1408,
            "num_hidden_layers": 24, "num_attention_heads": 16, "attention_bias": True,
            "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "rms_norm_eps": 1e-6, "num_experts": 60, "num_experts_per_tok": 4, "n_shared_experts": 4,
            "shared_expert_gate": True, "router_type": "softmax_topk", "router_aux_loss_coef": {"times_top_k": 0.001},
        },
    },
    "qwen3-30b-a3b": {
        "title": "Qwen3-30B-A3B",
        "source": ["https://arxiv.org/abs/2505.09388", "https://huggingface.co/Qwen/Qwen3-30B-A3B"],
        "differs": None,
        "published": {
            "total": "30.5e9",
            "active": "3.3e9",
            "counts": "all",
            "mismatch": {"active": "3.353B, which would round to 3.4B; without the routers' weights it is 3.340B."},
        },
        "fields": {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "qk_norm": "head", "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-6, "num_experts": 128,
            "num_experts_per_tok": 8, "router_type": "softmax_topk", "norm_topk_prob": True,
            "router_aux_loss_coef": {"times_top_k": 0.001},
        },
    },
    "olmoe-1b-7b": {
        "title": "OLMoE-1B-7B",
        "source": ["https://arxiv.org/abs/2409.02060", "https://huggingface.co/allenai/OLMoE-1B-7B-0924"],
        "differs": None,
        "published": {"total": "6.9e9", "active": "1.3e9", "counts": "all"},
        "fields": {
            "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
            "num_attention_heads": 16, "qk_norm": "projection", "max_position_embeddings": 4096, "num_experts": 64,
            "num_experts_per_tok": 8, "router_type": "softmax_topk", "router_aux_loss_coef": {"times_top_k": 0.01},
            "router_z_loss_coef": 0.001,
        },
    },
    "minimax-text-01": {
        "title": "MiniMax-Text-01 (its mixture of experts)",
        "source": ["https://arxiv.org/abs/2501.08313", "https://huggingface.co/MiniMaxAI/MiniMax-Text-01"],
        "differs": "Softmax attention in all 80 layers, where the release has lightning attention in 7 of 8; "
        "no scaled residuals around the norms.",
        "published": {
            "total": "456e9",
            "active": "45.9e9",
            "counts": "no embeddings",
            # Lightning attention has q, k, v, an output gate and o of 8192 each, and a norm; ours q, o and 2 x 1024.
            "absent": dict.fromkeys(
                ("total", "active"), 70 * (5 * 6144 * 8192 + 8192 - 2 * 6144 * 8192 - 2 * 6144 * 1024)
            ),
        },
        "fields": {
            "vocab_size": 200064, "hidden_size": 6144, "intermediate_size": 9216, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 10240000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5},
            "num_experts": 32, "num_experts_per_tok": 2, "router_type": "topk_softmax",
            "router_aux_loss_coef": {"times_top_k": 0.001},
        },
    },
    "llama-4-scout": {
        "title": "Llama 4 Scout (text)",
        "source": [
            "https://github.com/meta-llama/llama-models/blob/main/models/llama4/MODEL_CARD.md",
            "https://huggingface.co/meta-llama/Llama-4-Scout-17B-16E",
        ],
        "differs": LLAMA_4,
        "published": {
            "total": "109e9",
            "active": "17e9",
            "counts": "all",
            "absent": {"total": LLAMA_4_VISION},
        },
        "fields": {
            "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 16384, "moe_intermediate_size": 8192,
            "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
            "layer_types": {"full_every": 4}, "attention_chunk_size": 8192, "no_rope_layers": {"no_rope_every": 4},
            "max_position_embeddings": 262144,
            "rope_interleave": True,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            },
            "attn_temperature_tuning": True, "qk_norm": "l2", "num_experts": 16, "num_experts_per_tok": 1,
            "n_shared_experts": 1, "router_type": "sigmoid_topk", "expert_input_scaling": True,
            "router_aux_loss_coef": {"times_top_k": 0.001},
        },
    },
    "llama-4-maverick": {
        "title": "Llama 4 Maverick (text)",
        "source": [
            "https://github.com/meta-llama/llama-models/blob/main/models/llama4/MODEL_CARD.md",
            "https://huggingface.co/meta-llama/Llama-4-Maverick-17B-128E",
        ],
        "differs": LLAMA_4,
        "published": {
            "total": "4.0e11",
            "active": "17e9",
            "counts": "all",
            "absent": {"total": LLAMA_4_VISION},
        },
        "fields": {
            "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 16384, "moe_intermediate_size": 8192,
            "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
            "layer_types": {"full_every": 4}, "attention_chunk_size": 8192, "no_rope_layers": {"no_rope_every": 4},
            "max_position_embeddings": 262144,
            "rope_interleave": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "attn_temperature_tuning": True, "mlp_layer_types": {"sparse_every": 2}, "num_experts": 128,
            "num_experts_per_tok": 1, "n_shared_experts": 1, "router_type": "sigmoid_topk",
            "expert_input_scaling": True, "router_aux_loss_coef": {"times_top_k": 0.001},
        },
    },
    "minicpm-moe-8x2b": {
        "title": "MiniCPM-MoE-8x2B",
        "source": ["https://arxiv.org/abs/2404.06395", "https://huggingface.co/openbmb/MiniCPM-MoE-8x2B"],
        "differs": None,
        "published": {
            "total": "13.6e9",
            "active": "4.0e9",
            "counts": "no embeddings",
            "total_counts": "no embeddings",
        },
        "fields": {
            "vocab_size": 122753, "hidden_size": 2304, "intermediate_size": 5760, "num_hidden_layers": 40,
            "num_attention_heads": 36, "max_position_embeddings": 4096, "tie_word_embeddings": True,
            "embedding_multiplier": 12.0, "residual_multiplier": 1.4 / 40**0.5, "logits_scaling": 2304 / 256,
            "num_experts": 8, "num_experts_per_tok": 2, "router_type": "topk_softmax",
        },
    },
    "jetmoe-8b": {
        "title": "JetMoE-8B",
        "source": ["https://arxiv.org/abs/2404.07413", "https://huggingface.co/jetmoe/jetmoe-8b"],
        "differs": "No bias after the MLP experts' sum.",
        "published": {
            "total": "8.5e9",
            "active": "2.2e9",
            "counts": "no embeddings",
            "absent": dict.fromkeys(("total", "active"), 24 * 2048),
            "mismatch": {"active": "2.266B, which would round to 2.3B; cut after the first decimal it is 2.2B."},
        },
        "fields": {
            "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
            "attention_type": "moa", "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
            "attention_output_bias": True, "max_position_embeddings": 4096, "tie_word_embeddings": True,
            "num_experts": 8, "num_experts_per_tok": 2, "router_type": "topk_softmax",
            "router_aux_loss_coef": {"times_top_k": 0.01},
        },
    },
}
# fmt: on


def first_dense(layers: int, count: int) -> list[str]:
    """Dense layers first. A shorter model keeps at least its last layer sparse."""
    dense = min(count, layers - 1)
    return ["dense"] * dense + ["sparse"] * (layers - dense)


def sparse_every(layers: int, step: int, stack: int | None = None) -> list[str]:
    """Every `step`-th layer of each stack of `stack` layers sparse; in a model shorter than that, the last one."""
    kinds = ["dense" if (layer % (stack or layers) + 1) % step else "sparse" for layer in range(layers)]
    return kinds if "sparse" in kinds else [*kinds[:-1], "sparse"]


def full_every(layers: int, step: int) -> list[str]:
    """Every `step`-th layer attends to everything, the others within their chunk."""
    return ["chunked_attention" if (layer + 1) % step else "full_attention" for layer in range(layers)]


def no_rope_every(layers: int, step: int) -> list[int]:
    """Every `step`-th layer is without RoPE."""
    return [int((layer + 1) % step != 0) for layer in range(layers)]


# How a preset says what its layers are, for any number of layers: the first key names the rule, the rest are its own.
LAYOUTS = {
    "first_dense": first_dense,
    "sparse_every": sparse_every,
    "full_every": full_every,
    "no_rope_every": no_rope_every,
}


def sparse_layers(fields: dict[str, Any]) -> int:
    return fields.get("mlp_layer_types", ["sparse"] * fields["num_hidden_layers"]).count("sparse")


# How many times HfMoeConfig's loss, a mean over the sparse layers and 1 at perfect balance, a release's is: one that
# is added in each layer (Switch, DeepSeek), and that of Transformers, which is K at perfect balance.
COEFFICIENTS = {"per_layer": sparse_layers, "times_top_k": lambda fields: fields["num_experts_per_tok"]}


def preset(name: str) -> dict[str, Any]:
    """The entry of PRESETS. Raises a ValueError of one line that names the nearest ones."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the presets are {', '.join(PRESETS)}."
        raise ValueError(f"There is no preset {name!r}; {hint}")
    return PRESETS[name]


def as_published(published: dict[str, Any], measured: dict[str, Any], figure: str) -> int:
    """The "total" or "active" of `measured` (`sizes.sizes`) as the publication counts it, the release's rest added."""
    counts = published["counts"] if figure == "active" else published.get("total_counts", "all")
    left_out = sum(measured[part] for part in ACTIVE_COUNTS[counts])
    return measured[f"{figure}_params"] - left_out + published.get("absent", {}).get(figure, 0)


def preset_config(name: str, **changes: Any) -> "HfMoeConfig":
    """The config of a published architecture, with `changes` to its fields; also `HfMoeConfig.from_preset`.

    What follows from a changed field follows it: the kinds of layers from num_hidden_layers, the key-value heads from
    num_attention_heads (as many query heads share one). Raises ValueError for an unknown name, and what HfMoeConfig
    raises where the changes contradict the rest.
    """
    from ..model.configuration_hf_moe import HfMoeConfig

    published = preset(name)["fields"]
    fields = {"bos_token_id": None, "eos_token_id": None} | copy.deepcopy(published) | changes
    heads, key_value_heads = published["num_attention_heads"], published.get("num_key_value_heads")
    if key_value_heads is not None and "num_key_value_heads" not in changes:
        fields["num_key_value_heads"] = max(1, key_value_heads * fields["num_attention_heads"] // heads)
    for field in ("mlp_layer_types", "layer_types", "no_rope_layers"):
        if isinstance(fields.get(field), dict):
            (rule, value), *rest = fields[field].items()
            fields[field] = LAYOUTS[rule](fields["num_hidden_layers"], value, **dict(rest))
    for field, value in fields.items():
        if field.endswith("_loss_coef") and isinstance(value, dict):
            ((rule, coefficient),) = value.items()
            fields[field] = coefficient * COEFFICIENTS[rule](fields)
    return HfMoeConfig(**fields)
