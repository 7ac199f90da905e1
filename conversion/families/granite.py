"""Granite 3: Llama with multipliers on embeddings, attention, residuals and logits, as PowerLM (arXiv 2408.13359)."""

from .family import DECODER_FIELDS, Family, same

GRANITE = Family(
    model_type="granite",
    fields={
        **DECODER_FIELDS,
        **same("head_dim", "attention_bias", "mlp_bias"),
        **same("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
        "attention_output_bias": "attention_bias",
    },
    undeclared=frozenset({"head_dim"}),
)
