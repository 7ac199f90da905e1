"""Rows that the DeepSeek families share."""

from typing import Any

from transformers import PreTrainedConfig

from ...model.configuration_hf_moe import HfMoeConfig
from .family import DECODER_FIELDS, Computed, same
from .moe_rows import shared_width


def mlp_layer_types(config: PreTrainedConfig) -> list[str]:
    """Sparse is every moe_layer_freq-th layer, counted from 0, after the first first_k_dense_replace ones."""
    first, step = config.first_k_dense_replace or 0, getattr(config, "moe_layer_freq", 1)
    return ["sparse" if layer >= first and layer % step == 0 else "dense" for layer in range(config.num_hidden_layers)]


def leading_dense_layers(config: HfMoeConfig) -> dict[str, Any]:
    kinds = [*config.mlp_layer_types, "sparse"]
    return {"first_k_dense_replace": kinds.index("sparse")}


# DeepSeek adds its balance loss, 1 at perfect balance, to the loss once a sparse layer; ours is their mean.
# Transformers keeps these fields of a config.json and computes no such loss; a config without them had none.
def balance_coef(config: PreTrainedConfig, within_sequences: bool) -> float:
    coef, seq_aux = getattr(config, "aux_loss_alpha", 0.0), getattr(config, "seq_aux", True)
    return coef * mlp_layer_types(config).count("sparse") if seq_aux == within_sequences else 0.0


def balance_loss(config: HfMoeConfig) -> dict[str, Any]:
    layers = max(1, config.mlp_layer_types.count("sparse"))
    coef = config.seq_aux_loss_coef or config.router_aux_loss_coef
    within_sequences = bool(config.seq_aux_loss_coef) or not config.router_aux_loss_coef
    return {"aux_loss_alpha": coef / layers, "seq_aux": within_sequences}


def shared_experts(field: str) -> Computed:
    """There must be one. Back, as many as make up the width; each is as wide as a routed expert."""

    def value(config: PreTrainedConfig) -> int:
        count = getattr(config, field)
        if not count:
            raise ValueError(
                f"{config.model_type} field {field}={count!r} cannot be carried: its class in Transformers always has "
                "shared experts."
            )
        return count

    return Computed(
        (field,), value, lambda config: {field: max(1, shared_width(config) // config.moe_intermediate_size)}
    )


SHARED_EXPERTS_FIELDS = {
    **same("num_experts_per_tok", "moe_intermediate_size", "attention_bias"),
    "num_experts": "n_routed_experts",
    "n_shared_experts": shared_experts("n_shared_experts"),
    "mlp_layer_types": Computed(("first_k_dense_replace",), mlp_layer_types, leading_dense_layers),
}
# Each layer's, and the leading dense ones as the release says them, for programs that read that.
LISTED_MLP_LAYERS = Computed(
    ("mlp_layer_types", "first_k_dense_replace"),
    lambda config: config.mlp_layer_types,
    lambda config: {"mlp_layer_types": config.mlp_layer_types, **leading_dense_layers(config)},
)
DEEPSEEK_FIELDS = {
    **DECODER_FIELDS,
    **SHARED_EXPERTS_FIELDS,
    "attention_output_bias": "attention_bias",
    "seq_aux_loss_coef": Computed(
        ("aux_loss_alpha", "seq_aux"), lambda config: balance_coef(config, True), balance_loss
    ),
    "router_aux_loss_coef": Computed(("aux_loss_alpha", "seq_aux"), lambda config: balance_coef(config, False)),
}

LATENT_ATTENTION = same("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def groups(config: HfMoeConfig) -> dict[str, int]:
    return {"n_group": config.n_group, "topk_group": config.topk_group}


GROUPS = {
    "n_group": Computed(("n_group",), lambda config: config.n_group or 1, groups),
    "topk_group": Computed(("topk_group",), lambda config: config.topk_group or 1),
}

# Transformers' classes compute the same whatever these are; the code of the releases does not.
AS_V3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}

# V3's router in families whose configs have no balance loss: the bias balances.
BIASED_SIGMOID = {
    "router_type": "sigmoid_topk",
    "router_args": {"selection_bias": True},
    "router_aux_loss_coef": 0.0,
}
