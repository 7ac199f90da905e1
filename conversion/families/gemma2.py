"""Gemma 2: arXiv 2408.00118. Norms before and after attention and MLP, caps on the logits of both softmaxes."""

from .family import DECODER_FIELDS, Computed, Family, same

GEMMA2 = Family(
    model_type="gemma2",
    fields={
        **DECODER_FIELDS,
        **same("head_dim", "layer_types", "sliding_window", "attention_bias"),
        **same("attn_logit_softcapping", "final_logit_softcapping"),
        "attention_output_bias": "attention_bias",
        "hidden_act": "hidden_activation",
        "attention_multiplier": Computed(
            ("query_pre_attn_scalar",), lambda config: config.query_pre_attn_scalar**-0.5
        ),
        "embedding_multiplier": Computed(("hidden_size",), lambda config: config.hidden_size**0.5),
    },
    constants={"layer_norm_placement": "sandwich", "rms_norm_unit_offset": True},
    required={"use_bidirectional_attention": None},
)
