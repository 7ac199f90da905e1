"""The optimizer of a model that Transformers loaded in shards, as expert parallelism has it: to a checkpoint and back.

Each process writes its part and reads what it needs, so that no process has to hold the whole.
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


def save_state(trainer: Trainer, folder: str) -> None:
    """Optimizer and schedule to the checkpoint `folder`, by all processes together."""
    save_optimizer_distributed(trainer.model, bare_optimizer(trainer), str(Path(folder) / FOLDER))
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), Path(folder) / SCHEDULER_NAME)


def load_state(trainer: Trainer, checkpoint: str) -> None:
    """Optimizer and schedule as they were. Raises ValueError where the checkpoint has none of these weights."""
    try:
        load_optimizer_distributed(trainer.model, bare_optimizer(trainer), str(Path(checkpoint) / FOLDER))
    except CheckpointException as error:
        reason = str(next(iter(error.failures.values()))[0])
        raise ValueError(" ".join(reason.split())) from error
    trainer.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


def check_spread(checkpoint: str, spread: bool) -> None:
    """Raises ValueError where the state in a checkpoint is in parts and the model is not, or the reverse."""
    if (Path(checkpoint) / FOLDER).is_dir() != spread:
        was, now = ("without", "with") if spread else ("with", "without")
        raise ValueError(
            f"{checkpoint} is of a run {was} expert parallelism, and this is one {now} it: give --accelerate and "
            "--expert_parallel_size as they were, or start a new run from its weights."
        )
