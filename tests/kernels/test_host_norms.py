"""Liger's RMS norm in Transformers' own models: only where it is the module's own, bit by bit on a CPU."""

import pytest
import torch
from torch import nn

from hf_moe.kernels import host_norms
from tests.families import tiny

KINDS = {"olmoe": (0.0, "llama"), "gpt_oss": (0.0, "gemma"), "qwen3_next": (1.0, "gemma"), "cohere2_moe": None}


def norms(model):
    return [module for module in model.modules() if host_norms.may_be_norm(module)]


class Doubled(nn.Module):
    """A norm by its attributes, not by what it computes."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        return 2 * host_norms.rms_norm(x, self.weight, self.eps, *host_norms.KINDS[0])


@pytest.mark.parametrize(("family", "kind"), KINDS.items(), ids=KINDS)
def test_what_a_family_s_norm_computes(family, kind):
    found = norms(tiny(family))
    assert found and {host_norms.kind_of(module) for module in found} == {kind}
    with torch.device("meta"):  # as any other device that is the default
        assert host_norms.kind_of(found[0]) == kind


def test_what_computes_something_else_stays():
    model = nn.Sequential(Doubled(), nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6), nn.Embedding(3, 8), Doubled())
    assert host_norms.kind_of(model[0]) is None
    host_norms.fuse_norms(model)
    assert "forward" not in vars(model[0]) and "forward" not in vars(model[1])


def test_two_types_are_the_module_s_own():
    model = tiny("olmoe")
    states = torch.randn(2, 3, model.config.hidden_size, dtype=torch.bfloat16)
    expected, count = model.model.norm(states), len(norms(model))
    assert host_norms.fuse_norms(model) == count > 0
    assert expected.dtype == torch.float32
    torch.testing.assert_close(model.model.norm(states), expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [name for name, kind in KINDS.items() if kind])
def test_kernel_is_the_module(family, dtype):
    pytest.importorskip("liger_kernel")
    for module in norms(tiny(family))[:3]:
        size = module.weight.numel()
        torch.manual_seed(0)
        module = module.to("cuda", dtype)
        states = torch.randn(3, 7, size, device="cuda", dtype=dtype, requires_grad=True)
        back = torch.randn_like(states)
        weights = (states, module.weight)
        said = module(states)
        expected = torch.autograd.grad(said, weights, back)
        assert host_norms.fuse_norms(module) == 1
        fused = module(states)
        exact = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(fused, said, **exact)
        for actual, gradient in zip(torch.autograd.grad(fused, weights, back), expected, strict=True):
            torch.testing.assert_close(actual, gradient, **exact)
