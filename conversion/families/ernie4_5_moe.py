"""ERNIE 4.5: https://huggingface.co/baidu/ERNIE-4.5-21B-A3B-PT. Softmax scores and a bias that only selects."""

from typing import Any

from transformers import PreTrainedConfig

from ...model.configuration_hf_moe import HfMoeConfig
from .family import DECODER_FIELDS, Computed, Family, same
from .moe_rows import LAYOUTS, routing_fields, shared_width
from .regions import Wrapped

_GATE = "model.layers.{layer}.mlp.gate."
BIAS = "moe_statics.e_score_correction_bias"


def mlp_layer_types(config: PreTrainedConfig) -> list[str]:
    """Sparse is every moe_layer_interval-th layer from one to another, both included."""
    between = range(config.moe_layer_start_index, config.moe_layer_end_index + 1)
    return [
        "sparse" if layer in between and (layer + 1) % config.moe_layer_interval == 0 else "dense"
        for layer in range(config.num_hidden_layers)
    ]


def moe_layers(config: HfMoeConfig) -> dict[str, Any]:
    sparse = [layer for layer, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    first, last = (sparse[0], sparse[-1]) if sparse else (config.num_hidden_layers, config.num_hidden_layers - 1)
    step = sparse[1] - sparse[0] if len(sparse) > 1 else 1
    return {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": step}


CARRIED = {name: source for name, source in DECODER_FIELDS.items() if name != "attention_dropout"}  # which it lacks

ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    fields={
        **CARRIED,
        **routing_fields(top_k="moe_k"),
        **same("head_dim", "moe_intermediate_size"),
        "num_experts": "moe_num_experts",
        "n_shared_experts": Computed(
            ("moe_num_shared_experts",),
            lambda config: config.moe_num_shared_experts,
            lambda config: {"moe_num_shared_experts": shared_width(config) // config.moe_intermediate_size},
        ),
        "mlp_layer_types": Computed(
            ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), mlp_layer_types, moe_layers
        ),
    },
    constants={
        "rope_interleave": True,
        "router_type": "softmax_topk",
        "router_args": {"selection_bias": True},
        "norm_topk_prob": True,
    },
    # A bias on dense MLPs and shared experts, but none on routed ones; the least sum that weights are divided by.
    required={"use_bias": False, "moe_norm_min": 1e-12},
    undeclared=frozenset({"head_dim"}),
    layouts={
        "per-expert": {
            **LAYOUTS["per-expert"],
            f"{_GATE}e_score_correction_bias": (Wrapped(f"model.layers.{{layer}}.mlp.{BIAS}"),),
        },
        "fused": {f"{_GATE}e_score_correction_bias": (Wrapped(f"{_GATE}{BIAS}"),)},
    },
    dropped_mtp=(r"model\.mtp_\w+\..+",),  # a dense block without a norm behind it
)
