"""Qwen2 and Qwen2.5: arXiv 2407.10671, 2412.15115. Biases on q, k and v only."""

from .family import DECODER_FIELDS, Family, same

QWEN2 = Family(
    model_type="qwen2",
    fields={**DECODER_FIELDS, **same("head_dim", "layer_types", "sliding_window")},
    constants={"attention_bias": True},
    # The config class has already worked these into layer_types and sliding_window.
    neutral=frozenset({"use_sliding_window", "max_window_layers"}),
    undeclared=frozenset({"head_dim"}),
)
