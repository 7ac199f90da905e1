"""Micro-batches run ahead for training, their graphs held until they go back: a step is counted with no forward more.

Only where activation checkpointing keeps little of a forward, and as far as there is memory.
"""

from collections.abc import Callable, Iterator

import psutil
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_moe.kernels.copies import travelling

from ..balance.step import Forward
from .copies import PLAIN, ROOM


def held_forwards(
    trainer, model: nn.Module, forward: Callable[[dict], Forward], batches: list[dict]
) -> Iterator[Forward]:
    """Forwards of a step's first micro-batches: of all if by the first they fit beside each other, else of that."""
    if not can_hold(trainer, model):
        return
    device = trainer.args.device
    before = USED[device.type](device)
    first = forward(batches[0])
    taken = USED[device.type](device) - before
    if trainer.gathered is not None:  # for all of them
        taken -= travelling(trainer.model)
    yield first
    if fit(trainer, taken * sum(size(batch) for batch in batches[1:]) / size(batches[0])):
        yield from map(forward, batches[1:])


def can_hold(trainer, model: nn.Module) -> bool:
    """Compiled graphs and offloaded activations are made for a forward and a backward in turn, as is what DeepSpeed
    and the first FSDP do."""
    args, accelerator = trainer.args, trainer.accelerator
    offloads = getattr(args, "activation_offloading", False)
    if not args.gradient_checkpointing or args.torch_compile or offloads:
        return False
    if args.device.type not in USED or trainer.is_model_parallel:  # nobody looked how much memory there is
        return False
    if isinstance(model, DistributedDataParallel):  # the first forward is not to sum gradients, nor to look for unused
        return not (model.require_backward_grad_sync or model.find_unused_parameters or model.static_graph)
    return accelerator.distributed_type in PLAIN or accelerator.is_fsdp2


def fit(trainer, needed: float) -> bool:
    """Whether every process has that much room."""
    device = trainer.args.device
    gradients = sum(x.nbytes for x in trainer.model.parameters() if x.requires_grad)  # whole, also under FSDP2
    to_come = gradients * (1 if trainer.optimizer.state else 3)  # and Adam's moments
    lacks = needed > ROOM * (FREE[device.type](device) - to_come)
    if trainer.accelerator.num_processes == 1:
        return not lacks
    return not trainer.accelerator.reduce(torch.tensor(float(lacks), device=device), reduction="sum").item()


def size(batch: dict) -> int:
    return sum(x.nbytes for x in batch.values() if isinstance(x, torch.Tensor))


def free_on_card(device: torch.device) -> int:
    """What the driver could give, and what PyTorch has and does not use."""
    return (
        torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    )


# Type of a device -> bytes in use by this process, and bytes that it may yet have.
USED = {"cpu": lambda device: psutil.Process().memory_info().rss, "cuda": torch.cuda.memory_allocated}
FREE = {"cpu": lambda device: psutil.virtual_memory().available, "cuda": free_on_card}
