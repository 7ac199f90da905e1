"""hf_moe: the mixture-of-experts design space as one Transformers model family."""

from importlib import import_module

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from . import kernels as kernels  # its import registers the experts implementation "hf_moe"
from .hub.model_class import push_to_hub
from .kernels.recorded import decoding_kernels
from .model.configuration_hf_moe import HfMoeConfig
from .model.decoding import SPEEDUPS
from .model.modeling_hf_moe import (
    HfMoeForCausalLM,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
    HfMoePreTrainedModel,
)
from .quiet import quieten
from .sizes.presets import preset_config
from .version import __version__

# Attached here because the model's files are saved beside weights, and the presets and model cards are not.
HfMoeConfig.from_preset = staticmethod(preset_config)
HfMoePreTrainedModel.push_to_hub = push_to_hub

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

SPEEDUPS.append(decoding_kernels)
quieten()

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
    "quantize_experts": "weights.quantized",
}


def __getattr__(name: str):
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
    "HfMoeModel",
    "__version__",
]
