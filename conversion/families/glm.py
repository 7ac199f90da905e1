"""GLM-4-9B and GLM-4-0414: arXiv 2406.12793. RoPE turns neighbouring dimensions, of the first half of a head.

The latter has norms before and after attention and MLP.
"""

from .family import DECODER_FIELDS, Family, same
from .phi3 import FUSED_GATE_UP
from .rope_rows import PARTIAL_ROPE

GLM = Family(
    model_type="glm",
    fields={**DECODER_FIELDS, **same("head_dim", "attention_bias"), "rope_parameters": PARTIAL_ROPE},
    constants={"rope_interleave": True},
    undeclared=frozenset({"partial_rotary_factor"}),
    tensors=FUSED_GATE_UP,
)

GLM4 = Family(
    model_type="glm4",
    fields=GLM.fields,
    constants={**GLM.constants, "layer_norm_placement": "sandwich"},
    undeclared=GLM.undeclared,
    tensors={
        **FUSED_GATE_UP,
        "model.layers.{layer}.post_attention_layernorm.weight": (
            "model.layers.{layer}.post_self_attn_layernorm.weight",
        ),
        "model.layers.{layer}.pre_feedforward_layernorm.weight": (
            "model.layers.{layer}.post_attention_layernorm.weight",
        ),
        "model.layers.{layer}.post_feedforward_layernorm.weight": ("model.layers.{layer}.post_mlp_layernorm.weight",),
    },
)
