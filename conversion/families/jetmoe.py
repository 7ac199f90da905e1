"""JetMoE: arXiv 2404.07413. A mixture of attention heads and one of MLPs, each with one bias on its output.

hf_moe has that of MLPs on every expert: weights that sum to 1 add it once.
"""

from .family import DECODER_FIELDS, Computed, Family
from .moe_rows import routing_fields
from .regions import Common

_OURS, _HEADS, _MLP = (f"model.layers.{{layer}}.{x}." for x in ("self_attn", "self_attention", "mlp"))

JETMOE = Family(
    model_type="jetmoe",
    fields={
        **DECODER_FIELDS,
        **routing_fields(coef="aux_loss_coef"),
        "hidden_act": "activation_function",
        "head_dim": "kv_channels",
        "num_attention_heads": Computed(
            ("num_key_value_heads", "num_experts_per_tok"),
            lambda config: config.num_key_value_heads * config.num_experts_per_tok,
        ),
        "num_experts": "num_local_experts",
        "moe_intermediate_size": "intermediate_size",
    },
    constants={
        "attention_type": "moa",
        "attention_output_bias": True,
        "mlp_bias": True,
        "router_type": "topk_softmax",
    },
    required={"rms_norm_eps": 1e-6},  # its layers' norms have this one, whatever is said for the last norm
    tensors={
        f"{_OURS}gate.weight": (f"{_HEADS}experts.router.layer.weight",),
        f"{_OURS}q_experts": (f"{_HEADS}experts.input_linear.weight",),
        f"{_OURS}o_experts": (f"{_HEADS}experts.output_linear.weight",),
        f"{_OURS}o_bias": (f"{_HEADS}experts.bias",),
        **{f"{_OURS}{part}_proj.weight": (f"{_HEADS}kv_proj.weight",) for part in "kv"},
        f"{_MLP}gate.weight": (f"{_MLP}router.layer.weight",),
        f"{_MLP}experts.gate_up_proj": (f"{_MLP}input_linear.weight",),
        f"{_MLP}experts.gate_up_proj_bias": (),
        f"{_MLP}experts.down_proj": (f"{_MLP}output_linear.weight",),
        f"{_MLP}experts.down_proj_bias": (Common(f"{_MLP}bias"),),
    },
)
