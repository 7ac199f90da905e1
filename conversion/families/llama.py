"""Llama 1 to 3 and what shares its class (SmolLM, TinyLlama, Vicuna): arXiv 2302.13971, 2307.09288, 2407.21783."""

from .family import DECODER_FIELDS, Family, same

LLAMA = Family(
    model_type="llama",
    fields={
        **DECODER_FIELDS,
        **same("head_dim", "attention_bias", "mlp_bias"),
        "attention_output_bias": "attention_bias",  # on q, k, v and o alike
    },
    neutral=frozenset({"pretraining_tp"}),  # how the training was spread; the model computes the same
)
