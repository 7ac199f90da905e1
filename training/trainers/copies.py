"""When a run makes copies of its weights in what it computes in: of experts if it would often, and in FP8."""

import torch
from accelerate.utils import DistributedType
from torch import nn

from hf_moe.kernels.copies import Copies, copied
from hf_moe.kernels.fp8.copies import BlockCopies

from ..weights.fp8 import weights_in_fp8

PLAIN = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)  # others move weights about
ROOM = 0.5  # of what weights, gradients and Adam's moments leave of the card: the rest is for activations


def copies_of(trainer) -> Copies | None:
    """Of the trainer's experts, or None where a step uses each weight once, or there is no room for copies."""
    args, model = trainer.args, trainer.model
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if dtype is None or trainer.accelerator.distributed_type not in PLAIN:
        return None
    in_blocks = {id(x) for x in weights_in_fp8(model)}
    weights = copied(model, args.gradient_accumulation_steps, args.gradient_checkpointing)
    weights = [x for x in weights if id(x) not in in_blocks]
    alone = trainer.accelerator.distributed_type == DistributedType.NO
    return Copies(weights, dtype, sums=alone) if weights and fit(weights, model, args.device, dtype) else None


def block_copies_of(trainer) -> BlockCopies | None:
    """Of what the trainer's model multiplies with in FP8, or None where there is nothing, or no room for it.

    Nor where a step uses weights in one forward and one backward: to quantise them twice takes less than to hold them.
    """
    args, model = trainer.args, trainer.model
    weights = [x for x in weights_in_fp8(model) if type(x) is nn.Parameter]
    once = args.gradient_accumulation_steps == 1 and not args.gradient_checkpointing
    if once or not weights or trainer.accelerator.distributed_type not in PLAIN:
        return None
    # Two orientations of a byte each: as many bytes as bfloat16.
    return BlockCopies(weights) if fit(weights, model, args.device, torch.bfloat16) else None


def fit(weights: list[nn.Parameter], model: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda":
        return True
    trained = sum(4 * x.numel() for x in model.parameters() if x.requires_grad)
    stored = sum(x.numel() * x.element_size() for x in model.parameters())
    left = torch.cuda.get_device_properties(device).total_memory - stored - 3 * trained
    return sum(x.numel() for x in weights) * dtype.itemsize <= ROOM * left
