"""OLMoE-1B-7B's shape with random weights, as hf_moe's model and as Transformers', for the scripts beside this one."""

from collections.abc import Callable

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from hf_moe import HfMoeConfig, HfMoeForCausalLM

TINY = {"vocab_size": 512, "hidden_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2, "num_experts": 6}
TINY |= {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16, "num_experts_per_tok": 2}
TINY |= {"initializer_range": 0.2, "max_position_embeddings": 4096, "eos_token_id": None, "pad_token_id": 1}
SHAPES = {"olmoe-1b-7b": {}, "tiny": TINY}  # "tiny" runs on a CPU, and measures nothing


def shape(name: str = "olmoe-1b-7b", **fields) -> HfMoeConfig:
    return HfMoeConfig.from_preset("olmoe-1b-7b", **SHAPES[name], **fields)


def hf_moe_model(config: HfMoeConfig) -> HfMoeForCausalLM:
    return HfMoeForCausalLM(config)


def transformers_model(config: HfMoeConfig) -> OlmoeForCausalLM:
    names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    names += ["num_experts", "num_experts_per_tok", "rms_norm_eps", "max_position_embeddings", "router_aux_loss_coef"]
    names += ["initializer_range"]
    fields = {name: getattr(config, name) for name in names}
    return OlmoeForCausalLM(OlmoeConfig(**fields, intermediate_size=config.moe_intermediate_size))


def build(make: Callable, config: HfMoeConfig, device: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = make(config)
    torch.set_default_dtype(torch.float32)
    return model
