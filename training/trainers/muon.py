"""Muon for matrices, those of fused experts among them, and AdamW for the rest.

Muon (https://kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest orthogonal one, by
five Newton-Schulz iterations in bfloat16. Moonlight (https://arxiv.org/abs/2502.16982, 2.2) scales the update of an
[A, B] matrix by 0.2 sqrt(max(A, B)), so that learning rate and weight decay are AdamW's, and leaves embeddings, the
head, norms and biases to AdamW.

Fused experts [E, 2 I, D] are E gates and E up projections, each a matrix of its own: what torch.optim.Muon makes of
them one by one is what is made here of all at once. Where gate and up are interleaved (gpt-oss) an expert's two are
orthogonalised as one matrix, and so where weights are transposed (Llama 4).
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import AdamW
from transformers import Trainer

from hf_moe.kernels.formula import formula

MOMENTUM, STEPS, EPS = 0.95, 5, 1e-7
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@torch.no_grad()
def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """U V^T of each matrix U S V^T in [..., A, B], but for singular values between 0.5 and 1.5; in bfloat16."""
    a, b, c = COEFFICIENTS
    x = matrices.reshape(-1, *matrices.shape[-2:]).bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def update_of(momentum: torch.Tensor, halves: bool) -> torch.Tensor:
    """What a parameter moves by, but for the learning rate: of a whole tensor [..., A, B], or of whole experts."""
    x = momentum.unflatten(-2, (2, -1)) if halves else momentum
    scale = 0.2 * max(x.shape[-2:]) ** 0.5
    update = scale * orthogonal(x) if x.numel() else x
    return update.flatten(-3, -2) if halves else update


class Muon(AdamW):
    """AdamW, but for groups with `muon`: their matrices move by Muon, whose one moment is `momentum_buffer`.

    Groups with `halves` hold tensors of gates and up projections. Weights sharded in whole experts are moved where
    they are; of others each process orthogonalises the whole momentum, and moves its part.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.move(parameter, group)
        return loss

    def move(self, parameter: torch.Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # as AdamW's, which looks for it when a state is loaded
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        state["step"] += 1
        state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
        nesterov = parameter.grad.lerp(state["momentum_buffer"], MOMENTUM)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(by_shards(nesterov, group["halves"]), alpha=-group["lr"])


def by_shards(momentum: torch.Tensor, halves: bool) -> torch.Tensor:
    """`update_of`, of what may be sharded."""
    if not isinstance(momentum, DTensor):
        return update_of(momentum, halves)
    if momentum.dim() > 2 and all(isinstance(x, Shard) and x.dim == 0 for x in momentum.placements):
        update = update_of(momentum.to_local(), halves)
        return DTensor.from_local(
            update, momentum.device_mesh, momentum.placements, shape=momentum.shape, stride=momentum.stride()
        )
    update = update_of(momentum.full_tensor(), halves)
    return distribute_tensor(update, momentum.device_mesh, momentum.placements, src_data_rank=None)


def is_stacked(module: nn.Module) -> bool:
    """Whether it is experts whose gate_up_proj has a gate's rows, then an up projection's."""
    found = formula(module) if getattr(module, "has_gate", False) else None
    return found is not None and not found.transposed and not found.interleaved


def muon_of(trainer: Trainer, model: nn.Module) -> Muon:
    """The optimizer of a trainer's arguments.

    Raises ValueError where DeepSpeed has flattened the weights.
    """
    args = trainer.args
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "optim muon needs whole matrices, which DeepSpeed flattens: use --accelerate fsdp2, or AdamW."
        )
    decayed = set(trainer.get_decay_parameter_names(model))
    halves = {id(x.gate_up_proj) for x in model.modules() if is_stacked(x)}
    beside = {id(x.weight) for x in (model.get_input_embeddings(), model.get_output_embeddings()) if x is not None}
    groups: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            muon = parameter.dim() > 1 and id(parameter) not in beside and not name.endswith("bias")
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None  # one call of AdamW for each
            key = (muon, id(parameter) in halves, name in decayed, mesh)
            groups.setdefault(key, []).append(parameter)
    _, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    made = [
        {"params": found, "muon": muon, "halves": cut, "weight_decay": args.weight_decay if decays else 0.0}
        for (muon, cut, decays, _), found in groups.items()
    ]
    return Muon(made, **options)
