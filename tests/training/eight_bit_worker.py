"""A compiled step of torchao's 8-bit Adam on a weight that FSDP2 shards, and on the same in one process."""

import torch
from hf_moe.training.host import keep_dtype_in_views
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchao.optim import AdamW8bit

from tests.processes import leave


def step(model: nn.Module) -> None:
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    model(torch.ones(3, 64, dtype=torch.bfloat16)).square().mean().backward()
    optimizer.step()


def main():
    torch.manual_seed(0)
    whole = nn.Linear(64, 128, bias=False, dtype=torch.bfloat16)
    sharded = nn.Linear(64, 128, bias=False, dtype=torch.bfloat16)
    sharded.load_state_dict(whole.state_dict())
    torch.distributed.init_process_group("gloo")
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    keep_dtype_in_views()
    step(sharded)
    step(whole)
    same = [None, None]
    torch.distributed.all_gather_object(same, torch.equal(sharded.weight.full_tensor(), whole.weight))
    leave(same)


if __name__ == "__main__":
    main()
