"""Aria, the language model: arXiv 2410.05993. Mixtral's routing beside shared experts, experts transposed."""

from .deepseek_rows import shared_experts
from .family import DECODER_FIELDS, Family, same
from .regions import Stacked

_MLP = "model.layers.{layer}.mlp."


def experts(gate_up: str, down: str) -> dict[str, tuple]:
    return {
        f"{_MLP}experts.gate_up_proj": (Stacked(f"{_MLP}experts.{gate_up}", transposed=True),),
        f"{_MLP}experts.down_proj": (Stacked(f"{_MLP}experts.{down}", transposed=True),),
    }


ARIA_TEXT = Family(
    model_type="aria_text",
    fields={
        **DECODER_FIELDS,
        **same("head_dim", "attention_bias"),
        "attention_output_bias": "attention_bias",
        "num_experts": "moe_num_experts",
        "num_experts_per_tok": "moe_topk",
        "moe_intermediate_size": "intermediate_size",
        "n_shared_experts": shared_experts("moe_num_shared_experts"),
    },
    constants={"router_type": "topk_softmax", "router_aux_loss_coef": 0.0},  # its class has no such loss
    # Routed experts have no bias and always this activation, whatever is said of shared ones.
    required={"mlp_bias": False, "hidden_act": "silu"},
    neutral=frozenset({"pretraining_tp"}),  # how the training was spread; the model computes the same
    tensors={f"{_MLP}gate.weight": (f"{_MLP}router.weight",)},
    layouts={"fused": experts("fc1.weight", "fc2.weight"), "fused-v5": experts("gate_up_proj", "down_proj")},
)
