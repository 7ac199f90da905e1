"""Sarvam-30B and 105B: https://huggingface.co/sarvamai. GLM-4.5's classes with whole RoPE, and DeepSeek-V3's.

The former's tensors are named as in Ling, with one matrix for q, k and v.
"""

from .deepseek_rows import AS_V3, BIASED_SIGMOID, GROUPS, LATENT_ATTENTION, SHARED_EXPERTS_FIELDS
from .family import DECODER_FIELDS, Family, same
from .glm4_moe import GLM4_MOE
from .moe_rows import LAYOUTS

# Of layers that no release has.
MTP_COUNT = frozenset({"num_mtp_layers"})

_OURS, _THEIRS = "model.layers.{layer}.self_attn.", "model.layers.{layer}.attention."
LING = {
    "model.embed_tokens.weight": ("model.word_embeddings.weight",),
    **{
        f"{_OURS}{part}_proj.{kind}": (f"{_THEIRS}query_key_value.{kind}",)
        for part in "qkv"
        for kind in ("weight", "bias")
    },
    f"{_OURS}o_proj.weight": (f"{_THEIRS}dense.weight",),
    f"{_OURS}q_norm.weight": (f"{_THEIRS}query_layernorm.weight",),
    f"{_OURS}k_norm.weight": (f"{_THEIRS}key_layernorm.weight",),
    "model.layers.{layer}.mlp.gate.e_score_correction_bias": ("model.layers.{layer}.mlp.gate.expert_bias",),
}

SARVAM_MOE = Family(
    model_type="sarvam_moe",
    fields={name: source for name, source in GLM4_MOE.fields.items() if name != "num_mtp_layers"},
    constants=BIASED_SIGMOID,
    neutral=MTP_COUNT,
    undeclared=frozenset({"partial_rotary_factor"}),
    layouts={"per-expert": {**LAYOUTS["per-expert"], **LING}, "fused": {}},
    class_name="SarvamMoEForCausalLM",
)

SARVAM_MLA = Family(
    model_type="sarvam_mla",
    fields={
        **DECODER_FIELDS,
        **SHARED_EXPERTS_FIELDS,
        **LATENT_ATTENTION,
        **GROUPS,
        **same("routed_scaling_factor", "output_router_logits", "norm_topk_prob", "rope_interleave"),
        "attention_output_bias": "attention_bias",
    },
    constants={**BIASED_SIGMOID, "attention_type": "mla"},
    required=AS_V3,
    neutral=MTP_COUNT | {"pretraining_tp", "head_dim", "qk_head_dim", "q_head_dim"},  # sizes that follow from others
    undeclared=frozenset({*AS_V3, "head_dim", "qk_head_dim", "q_head_dim"}),
    layouts=LAYOUTS,
    class_name="SarvamMLAForCausalLM",
)
