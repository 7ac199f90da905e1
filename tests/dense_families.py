"""Tiny models of every family of decoders without experts that the installed Transformers has.

They are found in its mapping, so that a new release adds to them by itself.
"""

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .families import FAMILIES as SPARSE
from .families import LATENT

# Whatever of these a configuration has.
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 24,
    "ffn_dim": 24,
    "dff": 24,
    "n_inner": 24,
    "num_hidden_layers": 4,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_embd": 32,
    "d_model": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MAMBA = {"mamba_n_heads": 4, "mamba_expand": 2, "mamba_d_head": 16, "mamba_d_state": 8}
GEMMA_3N = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
# What else some need, to be valid or small.
FURTHER = {
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8, "n_ctx": 64},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": GEMMA_3N | MIXED | {"laurel_rank": 4, "num_kv_shared_layers": 0},
    "gemma4_text": GEMMA_3N | MIXED | {"global_head_dim": 8},
    "gemma4_unified_text": MIXED | {"global_head_dim": 8},
    "gpt_neo": {
        "num_hidden_layers": 2,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "intermediate_size": 24,
    },
    "gptj": {"rotary_dim": 8},
    "mamba2": {"num_heads": 8},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2},
    "trocr": {"decoder_layers": 2, "decoder_ffn_dim": 24, "decoder_attention_heads": 4},
    "cohere_compass_text": MIXED | {"rope_parameters": dict.fromkeys(MIXED["layer_types"], ROPE)},
}
# model_type -> why it is no decoder that experts could be grafted onto, or has no tiny model.
IN_TWO = "its feed-forward network is in two modules, with a norm of the sum"
NONE = "it has no feed-forward network"
ENCODER_DECODERS = ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus")
ENCODER_DECODERS += ("plbart", "prophetnet", "whisper")
PICTURES = "a model of several parts; those that read pictures are below, and its text model is a family of its own"
LEFT_OUT = {
    **dict.fromkeys(
        (
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "git", "xmod"),
            *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"),
            "xlm-roberta-xl",
        ),
        IN_TWO,
    ),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2"), NONE),
    "cpmant": "its gate is a module within the network",
    "doge": "its experts are rows of two embeddings, which the host routes",
    "dory": "its network has parameters between the projections",
    "moshi": "it writes sound and text together",
    "reformer": "it computes its layers backwards",
    "rwkv": "its network mixes a token with the one before",
    "xlm": "it reads masked tokens",
    "xlnet": "its network adds what it read and norms the sum",
    "xlstm": "its cells take chunks of fixed sizes",
    "zamba": "one network stands in many layers",
    "zamba2": "one network stands in many layers",
}


def config_of(model_type: str, **changes) -> PreTrainedConfig:
    """Raises what the family's class raises, of many kinds, for one that is not a decoder's or not valid so."""
    kind = CONFIG_MAPPING[model_type]
    known = set(kind.__dataclass_fields__) | set(kind.attribute_map)
    given = {name: value for name, value in SIZES.items() if name in known}
    if "kv_lora_rank" in known:
        given |= {name: value for name, value in LATENT.items() if name in known}
        given.pop("head_dim", None)
    return kind(**given | FURTHER.get(model_type, {}) | changes)


def why_not(model_type: str) -> str | None:
    """Why a family of the mapping is none that experts can be grafted onto; None where it is one."""
    if model_type in LEFT_OUT:
        return LEFT_OUT[model_type]
    if model_type in SPARSE:
        return "it has experts already"
    kind = CONFIG_MAPPING[model_type]
    if kind.is_encoder_decoder or model_type in ENCODER_DECODERS:
        return "an encoder-decoder"
    if kind.model_type != model_type:
        return f"the name of a checkpoint of {kind.model_type}"
    return None if set(kind.sub_configs) <= {"attn_config"} else PICTURES


def families() -> list[str]:
    """Model types whose own configuration is that of a decoder without experts."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if why_not(name) is None]


FAMILIES = families()


def tiny(model_type: str, **changes) -> PreTrainedModel:
    config = config_of(model_type, **changes)
    torch.manual_seed(0)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
