"""Tiny models to train, hf_moe's and Transformers' own, far from balance so that the router losses have gradients."""

import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_moe import HfMoeConfig, HfMoeForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
GROUPS = {"n_group": 3, "topk_group": 2}
BIASED = {"router_type": "sigmoid_topk", "norm_topk_prob": True, "router_args": {"selection_bias": True}}


def build(model_class, config, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = model_class(config)
    for module in model.modules():  # experts that have been busy: some routes differ from those without a bias
        bias = getattr(module, "e_score_correction_bias", None)
        if isinstance(bias, torch.Tensor):
            nn.init.uniform_(bias, -0.1, 0.1)
    return model


def hf_moe(seed: int = 0, **changes) -> HfMoeForCausalLM:
    return build(HfMoeForCausalLM, HfMoeConfig(**{**SIZES, "num_experts": 6, **GROUPS, **changes}), seed)


def hf_moe_biased(seed: int = 0, **changes) -> HfMoeForCausalLM:
    return hf_moe(seed, **BIASED, **changes)


def olmoe(seed: int = 0, **changes) -> OlmoeForCausalLM:
    return build(OlmoeForCausalLM, OlmoeConfig(**{**SIZES, "num_experts": 6, **changes}), seed)


def deepseek_v3(seed: int = 0, **changes) -> DeepseekV3ForCausalLM:
    latent = {**LATENT, "num_key_value_heads": 4, "n_routed_experts": 6, "n_shared_experts": 1, **GROUPS}
    config = DeepseekV3Config(**{**SIZES, **latent, "first_k_dense_replace": 0, **changes})
    return build(DeepseekV3ForCausalLM, config, seed)


def mixtral(seed: int = 0, **changes) -> MixtralForCausalLM:
    return build(MixtralForCausalLM, MixtralConfig(**{**SIZES, "num_local_experts": 6, **changes}), seed)


def qwen3_moe(seed: int = 0, **changes) -> Qwen3MoeForCausalLM:
    return build(Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**SIZES, "num_experts": 6, "head_dim": 8, **changes}), seed)


MODELS = {
    "hf_moe": hf_moe,
    "hf_moe-bias": hf_moe_biased,
    "olmoe": olmoe,
    "deepseek_v3": deepseek_v3,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
}


def rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Sequences of 3 to 11 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, 61, (length,), generator=generator).tolist()} for length in lengths]


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Right-padded to 11 tokens."""
    ids = torch.zeros(len(examples), 11, dtype=torch.long)
    for row, example in zip(ids, examples, strict=True):
        row[: len(example["input_ids"])] = torch.tensor(example["input_ids"])
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
