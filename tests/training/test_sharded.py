"""Experts that are sharded before Accelerate shards the rest have the rest's layout."""

from types import SimpleNamespace

import pytest
import torch
from hf_moe.training.trainers import sharded

from hf_moe.routers import find_routers

from .models import hf_moe


class Mesh:
    def __getitem__(self, names):
        return "of " + ", ".join(names)


@pytest.mark.parametrize(("mesh", "expected"), [(None, None), (Mesh(), "of dp_replicate, dp_shard")])
def test_experts_are_on_the_mesh_of_the_rest(monkeypatch, mesh, expected):
    model, given = hf_moe(), []
    model.set_experts_implementation("eager")
    monkeypatch.setattr(sharded, "fully_shard", lambda module, **kwargs: given.append((module, kwargs)))
    plugin = SimpleNamespace(cpu_ram_efficient_loading=False, reshard_after_forward=True, cpu_offload="offload")
    layout = SimpleNamespace(fsdp_dim_names=["dp_replicate", "dp_shard"])
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), torch_device_mesh=mesh, parallelism_config=layout
    )
    args = SimpleNamespace(device=torch.device("cpu"), densemixer=False)
    sharded.shard_experts(SimpleNamespace(args=args, accelerator=accelerator, routers=find_routers(model)))
    assert [module for module, _ in given] == [layer.mlp.experts for layer in model.model.layers]
    assert all(kwargs["mesh"] == expected and kwargs["offload_policy"] == "offload" for _, kwargs in given)
