"""Run by torchrun on two processes: a model with Liger's kernels, sharded by FSDP2, against one without either."""

import sys
from types import ModuleType, SimpleNamespace

import torch
from torch.distributed.fsdp import fully_shard

from hf_moe.kernels.liger import apply_liger_kernel_to_hf_moe
from tests.conftest import tiny_model
from tests.processes import leave


def stand_in(x, weight, eps, offset, rounding, in_place):
    """What Liger's norm computes, whose own kernel needs a GPU; it wants the whole weight."""
    assert type(weight.data) is torch.Tensor and not in_place
    normed = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (offset + weight) * normed


def main():
    norms = ModuleType("liger_kernel.ops.rms_norm")
    norms.LigerRMSNormFunction = SimpleNamespace(apply=stand_in)
    sys.modules |= {"liger_kernel": ModuleType("liger_kernel"), "liger_kernel.ops": ModuleType("liger_kernel.ops")}
    sys.modules["liger_kernel.ops.rms_norm"] = norms
    torch.distributed.init_process_group("gloo")
    worst = {}
    for name, changes in {"Llama's norms": {}, "Gemma's norms": {"rms_norm_unit_offset": True}}.items():
        ids = torch.arange(1, 23).view(2, 11)
        plain, model = tiny_model(**changes).train(), tiny_model(**changes).train()
        apply_liger_kernel_to_hf_moe(model, rope=False, fused_linear_cross_entropy=False)
        for part in (*model.model.layers, model.model.norm, model):  # a norm of its own class, too
            fully_shard(part)
        expected, actual = (x(ids, labels=ids).loss for x in (plain, model))
        expected.backward(), actual.backward()
        worst[name] = [(actual - expected).abs().item()]
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            if other.grad is not None:
                worst[name].append((one.grad.full_tensor() - other.grad).abs().max().item())
    leave({name: max(found) for name, found in worst.items()})


main()
