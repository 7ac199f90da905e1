"""The seam to Transformers' Trainer and to Accelerate: all that is private, undocumented or renamed stands here.

As hf_moe/model/host.py does for the model; what is TRL's and PEFT's is in host_trl.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from inspect import signature
from typing import Any

import accelerate.utils
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.pipelining import PipelineStage
from transformers import PreTrainedModel, Trainer
from transformers import trainer as trainer_module
from transformers.distributed import fsdp
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.trainer import OPTIMIZER_NAME as OPTIMIZER_NAME
from transformers.trainer import SCHEDULER_NAME as SCHEDULER_NAME
from transformers.trainer import TRAINER_STATE_NAME as TRAINER_STATE_NAME
from transformers.trainer import TRAINING_ARGS_NAME as TRAINING_ARGS_NAME
from transformers.trainer import PushInProgress
from transformers.trainer_pt_utils import LabelSmoother as LabelSmoother
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR as PREFIX_CHECKPOINT_DIR
from transformers.utils import chat_template_utils, is_flash_attn_3_available, is_flash_attn_4_available, logging
from transformers.utils.hub import hf_api

from hf_moe.model.host import TESTED as MODEL_TESTED
from hf_moe.model.host import differences

logger = logging.get_logger(__name__)

# The oldest and the newest minor release that all tests of training ran with; of Transformers, the model's.
TESTED = {"transformers": MODEL_TESTED, "accelerate": ((1, 15), (1, 15))}

# As in hf_moe/model/host.py: what the trainers override or call, the arguments that it was written against, and why
# nothing that is documented serves.
PRIVATE = {
    Trainer: {
        "_save": (
            "self, output_dir, state_dict",
            "the one place that checkpoints, save_model and pushes all write a model by; on_save comes after them",
        ),
        "_run_epoch": (
            "self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
            "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
            "a run that was killed between its last step and its end would take one more: no callback comes before it",
        ),
        "_load_from_checkpoint": (
            "self, resume_from_checkpoint, model",
            "every weight must come back, or an error; the host leaves missing ones as they are, with a warning",
        ),
        "_load_optimizer_and_scheduler": (
            "self, checkpoint",
            "an optimizer of other weights or of another kind must be an error before the first step",
        ),
        "_save_optimizer_and_scheduler": (
            "self, output_dir",
            "the host saves none of a model that it loaded in shards",
        ),
        "_save_rng_state": ("self, output_dir", "a checkpoint is complete when every process has written its part"),
        "_load_best_model": ("self", "as _load_from_checkpoint, which it does not call"),
        "_push_from_checkpoint": (
            "self, checkpoint_folder",
            "checkpoints are pushed with their model code, and without pickles",
        ),
        "_finish_current_push": ("self", "called: the pushes that are under way end before the last one begins"),
        "_prepare_inputs": ("self, inputs", "called: the micro-batches of a step, as compute_loss will get them"),
    },
    LabelSmoother: {
        "__call__": (
            "self, model_output, labels, shift_labels, num_items_in_batch",
            "the host shifts labels by the names of its own models; label_smoother is an attribute of the Trainer",
        ),
    },
    chat_template_utils: {
        "_compile_jinja_template": ("chat_template", "its environment, to which a faster {% generation %} is added"),
    },
    trainer_module: {
        "save_fsdp_optimizer": (
            "fsdp_plugin, accelerator, optimizer, model, output_dir, optimizer_index, use_dcp",
            "makes whole moments of all shards, which torchao's of 8 bits survive in no file",
        ),
        "load_fsdp_optimizer": (
            "fsdp_plugin, accelerator, optimizer, model, input_dir, optimizer_index, adapter_only, use_dcp",
            "spreads whole moments, which torchao's of 8 bits cannot be",
        ),
    },
    Accelerator: {
        "_prepare_device_mesh": ("self", "processes of a pipeline get the same rows, and the model no wrapper for it"),
    },
    accelerate.utils: {
        "get_mixed_precision_context_manager": ("native_amp, autocast_kwargs", "the accelerator's own autocast"),
    },
}


def check_version(package: str, tested: tuple, found: Callable[[], list[str]], installed: str | None = None) -> None:
    """Outside the `tested` releases, say so once; raise ImportError where `found` has differences from them."""
    installed = version(package) if installed is None else installed
    number = tuple(int(x) for x in installed.split(".")[:2])
    if tested[0] <= number <= tested[1]:
        return
    oldest, newest = (".".join(map(str, x)) for x in tested)
    ran = f"{oldest} to {newest}" if oldest != newest else newest
    if lines := found():
        raise ImportError(
            f"{package} {installed} is not what hf_moe's training was tested with, {ran}, and differs: {lines[0]}"
            f"{f' (and {len(lines) - 1} more)' if lines[1:] else ''}; pip install '{package}=={newest}.*', or pip "
            "install -U hf_moe."
        )
    if package != "transformers":  # the model's seam has said it
        logger.warning_once(f"hf_moe's training was tested with {package} {ran}; this is {installed}.")


for _package, _tested in TESTED.items():
    check_version(_package, _tested, lambda: differences(PRIVATE))


# Whether the norm of gradients that expert parallelism spreads is that of all: until 5.22 it is about 2% off.
CLIPS_EXPERT_PARALLEL = tuple(int(x) for x in version("transformers").split(".")[:2]) >= (5, 23)

# ---- names that changed ----

# Old name of an argument -> its name since Transformers 5.23, which is hf_moe's. `MoeArguments` has the new ones as
# fields of its own, so that every host knows both.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def by_both_names(values: dict[str, Any]) -> dict[str, Any]:
    """`values` where old and new names say the same: what the new one says, or else the old, a default of TRL's."""
    said = {new: values[old] if values[new] is None else values[new] for old, new in RENAMED.items()}
    return values | said | {old: said[new] for old, new in RENAMED.items()}


