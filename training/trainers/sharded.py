"""FSDP2: experts travel in the type that they are computed in, and what is gathered serves a whole step."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from hf_moe.kernels.copies import travelling
from hf_moe.kernels.experts import autocasts

from ..balance.moe_arguments import moe_argument
from .copies import ROOM


def shard_experts(trainer) -> None:
    """Shard the trainer's experts before Accelerate does the rest: gathered in bf16, gradients summed in float32.

    For float32 experts in training that autocast casts in each forward. Numbers are the same; half as much is sent,
    and no forward casts.
    """
    plugin, device = trainer.accelerator.state.fsdp_plugin, trainer.args.device.type
    mesh, layout = trainer.accelerator.torch_device_mesh, trainer.accelerator.parallelism_config
    if moe_argument(trainer.args, "densemixer") or plugin.cpu_ram_efficient_loading:
        return  # the one reads weights elsewhere, the other has none yet
    for router in trainer.routers.values():
        experts = getattr(router.layer, "experts", None)
        if experts is not None and (policy := policy_of(experts, device)) is not None:
            fully_shard(
                experts,
                mesh=None if mesh is None else mesh[tuple(layout.fsdp_dim_names)],
                mp_policy=policy,
                reshard_after_forward=plugin.reshard_after_forward,
                offload_policy=plugin.cpu_offload,
            )


def policy_of(module: nn.Module, device: str) -> MixedPrecisionPolicy | None:
    """Of a module that holds matrices of experts in float32 and nothing else, all trained, which autocast casts."""
    held, own = list(module.parameters()), list(module.parameters(recurse=False))
    plain = all(x.dim() == 3 and x.dtype == torch.float32 and x.requires_grad for x in own)
    if not plain or not 0 < len(held) == len(own) or not autocasts(module, torch.bfloat16, device):
        return None
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


class Gathered:
    """Weights that stay whole on every process from a step's first forward to its last backward.

    FSDP2 lets go of them after each forward and each backward: with several micro-batches, or layers that are computed
    again, they are sent many times over.
    """

    def __init__(self, model: FSDPModule):
        self.model = model

    def begin(self) -> None:
        """Weights stand still from here on."""
        self.model.set_reshard_after_forward(False)
        self.model.set_reshard_after_backward(False)

    def last(self) -> None:
        """The backward to come is the step's last."""
        self.model.set_reshard_after_backward(True)

    def end(self) -> None:
        """They are about to move; what has no backward, as evaluation, keeps nothing."""
        self.model.set_reshard_after_forward(True)


def gathered(trainer) -> Gathered | None:
    """Of the trainer's model, or None where it is not sharded by FSDP2, or there is no room for the whole of it."""
    model, args = trainer.model, trainer.args
    if not isinstance(model, FSDPModule) or not fits(model, args.device):
        return None
    return Gathered(model)


def fits(model: nn.Module, device: torch.device) -> bool:
    """Whether the card holds the weights beside their shards, whole gradients, Adam's moments, and activations."""
    if device.type != "cuda":
        return True
    shards = [x.to_local() if hasattr(x, "to_local") else x for x in model.parameters()]
    held = sum(x.numel() * (16 if x.requires_grad else x.element_size()) for x in shards)
    gradients = sum(4 * x.numel() for x in model.parameters() if x.requires_grad)
    left = torch.cuda.get_device_properties(device).total_memory - held - gradients
    return travelling(model) <= ROOM * left
