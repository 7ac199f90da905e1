"""hf_moe: the mixture-of-experts design space as one Transformers model family."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import quiet as quiet  # isort: skip  (Transformers imports what it quietens)

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from . import kernels as kernels  # its import registers the experts implementation "hf_moe"
from .fast_generation import fast_generate
from .hub.model_class import push_to_hub
from .kernels.recorded import decoding_kernels
from .model.configuration_hf_moe import HfMoeConfig
from .model.configuration_hf_moe_graft import HfMoeGraftConfig
from .model.decoding import SPEEDUPS, STORED
from .model.modeling_hf_moe import (
    HfMoeForCausalLM,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
    HfMoePreTrainedModel,
)
from .model.modeling_hf_moe_graft import HfMoeGraftForCausalLM, HfMoeGraftForImageTextToText
from .sizes.presets import preset_config
from .stored_loading import StoredWeightsConfig
from .stored_weights import READ
from .version import __version__

# Attached here because the model's files are saved beside weights, and the presets and model cards are not.
HfMoeConfig.from_preset = staticmethod(preset_config)
HfMoePreTrainedModel.push_to_hub = push_to_hub
HfMoeGraftForCausalLM.push_to_hub = push_to_hub

AUTO_CLASSES = {
    AutoModel: HfMoeModel,
    AutoModelForCausalLM: HfMoeForCausalLM,
    AutoModelForSequenceClassification: HfMoeForSequenceClassification,
    AutoModelForTokenClassification: HfMoeForTokenClassification,
}

# `register` makes the Auto classes know "hf_moe" here; `register_for_auto_class` sends the code along with every save.
AutoConfig.register(HfMoeConfig.model_type, HfMoeConfig, exist_ok=True)
HfMoeConfig.register_for_auto_class()
for auto_class, model_class in AUTO_CLASSES.items():
    auto_class.register(HfMoeConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class)

AutoConfig.register(HfMoeGraftConfig.model_type, HfMoeGraftConfig, exist_ok=True)
HfMoeGraftConfig.register_for_auto_class()
AutoModelForCausalLM.register(HfMoeGraftConfig, HfMoeGraftForCausalLM, exist_ok=True)
HfMoeGraftForCausalLM.register_for_auto_class("AutoModelForCausalLM")
for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(HfMoeGraftConfig, HfMoeGraftForImageTextToText, exist_ok=True)
HfMoeGraftForImageTextToText.register_for_auto_class("AutoModelForImageTextToText")

SPEEDUPS.append(decoding_kernels)
STORED.update(READ)

# What training needs is loaded when it is asked for: these names live in modules of hf_moe.training.
TRAINING = {
    "MoeTrainer": "trainers.trainer",
    "MoeTrainingArguments": "balance.moe_arguments",
    "MoeSFTTrainer": "trainers.sft_trainer",
    "MoeSFTConfig": "trainers.sft_trainer",
    "MoeDPOTrainer": "trainers.dpo_trainer",
    "MoeDPOConfig": "trainers.dpo_trainer",
    "MoeGRPOTrainer": "trainers.grpo_trainer",
    "MoeGRPOConfig": "trainers.grpo_trainer",
    "load_router_bias": "balance.selection_bias",
    "load_rows": "weights.esft",
    "train": "main",
    "quantize_experts": "weights.quantized",
}


if TYPE_CHECKING:
    from .training.balance.moe_arguments import MoeTrainingArguments as MoeTrainingArguments
    from .training.balance.selection_bias import load_router_bias as load_router_bias
    from .training.main import train as train
    from .training.trainers.dpo_trainer import MoeDPOConfig as MoeDPOConfig
    from .training.trainers.dpo_trainer import MoeDPOTrainer as MoeDPOTrainer
    from .training.trainers.grpo_trainer import MoeGRPOConfig as MoeGRPOConfig
    from .training.trainers.grpo_trainer import MoeGRPOTrainer as MoeGRPOTrainer
    from .training.trainers.sft_trainer import MoeSFTConfig as MoeSFTConfig
    from .training.trainers.sft_trainer import MoeSFTTrainer as MoeSFTTrainer
    from .training.trainers.trainer import MoeTrainer as MoeTrainer
    from .training.weights.esft import load_rows as load_rows
    from .training.weights.quantized import quantize_experts as quantize_experts


def __getattr__(name: str) -> Any:
    if name not in TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".training.{TRAINING[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs {error.name}, which is not installed: pip install 'hf_moe[train]'") from error


__all__ = [
    "HfMoeConfig",
    "HfMoeForCausalLM",
    "HfMoeForSequenceClassification",
    "HfMoeForTokenClassification",
    "HfMoeGraftConfig",
    "HfMoeGraftForCausalLM",
    "HfMoeGraftForImageTextToText",
    "HfMoeModel",
    "StoredWeightsConfig",
    "__version__",
    "fast_generate",
]
