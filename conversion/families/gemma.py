"""Gemma: arXiv 2403.08295. Llama with gelu, embeddings times sqrt(D), and norms that multiply by 1 + weight."""

from .family import DECODER_FIELDS, Family, same
from .gemma2 import GEMMA2

GEMMA = Family(
    model_type="gemma",
    fields={
        **DECODER_FIELDS,
        **same("head_dim", "attention_bias"),
        "attention_output_bias": "attention_bias",
        "embedding_multiplier": GEMMA2.fields["embedding_multiplier"],
    },
    constants={"rms_norm_unit_offset": True},
    required={"use_bidirectional_attention": None},
)
