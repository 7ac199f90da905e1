"""Tiny random checkpoints of the families that hf_moe reads, written by Transformers itself, once a session."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_moe.conversion import import_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conversion.recent_cases import RECENT_CASES

# Not powers of two, but multiples of 4: grouped_mm wants rows of 16 bytes.
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # outputs far from uniform, so that a wrong one shows
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
MOE = {"num_experts_per_tok": 3, "router_aux_loss_coef": 0.03}
QWEN_MOE = {**MOE, "num_experts": 5, "moe_intermediate_size": 20, "norm_topk_prob": True}

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 3.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
GEMMA = {"head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 5, "layer_types": MIXED}

DENSE_CASES = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied-mha": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-head_dim": ("llama", {"head_dim": 10, "num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
    "llama-rope_theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}}),
    "llama-dynamic": (
        "llama",
        {
            "max_position_embeddings": 13,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
        },
    ),
    "llama-llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 3.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 17,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None, "hidden_act": "gelu"}),
    "mistral-window": ("mistral", {"sliding_window": 5, "head_dim": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2-window-tied": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 3.0,
                "original_max_position_embeddings": 17,
            }
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 10}),
    "qwen3-bias-window": (
        "qwen3",
        {
            "head_dim": 6,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma": ("gemma", {"head_dim": 10}),
    "gemma-untied-bias": ("gemma", {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": False}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-untied-bias": (
        "gemma2",
        {**GEMMA, "attn_logit_softcapping": None, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "gemma3": ("gemma3_text", {**GEMMA, "rope_parameters": ROPES}),
    "gemma3-older-spelling": ("gemma3_text", {**GEMMA, "rope_local_base_freq": 50.0, "rope_theta": 900.0}),
    "gemma3-all-sliding": ("gemma3_text", {**GEMMA, "layer_types": ["sliding_attention"] * 3}),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 5, "num_key_value_heads": 4}),
    "phi4-mini": ("phi3", {"partial_rotary_factor": 0.67, "tie_word_embeddings": True}),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 28,
            "partial_rotary_factor": 0.67,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": [1.1, 1.3],
                "long_factor": [2.5, 5.0],
            },
        },
    ),
    "glm": ("glm", {"head_dim": 8}),
    "glm4": ("glm4", {"head_dim": 8, "partial_rotary_factor": 0.75, "attention_bias": False}),
    "arcee": ("arcee", {"hidden_act": "relu2"}),
    "arcee-bias": ("arcee", {"hidden_act": "relu2", "mlp_bias": True, "head_dim": 8}),
    "olmo2": ("olmo2", {}),
    "olmo2-bias-tied": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "olmo3": ("olmo3", {"sliding_window": 5, "layer_types": MIXED, "rope_parameters": ROPES}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}),
    "smollm3-window-bias": (
        "smollm3",
        {
            **{"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5},
            **{"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        },
    ),
    "granite": (
        "granite",
        {
            **{"embedding_multiplier": 3, "attention_multiplier": 0.2, "residual_multiplier": 0.4},
            **{"logits_scaling": 1.7, "attention_bias": True, "mlp_bias": True},
        },
    ),
}

MOE_CASES = {
    "mixtral": ("mixtral", {**MOE, "num_local_experts": 5}),
    "mixtral-window": ("mixtral", {**MOE, "num_local_experts": 5, "sliding_window": 5, "head_dim": 8}),
    "olmoe": ("olmoe", {**MOE, "num_experts": 5}),
    "olmoe-one-expert": ("olmoe", {"num_experts": 1, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.03}),
    "olmoe-clip-bias": (
        "olmoe",
        {**MOE, "num_experts": 5, "clip_qkv": 0.7, "attention_bias": True, "norm_topk_prob": True},
    ),
    "qwen2_moe": ("qwen2_moe", {**QWEN_MOE, "shared_expert_intermediate_size": 28}),
    "qwen2_moe-mixed-window": (
        "qwen2_moe",
        {
            **QWEN_MOE,
            "shared_expert_intermediate_size": 28,
            "mlp_only_layers": [1],
            "qkv_bias": False,
            "norm_topk_prob": False,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**QWEN_MOE, "head_dim": 10}),
    "qwen3_moe-mixed-window": (
        "qwen3_moe",
        {
            **QWEN_MOE,
            "head_dim": 6,
            "decoder_sparse_step": 2,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
        },
    ),
}

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
DEEPSEEK = {  # the key sizes even: Transformers' V2 pairs dimensions by their strides
    **{"num_key_value_heads": 4, "n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20},
    **{"kv_lora_rank": 14, "q_lora_rank": 15, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 9},
    **{"n_shared_experts": 2, "first_k_dense_replace": 1, "initializer_range": 0.2},
}
DEEPSEEK_V3 = {**DEEPSEEK, "num_mtp_layers": 0}

DEEPSEEK_CASES = {
    "deepseek_v2-lite": (
        "deepseek_v2",
        {**DEEPSEEK, "q_lora_rank": None, "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {
            **DEEPSEEK,
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
            "attention_bias": True,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {**DEEPSEEK_V3, "n_group": 3, "topk_group": 2, "rope_parameters": {**YARN, "mscale": 1, "mscale_all_dim": 1}},
    ),
    "deepseek_v3-half-rope": (
        "deepseek_v3",
        {
            **DEEPSEEK_V3,
            "rope_interleave": False,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
}

HALF_ROPE = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
GLM4_MOE = {
    **{"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_shared_experts": 2},
    **{"head_dim": 12, "first_k_dense_replace": 1, "num_mtp_layers": 0, "routed_scaling_factor": 1.7},
}
LLAMA4 = {
    "initializer_range": 0.2,
    **{**MOE, "num_local_experts": 5, "num_hidden_layers": 4, "head_dim": 10, "intermediate_size_mlp": 44},
    **{"attention_chunk_size": 7, "floor_scale": 5, "attn_scale": 0.4},
}
GPT_OSS = {"initializer_range": 0.2} | {
    **MOE,
    "num_local_experts": 5,
    "head_dim": 10,
    "sliding_window": 5,
    "swiglu_limit": 0.9,
}


def dbrx(**changes) -> dict:
    """A config in the parts that DBRX has."""
    attention = {"kv_n_heads": 2, "rope_theta": 77.0}
    ffn = {"ffn_hidden_size": 20, "moe_num_experts": 5, "moe_top_k": 3, "moe_loss_weight": 0.03}
    for name, value in changes.items():
        (ffn if name.startswith("moe") else attention)[name] = value
    rope = {"rope_type": "default", "rope_theta": 77.0}
    sizes = {"d_model": 24, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "initializer_range": 0.2}
    return {**sizes, "attn_config": attention, "ffn_config": ffn, "rope_parameters": rope}


# Families whose tensors or fields differ further from ours.
OTHER_CASES = {
    "glm4_moe": ("glm4_moe", GLM4_MOE),
    "glm4_moe-groups-norm-bias": (
        "glm4_moe",
        {
            **GLM4_MOE,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_group": 3,
            "topk_group": 2,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 1.0},
        },
    ),
    "minimax_m2": ("minimax_m2", {**MOE, "num_local_experts": 5, "head_dim": 12, "rope_parameters": HALF_ROPE}),
    "granitemoe": (
        "granitemoe",
        {
            **{**MOE, "num_local_experts": 5, "attention_multiplier": 0.3, "embedding_multiplier": 3.0},
            **{"residual_multiplier": 0.7, "logits_scaling": 2.5},
        },
    ),
    "granitemoe-plain-bias-tied": (
        "granitemoe",
        {**MOE, "num_local_experts": 5, "attention_bias": True, "tie_word_embeddings": True, "head_dim": 10},
    ),
    "granitemoeshared": (
        "granitemoeshared",
        {**MOE, "num_local_experts": 5, "shared_intermediate_size": 28, "attention_multiplier": 0.3},
    ),
    "granitemoeshared-without": ("granitemoeshared", {**MOE, "num_local_experts": 5}),
    "dbrx": ("dbrx", dbrx(clip_qkv=0.7)),
    "dbrx-sum-mha": ("dbrx", dbrx(clip_qkv=2.0, kv_n_heads=4, moe_normalize_expert_weights=None, moe_jitter_eps=0.01)),
    "llama4_text": ("llama4_text", LLAMA4),
    "llama4_text-maverick": (
        "llama4_text",
        {
            **{**LLAMA4, "interleave_moe_layer_step": 2, "use_qk_norm": False, "no_rope_layer_interval": 2},
            **{"attention_bias": True, "attn_temperature_tuning": False, "tie_word_embeddings": True},
        },
    ),
    "gpt_oss": ("gpt_oss", GPT_OSS),
    "gpt_oss-plain": (
        "gpt_oss",
        {
            **{**GPT_OSS, "attention_bias": False, "layer_types": ["full_attention"] * 3, "swiglu_alpha": 1.3},
            "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
        },
    ),
    "minimax_m2-whole-rope": ("minimax_m2", {**MOE, "num_local_experts": 5, "head_dim": 6}),
    **RECENT_CASES,
}


def build(model_type: str, dtype: torch.dtype = torch.float32, **changes):
    """A random model whose norms and biases, that of the choice of experts included, are random too."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("_bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    return model


