"""Where the message in models saved by hf_moe 0.3 says that `quantize_experts` is."""

from .weights.quantized import quantize_experts

__all__ = ["quantize_experts"]
