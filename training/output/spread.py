"""An optimizer in shards to a checkpoint and back: of a model that Transformers loaded so, and 8-bit Adam under FSDP2.

Of the others under FSDP2 the host makes a whole one in each checkpoint. Here each process writes its part and reads
what it needs, so that no process has to hold the whole.
"""

from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from transformers import Trainer
from transformers.distributed import load_optimizer_distributed, save_optimizer_distributed

from ..host import SCHEDULER_NAME, bare_optimizer

FOLDER = "optimizer"


def leave_out_empty_groups(optimizer: torch.optim.Optimizer) -> None:
    """Those without a weight, as an adapter's without weight decay: PyTorch asks each group for its first."""
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def save_optimizer(trainer: Trainer, folder: str) -> None:
    """To the checkpoint `folder`, by all processes together."""
    save_optimizer_distributed(trainer.model, bare_optimizer(trainer), str(Path(folder) / FOLDER))


def save_state(trainer: Trainer, folder: str) -> None:
    """Optimizer and schedule to the checkpoint `folder`, by all processes together."""
    save_optimizer(trainer, folder)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), Path(folder) / SCHEDULER_NAME)


def load_optimizer(trainer: Trainer, checkpoint: str) -> None:
    """As it was. Raises ValueError where the checkpoint has none of these weights."""
    try:
        load_optimizer_distributed(trainer.model, bare_optimizer(trainer), str(Path(checkpoint) / FOLDER))
    except CheckpointException as error:
        reason = str(next(iter(error.failures.values()))[0])
        raise ValueError(" ".join(reason.split())) from error


def load_state(trainer: Trainer, checkpoint: str) -> None:
    """Optimizer and schedule as they were. Raises ValueError as `load_optimizer`."""
    load_optimizer(trainer, checkpoint)
    trainer.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


def check_parts(checkpoint: str, in_parts: bool) -> None:
    """Raises ValueError where a checkpoint has its optimizer in parts and the run's is whole, or the reverse."""
    if (Path(checkpoint) / FOLDER).is_dir() != in_parts:
        was, now = ("whole", "in parts") if in_parts else ("in parts", "whole")
        raise ValueError(
            f"{checkpoint} has its optimizer {was}, and this run would read it {now}: give --accelerate, "
            "--expert_parallel_size and --optim as they were, or start a new run from its weights."
        )
