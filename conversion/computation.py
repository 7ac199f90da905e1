"""What a config says about the computation, in one spelling: configs that agree on it give the same logits."""

import copy
from collections.abc import Callable
from typing import Any

from ..model.configuration_hf_moe import HfMoeConfig
from .families.moe_rows import shared_width

# Fields that only training reads: losses, dropout of a head that is not there, the steps of the bias.
TRAINING_FIELDS = frozenset(
    {"router_aux_loss_coef", "router_z_loss_coef", "seq_aux_loss_coef", "device_aux_loss_coef", "comm_aux_loss_coef"}
    | {"router_bias_update_speed", "expert_capacity_factor", "classifier_dropout", "mtp_loss_coef"}
)


def _limits_groups(config: HfMoeConfig) -> bool:
    return config.topk_group < config.n_group


# When each of these fields is read at all.
READ_IF: dict[str, Callable[[HfMoeConfig], bool]] = {
    "intermediate_size": lambda config: "dense" in config.mlp_layer_types,
    "sliding_window": lambda config: "sliding_attention" in config.layer_types,
    "shared_expert_intermediate_size": lambda config: False,  # only times n_shared_experts
    "shared_expert_gate": lambda config: config.n_shared_experts > 0,
    "attention_chunk_size": lambda config: "chunked_attention" in config.layer_types,
    "floor_scale": lambda config: config.attn_temperature_tuning,
    "attn_scale": lambda config: config.attn_temperature_tuning,
    "experts_swiglu_alpha": lambda config: config.experts_swiglu_limit is not None,
    "n_group": _limits_groups,
    "topk_group": _limits_groups,
    "provenance": lambda config: False,
}


def respelled(config: HfMoeConfig) -> HfMoeConfig:
    """`config` with softmax over the chosen K as what it is: softmax over all, divided by the sum of the K."""
    config = copy.deepcopy(config)
    if config.router_type == "topk_softmax":
        config.router_type, config.norm_topk_prob = "softmax_topk", True
    return config


def computation(config: HfMoeConfig) -> dict[str, Any]:
    """The fields of `config` that are read, and of `router_args` those that say something."""
    config = respelled(config)
    said = {name: getattr(config, name) for name in HfMoeConfig.__annotations__}
    said = {name: value for name, value in said.items() if name not in READ_IF or READ_IF[name](config)}
    said["n_shared_experts"] = shared_width(config)
    if config.attention_multiplier is None:
        said["attention_multiplier"] = config.head_dim**-0.5
    said["no_rope_layers"] = config.no_rope_layers or [1] * config.num_hidden_layers
    unread = "two_best" if _limits_groups(config) else config.router_args.get("group_score")
    said["router_args"] = {
        name: value
        for name, value in config.router_args.items()
        if value and not (name == "group_score" and value == unread)
    }
    if said["rope_parameters"].get("partial_rotary_factor") == 1:
        said["rope_parameters"] = {k: x for k, x in said["rope_parameters"].items() if k != "partial_rotary_factor"}
    return said
