"""What a quantization config leaves as it is: experts are fused tensors, and most methods quantise linear layers."""

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)


def fused_in_full_precision(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> tensor [E, out, in] of 16 bits a number or more: the experts' matrices that nothing has quantised."""
    return {
        name: x
        for name, x in model.named_parameters()
        if x.dim() == 3 and type(x) in (nn.Parameter, torch.Tensor) and x.is_floating_point() and x.itemsize > 1
    }


def say_what_stays(model: nn.Module) -> None:
    """One line of how much of a quantised model is in full precision, if its experts are."""
    left = fused_in_full_precision(model)
    if getattr(model, "hf_quantizer", None) is None or not left:
        return
    method = model.hf_quantizer.quantization_config.quant_method
    stays, whole = sum(x.nbytes for x in left.values()), sum(x.nbytes for x in model.parameters())
    dtypes = ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in left.values()}))
    logger.warning(
        f"{getattr(method, 'value', method)} has left the {len(left)} fused matrices of the experts in {dtypes}: "
        f"{stays:,} of the model's {whole:,} bytes ({stays / whole:.0%}). With hf_moe installed, "
        "hf_moe.quantize_experts(model) stores them in 4 bits in memory, as --lora_base nf4 does."
    )


class HfMoeUnquantized:
    """Loading that says what a quantization config did not reach."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As Transformers' own; warns where a quantization config leaves the experts in full precision."""
        loaded = super().from_pretrained(*args, **kwargs)
        say_what_stays(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded
