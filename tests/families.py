"""Tiny models of every family of decoders with routed experts that the installed Transformers has.

They are found in its mapping, so that a new release adds to them by itself.
"""

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

EXPERTS, TOP_K = 8, 2
# Whatever of these a configuration has.
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_hidden_layers": 4,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
} | {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_top_k", "moe_k"), TOP_K),
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_expand": 2, "mamba_d_head": 16}
# What else some need, to be valid or small.
FURTHER = {
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {
            "ffn_hidden_size": 24,
            "moe_num_experts": EXPERTS,
            "moe_top_k": TOP_K,
            "ffn_act_fn": {"name": "silu"},
        },
    },
    "dots3_note_text": {
        "layer_types": ["indexed_attention"] * 4,
        "index_topk": 4,
        "index_head_dim": 8,
        "index_n_heads": 2,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 8, "zero_expert_num": 2},
    "qwen4_exp_text": {"layer_types": ["linear_attention"] * 4},
    "zaya": dict.fromkeys(("num_experts_per_tok", "moe_topk"), 1),
}
# model_type -> why it has no experts beside a router, or no tiny model.
LEFT_OUT = {
    "doge": "its experts are rows of two embeddings, not networks",
}

NO_INTERFACE = dict.fromkeys(
    ("dbrx", "jetmoe", "llama4_text", "longcat_flash"), "its experts are called in a way of their own"
)
# What is not for some: who, and why.
NOT_FOR = {
    "esft": {"dbrx": "its experts are one matrix", "jetmoe": "its experts are one product"},
    "lora": {"dbrx": "its experts are one matrix"},
    "densemixer": NO_INTERFACE,
    "replay": dict.fromkeys(
        ("gemma4_text", "inkling_text", "jetmoe", "llama4_text", "phimoe"), "its weights are more than scores"
    ),
    "kernels": NO_INTERFACE | dict.fromkeys(("inkling2_text", "inkling2_loop_text"), "its gate is soft-capped"),
}


def text_config(model_type: str) -> PreTrainedConfig | None:
    try:
        return CONFIG_MAPPING[model_type]().get_text_config()
    except (ValueError, StrictDataclassError):  # of several parts, or refused without arguments
        return None


def has_experts(config: PreTrainedConfig) -> bool:
    return hasattr(config, "ffn_config") or any("expert" in name or "moe" in name for name in fields_of(config))


def fields_of(config: PreTrainedConfig) -> set[str]:
    return set(getattr(type(config), "__dataclass_fields__", {}))


def families() -> list[str]:
    """Model types whose own configuration is that of a decoder with experts."""
    found = {name: text_config(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    own = {name: config for name, config in found.items() if config is not None and config.model_type == name}
    return [name for name, config in own.items() if has_experts(config) and name not in LEFT_OUT]


FAMILIES = families()


def tiny(model_type: str, **changes) -> PreTrainedModel:
    """A model of a few thousand to a million parameters, whose experts have been busy: its biases are not all zero."""
    kind = CONFIG_MAPPING[model_type]
    known = fields_of(kind())
    given = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:
        given |= {name: value for name, value in LATENT.items() if name in known}
        given.pop("head_dim", None)
    config = kind(**given | FURTHER.get(model_type, {}) | changes)
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("e_score_correction_bias", "expert_bias", "balancing_biases")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 5)
            elif tensor.dim() == 2 and not tensor.any():  # a router, or a table of hashes, drawn as zeros
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(drawn if tensor.is_floating_point() else drawn.argsort(dim=-1) % EXPERTS)
    return model.eval()
