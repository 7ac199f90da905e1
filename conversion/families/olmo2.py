"""OLMo 2: arXiv 2501.00656. Norms on the output of attention and MLP, and over all heads of q and k at once."""

from .family import DECODER_FIELDS, Family, same

OLMO2 = Family(
    model_type="olmo2",
    fields={
        **DECODER_FIELDS,
        **same("head_dim", "attention_bias"),
        "attention_output_bias": "attention_bias",
    },
    constants={"layer_norm_placement": "post", "qk_norm": "projection"},
    undeclared=frozenset({"head_dim"}),
)