def count(model) -> int:
    """The parameters, of which the bias that only selects is none, though ERNIE's class has it as one.

    JetMoE has one bias behind its experts, for which each has two in hf_moe.
    """
    found = sum(x.numel() for name, x in model.named_parameters() if not name.endswith("e_score_correction_bias"))
    c = model.config
    if c.model_type == "jetmoe":
        each = 2 * c.intermediate_size + c.hidden_size
        found += c.num_hidden_layers * (c.num_local_experts * each - c.hidden_size)
    return found


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(case, sharded) -> folder, written once."""
    folders: dict[tuple, Path] = {}

    def make(case: str, sharded: bool = False, **options) -> Path:
        key = (case, sharded, *sorted(options.items()))
        if key not in folders:
            model_type, changes = {**DENSE_CASES, **MOE_CASES, **DEEPSEEK_CASES, **OTHER_CASES}[case]
            folders[key] = tmp_path_factory.mktemp(case)
            limit = {"max_shard_size": "8KB"} if sharded else {}
            build(model_type, **changes).save_pretrained(folders[key], **limit, **options)
            assert (folders[key] / "model.safetensors").exists() != sharded
        return folders[key]

    return make


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_import_refused(source: Path, changes: dict, match: str, folder: Path) -> None:
    """The source, copied to `folder` with `changes` in its config.json, is refused in one line; nothing is written."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=match) as raised:
        import_checkpoint(folder, folder.parent / "moe", progress=False)
    assert "\n" not in str(raised.value)
    assert list(folder.parent.iterdir()) == [folder]
