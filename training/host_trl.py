"""The seam to TRL and PEFT, as host.py is to Transformers' Trainer; apart from it, for MoeTrainer needs neither."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
import trl
from peft.tuners.lora import LoraLayer as LoraLayer
from peft.tuners.lora import ParamWrapper
from transformers import PreTrainedModel
from trl import chat_template_utils
from trl.trainer.utils import RepeatSampler as RepeatSampler

from hf_moe.kernels.experts import adds_low_rank
from hf_moe.kernels.fp8.linear import Fp8Linear
from hf_moe.kernels.low_rank import beside
from hf_moe.model.host import differences

from .host import check_version

TESTED = {"trl": ((1, 16), (1, 16)), "peft": ((0, 21), (0, 21))}

# As in host.py, by the names of TRL's trainers, each of which takes a second to import.
PRIVATE = {
    "SFTTrainer": {
        "_prepare_dataset": (
            "self, dataset, processing_class, args, packing, formatting_func, dataset_name",
            "rows that max_length cuts are counted between tokenising and cutting, which are one method",
        ),
    },
    "DPOTrainer": {
        "_prepare_dataset": (
            "self, dataset, processing_class, args, dataset_name",
            "pairs that max_length cuts are counted before the collator cuts them without a word",
        ),
    },
    "GRPOTrainer": {
        "_get_train_sampler": ("self, dataset", "the order must be the epoch's, for a resumed run"),
        "_prepare_inputs": ("self, generation_batch", "called: generates the texts of a step"),
        "_generate_single_turn": (
            "self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images",
            "texts are generated in evaluation mode, and their experts recorded",
        ),
        "_generate_and_score_completions": ("self, inputs", "the recorded experts go with the texts"),
        "_get_per_token_logps_and_entropies": (
            "self, model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss, "
            "pixel_values, image_grid_thw, num_images, pixel_attention_mask, spatial_shapes, num_tiles, image_sizes, "
            "token_type_ids, mm_token_type_ids, image_position_ids",
            "the forward of the old policy is to record or to take experts",
        ),
        "_load_optimizer_and_scheduler": ("self, checkpoint", "as the Trainer's"),
    },
}


# What arguments of TRL's can be, by its configs, which take any text: its trainers find out in the first step.
VALUES = {
    "DPOConfig": {
        "loss_type": (
            *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
            *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
        ),
        "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    },
    "GRPOConfig": {
        "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
        "importance_sampling_level": ("token", "sequence"),
        "scale_rewards": ("group", "batch", "none"),
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
        "vllm_mode": ("colocate", "server"),
        "vllm_model_impl": ("vllm", "transformers"),
        "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    },
}


def owned() -> dict:
    """PRIVATE by class."""
    return {getattr(trl, name): methods for name, methods in PRIVATE.items()} | {
        RepeatSampler: {
            "__init__": (
                "self, data_source, mini_repeat_count, batch_size, repeat_count, shuffle, seed",
                "made anew with a seed for each epoch",
            )
        },
        chat_template_utils: {
            "has_generation_markers": ("chat_template", "else TRL's marked template would take a user's place")
        },
        ParamWrapper: {
            "_activate_lora": ("self, active_adapters", "what it makes is as large as all experts of a layer"),
            "get_delta_factors": ("self, adapter_name", "called: the factors, without their product"),
        },
        trl.TrlParser: {"set_defaults_with_config": ("self, kwargs", "recipes are defaults; TRL's own reads a file")},
    }


for _package, _tested in TESTED.items():
    check_version(_package, _tested, lambda: differences(owned()))


def values_of(config: type) -> dict[str, tuple[str, ...]]:
    """What arguments of a class of arguments can be, where the class itself does not say it."""
    return {name: known for base in config.__mro__ for name, known in VALUES.get(base.__name__, {}).items()}


has_generation_markers = chat_template_utils.has_generation_markers


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Transformers says of names that it gave up, and TRL and PEFT still use: no user can help it.

    And what TRL says of `use_liger_kernel`, which it will give up: how hf_moe's models take Liger's kernels is ours;
    and what torch asks of the author of torchao's 8-bit states.
    """
    names = ("is_gradient_checkpointing", "gradient_checkpointing_enable", "gradient_checkpointing_disable")
    with warnings.catch_warnings():
        for name in (*names, "use_liger_kernel=True"):
            warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "OptimState8bit does not implement", UserWarning)
        yield


