"""SmolLM3: Llama without RoPE in every fourth layer (NoPE, arXiv 2501.18795)."""

from .family import DECODER_FIELDS, Computed, Family, same

SMOLLM3 = Family(
    model_type="smollm3",
    fields={
        **DECODER_FIELDS,
        **same("head_dim", "layer_types", "sliding_window", "attention_bias", "mlp_bias"),
        "attention_output_bias": "attention_bias",
        "no_rope_layers": Computed(  # may be longer than there are layers
            ("no_rope_layers",), lambda config: config.no_rope_layers[: config.num_hidden_layers]
        ),
    },
    # The config class has already worked these into no_rope_layers and layer_types.
    neutral=frozenset({"no_rope_layer_interval", "use_sliding_window"}),
    undeclared=frozenset({"head_dim"}),
)
