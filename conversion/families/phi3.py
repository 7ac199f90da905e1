"""Phi-3, Phi-3.5 and Phi-4: arXiv 2404.14219, 2412.08905, 2503.01743. One matrix for q, k and v, one for gate and up.

Phi-4-mini rotates only part of a head. The sliding window, if there is one, holds in every layer.
"""

from .family import DECODER_FIELDS, Family, same
from .rope_rows import PARTIAL_ROPE

FUSED_GATE_UP = {
    f"model.layers.{{layer}}.mlp.{part}_proj.weight": ("model.layers.{layer}.mlp.gate_up_proj.weight",)
    for part in ("gate", "up")
}

PHI3 = Family(
    model_type="phi3",
    fields={**DECODER_FIELDS, **same("head_dim", "sliding_window"), "rope_parameters": PARTIAL_ROPE},
    required={"resid_pdrop": 0.0},
    # Its code has no dropout on embeddings; the length before scaling is in the RoPE parameters, too.
    neutral=frozenset({"embd_pdrop", "original_max_position_embeddings"}),
    undeclared=frozenset({"head_dim", "partial_rotary_factor"}),
    tensors={
        **{
            f"model.layers.{{layer}}.self_attn.{part}_proj.weight": ("model.layers.{layer}.self_attn.qkv_proj.weight",)
            for part in "qkv"
        },
        **FUSED_GATE_UP,
    },
)