# ---- what has no public name ----

compile_chat_template = chat_template_utils._compile_jinja_template


def shifts_labels(trainer: Trainer) -> bool:
    """Whether the Trainer took the model's loss for that of a causal model, by its class."""
    return trainer._loss_shifts_labels


def own_scheduler(trainer: Trainer) -> None:
    """The scheduler is the trainer's own, not the caller's: another training begins with a new one."""
    assert hasattr(trainer, "_created_lr_scheduler")
    trainer._created_lr_scheduler = True


def start_repository(trainer: Trainer, token: str | None, private: bool) -> None:
    """The Trainer's own `init_hf_repo`; until 5.22 whether it is private is said by the arguments alone."""
    if "private" in signature(Trainer.init_hf_repo).parameters:
        Trainer.init_hf_repo(trainer, token=token, private=private)
        return
    said, trainer.args.hub_private_repo = trainer.args.hub_private_repo, private
    try:
        Trainer.init_hf_repo(trainer, token=token)
    finally:
        trainer.args.hub_private_repo = said


def prepared_inputs(trainer: Trainer, batch: dict) -> dict:
    """A batch as `compute_loss` gets it: on the device."""
    return trainer._prepare_inputs(batch)


def is_adapter(model: PreTrainedModel) -> bool:
    """Whether `from_pretrained` found an adapter in the folder, and put it on its base."""
    return model._hf_peft_config_loaded


def loaded_from(config) -> tuple[str, str | None]:
    """The folder or Hub id that a configuration came from, and its commit."""
    return config._name_or_path, getattr(config, "_commit_hash", None)


def checkpointing_function(module: nn.Module) -> Callable | None:
    """What runs the forward of a layer again in the backward pass; None where it does not run again."""
    again = getattr(module, "gradient_checkpointing", False)
    return getattr(module, "_gradient_checkpointing_func", None) if again else None


def implementations() -> dict[str, list[str]]:
    """Argument -> what it can be here: what is registered for attention in training, and for experts."""
    attention = [name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if not name.startswith("paged|")]
    return {
        "attn_implementation": ["eager", *attention],
        "experts_implementation": ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()],
        "cache_implementation": [*ALL_CACHE_IMPLEMENTATIONS],
    }


def missing_reporters(names: list[str]) -> list[str]:
    """Those that the Trainer knows, and whose package is not there."""
    available = get_available_reporting_integrations()
    return [name for name in names if name in INTEGRATION_TO_CALLBACK and name not in available]


def unknown_reporters(names: list[str]) -> list[str]:
    return [name for name in names if name not in INTEGRATION_TO_CALLBACK]


# ---- pushing while training goes on ----


def is_pushing(trainer: Trainer) -> bool:
    return trainer.push_in_progress is not None and not trainer.push_in_progress.is_done()


def add_push(trainer: Trainer, job) -> None:
    """A push that the Trainer is to wait for in the end."""
    if is_pushing(trainer):
        trainer.push_in_progress.jobs.append(job)
    else:
        trainer.push_in_progress = PushInProgress([job])


def finish_pushes(trainer: Trainer) -> None:
    trainer._finish_current_push()


def in_background(job: Callable):
    """A future of what `job` returns, after those that were begun before it."""
    return hf_api().run_as_future(job)


# ---- Accelerate ----


def autocast_forward(accelerator: Accelerator, model: nn.Module) -> None:
    """Let the forward of `model` run under the accelerator's autocast, until Accelerate puts the old one back."""
    autocast = accelerate.utils.get_mixed_precision_context_manager(
        accelerator.native_amp, accelerator.autocast_handler
    )
    model._original_forward = model.forward
    model.forward = autocast(model.forward)


