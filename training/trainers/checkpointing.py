"""What a trainer saves, and restores from it: every weight, the optimizer, and a record of the run."""

import gc
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.training_args import OptimizerNames

from hf_moe.chat import write_plain_templates
from hf_moe.reading import whole_model

from ..balance.selection_bias import base_model, load_router_bias, save_router_bias
from ..host import gathering_as, sharded_optimizer
from ..output.checkpoints import check_adapter, check_optimizer
from ..output.resuming import check_same_arguments, check_same_step, say_differences, write_arguments
from ..output.saved_dtype import cast, finish
from ..output.saving import keep_weights, mend
from ..output.spread import check_parts, load_optimizer, load_state, save_optimizer, save_state
from ..weights.average import write_average
from ..weights.esft import chosen_experts, load_rows, save_rows


class CheckpointMixin:
    """Of MoeTrainerMixin: before a trainer class of Transformers or TRL, whose ways of saving it goes through."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        try:
            mend(self.moe)
            self.save_all(folder, state_dict)
        except Exception as error:
            if not self.args.should_save:
                raise
            keep_weights(self, folder, state_dict, error)

    def save_all(self, folder: str, state_dict: dict | None) -> None:
        """The weights, what goes with them, and a record of the run, to `folder`."""
        self.selection_bias.restore()
        average = None if self.average is None else self.average.whole(self.trained_model, self.args.should_save)
        rows_alone = bool(chosen_experts(self.moe))
        if not rows_alone:
            with self.saving_cast():
                super()._save(folder, self.state_to_save(state_dict))
            if self.casts and self.args.should_save:
                finish(folder, self.saved_dtype)
        elif self.args.should_save:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_rows(self.moe, folder, state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        if self.args.should_save and (rows_alone or self.model is not self.moe):
            save_router_bias(self.model, folder)
        if self.args.should_save and average is not None:
            write_average(average, folder)
        if self.args.should_save:
            write_plain_templates(Path(folder))
            self.save_record(folder)
            write_arguments(self.args, folder)

    def save_without_weights(self, folder: str | Path) -> None:
        """The same without a weight, before there is anything to lose."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        rows_alone = bool(chosen_experts(self.moe))
        if self.spread:  # gathered by all processes at once
            self.moe.config.save_pretrained(folder)
            self.moe.generation_config.save_pretrained(folder)
        elif not rows_alone:
            names = [name for name, x in self.model.named_parameters() if x.requires_grad]
            adapter = self.model is not self.moe
            super()._save(str(folder), {name: torch.zeros(0) for name in names} if adapter else {})
        if (self.spread or rows_alone) and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        self.save_record(folder)
        write_arguments(self.args, folder)

    @property
    def trained_model(self) -> nn.Module:
        """With the names of its weights, whatever is around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def spread(self) -> bool:
        """Whether Transformers loaded the model in shards, as expert parallelism has it."""
        return getattr(self.moe.config, "distributed_config", None) is not None

    @property
    def in_8_bits(self) -> bool:
        """Whether the optimizer is torchao's, whose moments have 8 bits."""
        return self.args.optim == OptimizerNames.ADAMW_TORCH_8BIT

    @property
    def in_parts(self) -> bool:
        """Whether each process writes its part of the optimizer: of moments in 8 bits FSDP2 restores no others."""
        return self.spread or (self.is_fsdp_enabled and self.in_8_bits)

    def optimizer_in_parts(self) -> AbstractContextManager[None]:
        """While the host saves or loads the rest of a checkpoint."""
        if not self.in_parts:
            return nullcontext()
        return sharded_optimizer(partial(save_optimizer, self), partial(load_optimizer, self))

    @property
    def casts(self) -> bool:
        """Whether what is saved has another type than what trains: of an adapter, never."""
        return self.saved_dtype is not None and self.model is self.moe

    def saving_cast(self) -> AbstractContextManager[None]:
        """Where the host gathers the weights while it saves them, they are cast then."""
        if not (self.casts and self.spread):
            return nullcontext()
        return gathering_as(self.moe, partial(cast, dtype=self.saved_dtype, model=self.moe))

    def state_to_save(self, state_dict: dict | None) -> dict | None:
        if not self.casts or self.spread:
            return state_dict
        return cast(self.model.state_dict() if state_dict is None else state_dict, self.saved_dtype, self.moe)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restore every weight of the checkpoint; raises ValueError if one is missing, or the folder is.

        The Trainer's own way leaves experts that Transformers stores one by one as they are, with a warning
        (https://github.com/huggingface/transformers/issues/48805).
        """
        if not Path(resume_from_checkpoint).is_dir():  # a name that Transformers would look for on the Hub
            raise ValueError(f"resume_from_checkpoint: there is no folder {resume_from_checkpoint}.")
        model = self.model if model is None else model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif model is not base_model(model):
            check_adapter(resume_from_checkpoint, model)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.selection_bias.copies:
                load_router_bias(model, resume_from_checkpoint)
        elif chosen_experts(model):
            load_rows(model, resume_from_checkpoint)
            if self.selection_bias.copies:
                load_router_bias(model, resume_from_checkpoint)
        elif isinstance(model, PreTrainedModel):
            shards = {"distributed_config": model.config.distributed_config} if self.spread else {}
            saved = whole_model(resume_from_checkpoint, type(model), config=model.config, dtype=model.dtype, **shards)
            model.load_state_dict(saved.state_dict())
            del saved
            gc.collect()  # one in shards refers to itself, and would keep its memory
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.selection_bias.remember()
        if self.average is not None:
            self.average.load(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.spread:
            save_state(self, output_dir)
            return
        with self.optimizer_in_parts():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # or the first says that the checkpoint is complete before it is

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Raises ValueError where the checkpoint's optimizer has other weights, or is of another kind.

        Over the second, only a step would stumble. Also where the run was told what the checkpoint's state will not
        do, as `check_same_arguments`; what it was told beside that is said.
        """
        if checkpoint is not None:
            check_optimizer(checkpoint)
            check_same_arguments(checkpoint, self.args)
            check_same_step(checkpoint, self.args)
            check_parts(checkpoint, self.in_parts)
            if self.is_world_process_zero():
                say_differences(checkpoint, self.args)
        needed = [set(group) for group in self.optimizer.param_groups]
        try:
            if checkpoint is not None:
                self.restore_state(checkpoint)
        except ValueError as error:
            raise ValueError(
                f"{checkpoint} is of a run that trained other weights ({error}): choose what trains as it was, or "
                "start a new run from its weights."
            ) from error
        for names, group in zip(needed, self.optimizer.param_groups, strict=True):
            if lacking := sorted(names - group.keys()):
                raise ValueError(
                    f"{checkpoint} is of a run with another optimizer, which has no {lacking[0]}: give --optim as it "
                    "was, or start a new run from its weights."
                )

    def restore_state(self, checkpoint: str) -> None:
        """Optimizer and schedule as they were. Raises ValueError where the checkpoint has none of these weights."""
        if self.spread:
            load_state(self, checkpoint)
            return
        with self.optimizer_in_parts():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        if self.average is not None:
            self.average.wait()  # for the weights that are to go
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            if self.average is not None:
                self.average.load(self.state.best_model_checkpoint, self.trained_model)
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
