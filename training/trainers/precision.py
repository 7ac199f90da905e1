"""The precision of sharded runs: that of one process."""

import torch
from accelerate import Accelerator
from torch import nn

from ..host import autocast_forward


def keep_precision(accelerator: Accelerator, model: nn.Module) -> bool:
    """FSDP2 in bf16 as exact as one process: weights as they are stored, sums in float32, autocast as everywhere.

    Accelerate's policy casts all weights, the router's too, and rounds the sums over processes and the loss itself to
    bf16. A policy of the user's own stays. Returns whether it is so; then `shard_experts` has most of the weights
    travel in bf16 still.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if policy is None or plugin.fsdp_version != 2 or not policy.param_dtype == policy.reduce_dtype == torch.bfloat16:
        return False
    plugin.mixed_precision_policy = None
    autocast_forward(accelerator, model)
    return True
