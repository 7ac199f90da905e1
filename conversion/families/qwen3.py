"""Qwen3: arXiv 2505.09388. RMSNorm over each head of q and k; biases, if any, on q, k, v and o."""

from .family import DECODER_FIELDS, Family, same

QWEN3 = Family(
    model_type="qwen3",
    fields={
        **DECODER_FIELDS,
        **same("head_dim", "layer_types", "sliding_window", "attention_bias"),
        "attention_output_bias": "attention_bias",
    },
    constants={"qk_norm": "head"},
    # The config class has already worked these into layer_types and sliding_window.
    neutral=frozenset({"use_sliding_window", "max_window_layers"}),
)
