"""Loading a model with its matrices in 8 or 4 bits: `from_pretrained(..., quantization_config=StoredWeightsConfig())`.

As each matrix is read, experts' fused ones too, so that the model is never here in full. In memory alone: what is
trained and saved is the checkpoint that it came from.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .stored_weights import FORMS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

METHOD = "hf_moe_stored"
logger = logging.get_logger(__name__)


@register_quantization_config(METHOD)
class StoredWeightsConfig(QuantizationConfigMixin):
    """How a model's matrices are stored: `stored` is "fp8" (float8 in blocks of 128 x 128, as DeepSeek-V3 is released)
    or "int4" (4 bits, of 128 numbers of a row the least and the largest kept).

    Embeddings, head, routers and norms stay as they are. Raises ValueError for what is neither.
    """

    def __init__(self, stored: str = "fp8", **kwargs: Any):
        if stored not in FORMS:
            raise ValueError(f"stored is {stored!r}; it can be {' or '.join(FORMS)}.")
        self.quant_method, self.stored = kwargs.pop("quant_method", METHOD), stored
        if kwargs:
            raise ValueError(f"StoredWeightsConfig does not know {', '.join(kwargs)}: it takes stored.")


def quantized_as(stored: str | None, config: PreTrainedConfig, name: str | Path) -> dict[str, StoredWeightsConfig]:
    """What `from_pretrained` is told so that matrices are `stored`; ValueError where the files have codes already."""
    if stored is None:
        return {}
    already = getattr(config, "quantization_config", None)
    if already is not None:
        method = already.get("quant_method") if isinstance(already, dict) else already.quant_method
        raise ValueError(f"{name} is quantised already ({method}): load it as it is, without --quantize {stored}.")
    return {"quantization_config": StoredWeightsConfig(stored)}


class Store(ConversionOps):
    """A matrix as codes, found where there is a GPU on it, and put where the matrix was."""

    def __init__(self, hf_quantizer: StoredWeightsQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, torch.Tensor],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        missing_keys=None,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        (value,) = input_dict.values()
        (value,) = value if isinstance(value, list) else [value]
        path, _, attribute = full_layer_name.rpartition(".")
        there = value.to("cuda") if torch.cuda.is_available() else value
        stored = FORMS[self.hf_quantizer.quantization_config.stored].quantize(there).moved(value.device)
        parameter = nn.Parameter(stored, requires_grad=False)
        parameter._is_hf_initialized = True  # else Transformers draws it anew
        model.get_submodule(path)._parameters[attribute] = parameter
        missing_keys.discard(full_layer_name)
        return {}


@register_quantizer(METHOD)
class StoredWeightsQuantizer(HfQuantizer):
    """Stores the matrices that an adapter could have: of attention, dense networks and experts."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        from .training.weights.groups import matrices

        self.names, stored = matrices(model), self.quantization_config.stored
        if not self.names:
            raise ValueError(f"{type(model).__name__} has no matrix to store as {stored}.")

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs) -> bool:
        return param_name in self.names

    def get_quantize_ops(self) -> Store:
        return Store(self)

    def is_serializable(self) -> bool:
        logger.warning("Codes are in memory alone: what to publish is the checkpoint that they were made of.")
        return False

    @property
    def is_trainable(self) -> bool:
        return True  # an adapter beside it
