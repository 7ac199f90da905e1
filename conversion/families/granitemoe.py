"""GraniteMoE (Granite 3.0 and 3.1 MoE, PowerMoE; arXiv 2408.13359), and the same with a shared expert."""

from .family import DECODER_FIELDS, Computed, Family, same
from .moe_rows import ROUTING_FIELDS, shared_width

_MOE = "model.layers.{layer}.block_sparse_moe."
_SHARED = "model.layers.{layer}.shared_mlp."

FIELDS = {
    **DECODER_FIELDS,
    **ROUTING_FIELDS,
    **same("head_dim", "attention_bias", "embedding_multiplier", "residual_multiplier", "logits_scaling"),
    "attention_output_bias": "attention_bias",
    "attention_multiplier": Computed(
        ("attention_multiplier",),
        lambda config: config.attention_multiplier,
        lambda config: {
            "attention_multiplier": config.head_dim**-0.5
            if config.attention_multiplier is None
            else config.attention_multiplier
        },
    ),
    "num_experts": "num_local_experts",
    "moe_intermediate_size": "intermediate_size",
}
LAYOUTS = {
    "fused": {
        "model.layers.{layer}.mlp.gate.weight": (f"{_MOE}router.layer.weight",),
        "model.layers.{layer}.mlp.experts.gate_up_proj": (f"{_MOE}input_linear.weight",),
        "model.layers.{layer}.mlp.experts.down_proj": (f"{_MOE}output_linear.weight",),
    },
    "fused-v5": {  # as Transformers 5 has them in memory
        "model.layers.{layer}.mlp.gate.weight": (f"{_MOE}router.weight",),
        "model.layers.{layer}.mlp.experts.gate_up_proj": (f"{_MOE}experts.gate_up_proj",),
        "model.layers.{layer}.mlp.experts.down_proj": (f"{_MOE}experts.down_proj",),
    },
}

GRANITEMOE = Family(
    model_type="granitemoe",
    fields=FIELDS,
    constants={"router_type": "topk_softmax"},
    undeclared=frozenset({"head_dim"}),
    layouts=LAYOUTS,
)

GRANITEMOESHARED = Family(
    model_type="granitemoeshared",
    fields={
        **FIELDS,
        "n_shared_experts": Computed(
            ("shared_intermediate_size",),
            lambda config: int(config.shared_intermediate_size > 0),
            lambda config: {"shared_intermediate_size": shared_width(config)},
        ),
        "shared_expert_intermediate_size": Computed(
            ("shared_intermediate_size",), lambda config: config.shared_intermediate_size or None
        ),
    },
    constants={"router_type": "topk_softmax"},
    undeclared=frozenset({"head_dim"}),
    tensors={
        "model.layers.{layer}.mlp.shared_experts.gate_proj.weight": (f"{_SHARED}input_linear.weight",),
        "model.layers.{layer}.mlp.shared_experts.up_proj.weight": (f"{_SHARED}input_linear.weight",),
        "model.layers.{layer}.mlp.shared_experts.down_proj.weight": (f"{_SHARED}output_linear.weight",),
    },
    layouts=LAYOUTS,
)