@contextmanager
def reference_of_revision(args, revision: str, **kwargs) -> Iterator[None]:
    """Inside, GRPOTrainer loads its reference from this revision: it takes the policy's name alone from the policy.
    `kwargs` are further ones of `from_pretrained`.

    By `model_init_kwargs`, of which it then says that they are ignored, and means the policy.
    """
    logger = logging.getLogger("trl.trainer.grpo_trainer")
    args.model_init_kwargs = {"revision": revision, **kwargs}
    logger.addFilter(not_about_kwargs)
    try:
        yield
    finally:
        logger.removeFilter(not_about_kwargs)
        args.model_init_kwargs = None


def not_about_kwargs(record: logging.LogRecord) -> bool:
    return "`model_init_kwargs` will be ignored" not in record.getMessage()


def leave_out_own_aux_loss(trainer) -> None:
    """TRL's balance loss pools the layers; hf_moe adds its own."""
    assert hasattr(trainer, "aux_loss_enabled")
    trainer.aux_loss_enabled = False


def log_beside_loss(trainer, training: bool, name: str, value: float) -> None:
    """A number of a batch, whose mean since the last log TRL adds to it."""
    trainer._metrics["train" if training else "eval"][name].append(value)


def generated_batches(trainer) -> list[dict] | None:
    """The micro-batches of the texts that GRPO generated last."""
    return trainer._buffered_inputs


def generated_step(trainer) -> int:
    """How many micro-batches GRPO has trained on."""
    return trainer._step


def allow_recorded_steps(trainer) -> None:
    """GRPO forbids `generate` to compile, and so to replay recorded steps, which compile nothing; vLLM asks neither.

    It stays forbidden for a kind of cache that Transformers would compile for.
    """
    if not trainer.use_vllm and trainer.generation_config.cache_implementation is None:
        trainer.generation_config.disable_compile = False


def show_bias(head) -> None:
    """TRL's fused head reads the bias of the model's, which PEFT's wrapper for single rows does not show."""
    if not hasattr(head, "bias"):
        object.__setattr__(head, "bias", head.original_module.bias)  # no second parameter


def show_backbone(model: PreTrainedModel) -> None:
    """TRL's fused head calls the model's `base_model`, which is the model itself where, as Llama 4's text model, it
    names a part that it has not. Raises ValueError where none of its parts can be meant."""
    if model.base_model is not model:
        return
    parts = [name for name, part in model.named_children() if isinstance(part, PreTrainedModel)]
    if len(parts) != 1:
        raise ValueError(
            f"{type(model).__name__} does not say which of its parts is the one below its head, and TRL computes the "
            f"loss from that: set base_model_prefix to its name; there are {', '.join(parts) or 'none'}."
        )
    model.base_model_prefix = parts[0]


def adapted_name(layer: LoraLayer) -> str:
    """Which parameter of its module a layer of PEFT's adapts."""
    return layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"


def add_beside(model: torch.nn.Module) -> None:
    """Let adapters on experts add their two factors, not a sum as large as the weights, where kernels can.

    PEFT makes the sum of all experts in each forward, twice, and its whole gradient.
    """
    for layer in model.modules():
        if isinstance(layer, ParamWrapper):
            layer._activate_lora = MethodType(factors_beside, layer)


@contextmanager
def factors_beside(self: ParamWrapper, active_adapters: list[str]) -> Iterator[None]:
    adapters, layer = [name for name in active_adapters if name in self.lora_A], self.get_base_layer()
    if len(adapters) == 1 and self.num_experts > 1 and adds_low_rank(layer):
        with beside(layer, self.parameter_name, *self.get_delta_factors(adapters[0])):
            yield
    elif len(adapters) == 1 and isinstance(layer, Fp8Linear):  # of whose sum three bits are left
        a, b, scaling = self.lora_A[adapters[0]].weight, self.lora_B[adapters[0]].weight, self.scaling[adapters[0]]
        with beside(layer, self.parameter_name, b, a, scaling):
            yield
    else:
        with ParamWrapper._activate_lora(self, active_adapters):
            yield