def share_rows(accelerator: Accelerator, mesh: DeviceMesh) -> None:
    """Processes of one row of the mesh get the same batches, as under tensor parallelism."""
    accelerator._prepare_device_mesh = lambda: mesh


# What a stage of a pipeline overrides of PyTorch's, whose buffers are all of one shape.
OF_STAGES = ("_prepare_forward_infra", "_prepare_backward_infra")


def check_stages() -> None:
    """Raises ImportError where PyTorch's stages make their buffers elsewhere: an override would not be called."""
    if missing := [name for name in OF_STAGES if not hasattr(PipelineStage, name)]:
        raise ImportError(
            f"A pipeline overrides PipelineStage.{' and '.join(missing)}, which PyTorch {torch.__version__} lacks: "
            "install torch 2.13, or leave pipeline_parallel_size out."
        )


def leave_whole(accelerator: Accelerator, clip: Callable) -> None:
    """A model whose gradients are summed elsewhere: none of Accelerate's wrappers, and `clip` clips them."""
    accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)
    accelerator.clip_grad_norm_ = clip


@contextmanager
def sharding(policy: Callable[[nn.Module], MixedPrecisionPolicy | None]) -> Iterator[None]:
    """While Transformers loads a model in shards: those modules for which `policy` has one are sharded with that."""

    def fully_shard(module, **kwargs):
        found = policy(module) if isinstance(module, nn.Module) else None
        return shard(module, **kwargs | ({} if found is None else {"mp_policy": found}))

    shard, fsdp.fully_shard = fsdp.fully_shard, fully_shard
    try:
        yield
    finally:
        fsdp.fully_shard = shard


@contextmanager
def taking_shards(trainer: Trainer, begin: Callable, *given: Any, **named: Any) -> Iterator[None]:
    """While a trainer begins with these arguments: the host's takes no model that it loaded in shards if it is to
    write checkpoints, whose optimizer it would not save. hf_moe's trainers do (output/spread.py).
    """
    values = signature(begin).bind_partial(*given, **named).arguments
    args = values.get("args")
    if args is None or not getattr(values.get("model"), "is_distributed_loading_by_transformers", False):
        yield
        return
    said, args.save_only_model = args.save_only_model, True
    try:
        yield
    finally:
        for held in (args, getattr(trainer, "args", args)):  # TRL makes its own of Transformers' arguments
            held.save_only_model = said


@contextmanager
def sharded_optimizer(save: Callable[[str], None], load: Callable[[str], None]) -> Iterator[None]:
    """While the host saves or loads a model under FSDP: its optimizer by these two, to and from a folder."""
    was = trainer_module.save_fsdp_optimizer, trainer_module.load_fsdp_optimizer
    trainer_module.save_fsdp_optimizer = lambda plugin, accelerator, optimizer, model, folder: save(folder)
    trainer_module.load_fsdp_optimizer = lambda plugin, accelerator, optimizer, model, folder, **kwargs: load(folder)
    try:
        yield
    finally:
        trainer_module.save_fsdp_optimizer, trainer_module.load_fsdp_optimizer = was


@contextmanager
def gathering_as(model: PreTrainedModel, change: Callable[[dict], dict]) -> Iterator[None]:
    """While a model that the host loaded in shards is saved: what it gathers, whatever it is given, is changed."""
    gather = model.gather_sharded_state_dict_for_save
    model.gather_sharded_state_dict_for_save = lambda *given, **named: change(gather(*given, **named))
    try:
        yield
    finally:
        del model.gather_sharded_state_dict_for_save


def bare_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    """Without what Accelerate puts around it, which takes no step between two micro-batches."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def can_choose_experts(model: PreTrainedModel) -> bool:
    """Whether `set_experts_implementation` is for this model."""
    return model._can_set_experts_implementation()


def flash_attention() -> str | None:
    """Of the flash attentions that Transformers calls and somebody installed, one faster than torch's own."""
    installed = {"flash_attention_4": is_flash_attn_4_available(), "flash_attention_3": is_flash_attn_3_available()}
    return next((name for name, there in installed.items() if there), None)


def keep_dtype_in_views() -> None:
    """Mend torchao's 8-bit states, whose views, as DTensor makes one of each shard, forget that they stand for
    bfloat16: then torch compiles no step with them (https://github.com/pytorch/ao/pull/4216).
    """
    from torchao.optim.subclass_8bit import OptimState8bit

    @OptimState8bit.implements(torch.ops.aten.view.default)
    def view(function, types, args, kwargs):
        state, shape = args
        return OptimState8bit(state.codes.view(shape), state.scale, state.qmap, state.signed, dtype=state.dtype)
