"""Hunyuan-A13B: https://huggingface.co/tencent/Hunyuan-A13B-Instruct. q and k are normed after RoPE."""

from typing import Any

from transformers import PreTrainedConfig

from .family import DECODER_FIELDS, Computed, Family, plain_rope, same
from .moe_rows import LAYOUTS

_ATTENTION, _MLP = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
# Transformers' class computes the same whatever these are; the code of the release does not.
RELEASED = {"use_qk_norm": True, "use_mixed_mlp_moe": True, "use_cla": False, "moe_layer_num_skipped": 0}


def of_every_layer(field: str, default: int | None = None) -> Computed:
    """A number that the release says once a layer, and that must be the same in all of them."""

    def value(config: PreTrainedConfig) -> int | None:
        said = getattr(config, field, default)
        numbers = set(said) if isinstance(said, list) else {said}
        if len(numbers) > 1:
            raise ValueError(f"hunyuan_v1_moe field {field}={said!r} cannot be carried: layers must be alike.")
        return numbers.pop()

    return Computed((field,), value)


EXPERTS_PER_TOKEN = of_every_layer("moe_topk")


def shared_experts(config: PreTrainedConfig) -> int:
    count = of_every_layer("num_shared_expert", 1).value(config)
    if count != 1:
        raise ValueError(f"hunyuan_v1_moe field num_shared_expert={count!r} cannot be carried; only 1 can.")
    return count


def width(config: PreTrainedConfig) -> int:
    said = of_every_layer("moe_intermediate_size", config.intermediate_size).value(config)
    if said != config.intermediate_size:
        raise ValueError(
            f"hunyuan_v1_moe field moe_intermediate_size={said!r} cannot be carried: its class in Transformers reads "
            f"intermediate_size={config.intermediate_size!r} only."
        )
    return said


def rope(config: PreTrainedConfig) -> dict[str, Any]:
    """`alpha` of the release's "dynamic" is another base, theta alpha^(d / (d - 2)), at any length."""
    said = plain_rope(config)
    if said["rope_type"] != "dynamic" or not said.get("alpha"):
        return said
    size = config.head_dim
    return {"rope_type": "default", "rope_theta": said["rope_theta"] * said["alpha"] ** (size / (size - 2))}


HUNYUAN_V1_MOE = Family(
    model_type="hunyuan_v1_moe",
    fields={
        **DECODER_FIELDS,
        **same("head_dim", "attention_bias", "num_experts", "output_router_logits"),
        "attention_output_bias": "attention_bias",
        "rope_parameters": DECODER_FIELDS["rope_parameters"]._replace(value=rope),
        "num_experts_per_tok": EXPERTS_PER_TOKEN._replace(
            inverse=lambda config: {"moe_topk": config.num_experts_per_tok}
        ),
        "moe_intermediate_size": Computed(
            ("intermediate_size", "moe_intermediate_size"),
            width,
            lambda config: dict.fromkeys(("intermediate_size", "moe_intermediate_size"), config.moe_intermediate_size),
        ),
        "n_shared_experts": Computed(("num_shared_expert",), shared_experts, lambda config: {"num_shared_expert": 1}),
    },
    constants={
        "qk_norm": "head_after_rope",
        "router_type": "softmax_topk",
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.0,  # its class has no such loss
    },
    required=RELEASED,
    # How the training was spread; tokens that its code does not read.
    neutral=frozenset({"pretraining_tp", "eod_token_id", "sep_token_id"}),
    undeclared=frozenset({*RELEASED, "moe_intermediate_size", "num_shared_expert"}),
    tensors={
        f"{_ATTENTION}q_norm.weight": (f"{_ATTENTION}query_layernorm.weight",),
        f"{_ATTENTION}k_norm.weight": (f"{_ATTENTION}key_layernorm.weight",),
        f"{_MLP}gate.weight": (f"{_MLP}gate.wg.weight",),
        **{
            f"{_MLP}shared_experts.{name}_proj.weight": (f"{_MLP}shared_mlp.{name}_proj.weight",)
            for name in ("gate", "up", "down")
        },
    },
    layouts=LAYOUTS,
)
