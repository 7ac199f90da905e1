"""MiniMax-M2: https://huggingface.co/MiniMaxAI/MiniMax-M2. Sigmoid scores with a selection bias, partial RoPE."""

from typing import Any

from transformers import PreTrainedConfig

from ...model.configuration_hf_moe import HfMoeConfig
from .family import DECODER_FIELDS, Computed, Family, same
from .moe_rows import BLOCK_SPARSE, ROUTING_FIELDS
from .rope_rows import PARTIAL_ROPE

BIAS = "model.layers.{layer}.mlp.gate.e_score_correction_bias"


def softmax_attention(config: PreTrainedConfig) -> str:
    """1 in `attn_type_list` is softmax attention, 0 the lightning attention of MiniMax-Text-01."""
    kinds = getattr(config, "attn_type_list", None)
    if kinds and set(kinds) != {1}:
        raise ValueError(
            f"minimax_m2 field attn_type_list={kinds!r} cannot be carried: 1, softmax attention, is the only kind."
        )
    return "gqa"


def rope(config: HfMoeConfig) -> dict[str, Any]:
    """Also as the release says it, for programs that read that."""
    said = PARTIAL_ROPE.inverse(config)
    return said | {"rotary_dim": int(config.head_dim * said["rope_parameters"]["partial_rotary_factor"])}


MINIMAX_M2 = Family(
    model_type="minimax_m2",
    fields={
        **DECODER_FIELDS,
        **ROUTING_FIELDS,
        **same("head_dim"),
        "num_experts": "num_local_experts",
        "moe_intermediate_size": "intermediate_size",
        "rope_parameters": PARTIAL_ROPE._replace(reads=("rope_parameters", "rotary_dim"), inverse=rope),
        "attention_type": Computed(
            ("attn_type_list",),
            softmax_attention,
            lambda config: {"attn_type_list": [1] * config.num_hidden_layers},
        ),
    },
    constants={
        "qk_norm": "projection",
        "router_type": "sigmoid_topk",
        "router_args": {"selection_bias": True},
        "norm_topk_prob": True,
    },
    required={
        "router_jitter_noise": 0.0,  # noise on the whole block's input; hf_moe has the router's only
        # Transformers' class computes the same whatever these are; the code of the release does not.
        **{"scoring_func": "sigmoid", "use_routing_bias": True, "shared_intermediate_size": 0},
        **{"use_qk_norm": True, "qk_norm_type": "per_layer"},
    },
    undeclared=frozenset(
        {"attn_type_list", "rotary_dim", "scoring_func", "use_routing_bias", "shared_intermediate_size"}
        | {"use_qk_norm", "qk_norm_type"}
    ),
    layouts={
        "per-expert": {**BLOCK_SPARSE, BIAS: ("model.layers.{layer}.block_sparse_moe.e_score_correction_bias",)},
        "fused": {BIAS: ("model.layers.{layer}.mlp.e_score_correction_bias",)},
    },
)
