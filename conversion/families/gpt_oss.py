"""gpt-oss: arXiv 2508.10925. Attention sinks, biases everywhere, clamped experts whose gate and up rows alternate."""

from .family import DECODER_FIELDS, Computed, Family, same
from .moe_rows import ROUTING_FIELDS
from .regions import Stacked

_MLP = "model.layers.{layer}.mlp."
LIMIT = 7.0  # there must be one; this is the release's
GATE, UP = slice(0, None, 2), slice(1, None, 2)

GPT_OSS = Family(
    model_type="gpt_oss",
    fields={
        **DECODER_FIELDS,
        **ROUTING_FIELDS,
        **same("head_dim", "layer_types", "sliding_window", "attention_bias"),
        "attention_output_bias": "attention_bias",
        "num_experts": "num_local_experts",
        "moe_intermediate_size": "intermediate_size",
        "experts_swiglu_limit": Computed(
            ("swiglu_limit",),
            lambda config: config.swiglu_limit,
            lambda config: {"swiglu_limit": float(config.experts_swiglu_limit or LIMIT)},
        ),
        "experts_swiglu_alpha": "swiglu_alpha",
    },
    constants={
        "attention_sinks": True,
        "mlp_bias": True,
        "router_type": "topk_softmax",
        "router_args": {"router_bias": True},
    },
    tensors={
        f"{_MLP}gate.weight": (f"{_MLP}router.weight",),
        f"{_MLP}gate.bias": (f"{_MLP}router.bias",),
        f"{_MLP}experts.gate_up_proj": tuple(
            Stacked(f"{_MLP}experts.gate_up_proj", transposed=True, rows=rows) for rows in (GATE, UP)
        ),
        f"{_MLP}experts.gate_up_proj_bias": tuple(
            Stacked(f"{_MLP}experts.gate_up_proj_bias", rows=rows) for rows in (GATE, UP)
        ),
        f"{_MLP}experts.down_proj": (Stacked(f"{_MLP}experts.down_proj", transposed=True),),
    },
)
