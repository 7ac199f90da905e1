"""What an experts module computes is found by numbers, in every mixture of experts of the installed Transformers."""

import pytest
import torch
from torch.nn import functional as F

from hf_moe.kernels import experts as implementation
from hf_moe.kernels.formula import Formula, formula
from tests.families import EXPERTS, FAMILIES, NO_INTERFACE, NOT_FOR, tiny


class Experts(torch.nn.Module):
    """A module of experts that has nothing but its gate."""

    has_gate, is_transposed, has_post_expert_norm = True, False, False

    def __init__(self, gate, interleaved=False):
        super().__init__()
        self.gate, self.interleaved, self.act_fn = gate, interleaved, gate

    def _apply_gate(self, gate_up):
        parts = (gate_up[..., ::2], gate_up[..., 1::2]) if self.interleaved else gate_up.chunk(2, dim=-1)
        return self.gate(*parts)


KNOWN = {
    "act(gate) up": (lambda gate, up: F.gelu(gate) * up, Formula("gelu")),
    "in float32": (lambda gate, up: (F.silu(gate.float()) * up.float()).to(gate.dtype), Formula("silu")),
    "DeepSeek-V4": (
        lambda gate, up: F.silu(gate.clamp(max=10)) * up.clamp(-10, 10),
        Formula("silu", limit=10.0),
    ),
    "gpt-oss": (
        lambda gate, up: (up.clamp(-7, 7) + 1) * gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=7)),
        Formula("quick_gelu", limit=7.0, shift=1.0),
    ),
    "a small limit": (
        lambda gate, up: F.silu(gate.clamp(max=0.05)) * up.clamp(-0.05, 0.05),
        Formula("silu", limit=0.05),
    ),
    "a shift alone": (lambda gate, up: F.relu(gate).square() * (up - 0.5), Formula("relu2", shift=-0.5)),
}
UNKNOWN = {
    "another slope": lambda gate, up: (up + 1) * gate * torch.sigmoid(1.5 * gate),
    "a limit after the activation": lambda gate, up: F.silu(gate).clamp(max=7) * up.clamp(-7, 7),
    "a limit of gate alone": lambda gate, up: F.silu(gate.clamp(max=7)) * up,
    "two limits": lambda gate, up: F.silu(gate.clamp(max=7)) * up.clamp(-5, 5),
    "a limit above only": lambda gate, up: F.silu(gate.clamp(max=7)) * up.clamp(max=7),
    "a product of squares": lambda gate, up: F.silu(gate) * up.square(),
    "none": lambda gate, up: gate * 0 + up * 0,
}


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(("gate", "expected"), KNOWN.values(), ids=KNOWN)
def test_gates(gate, expected, interleaved):
    assert formula(Experts(gate, interleaved)) == expected._replace(interleaved=interleaved)


@pytest.mark.parametrize("gate", UNKNOWN.values(), ids=UNKNOWN)
def test_gates_that_the_kernels_do_not_know(gate):
    assert formula(Experts(gate)) is None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts_of_every_family_run_in_the_kernels(model_type, device, monkeypatch):
    """Output and every gradient of one layer's experts, beside their own code."""
    model = tiny(model_type).to(device)
    experts = next((x for x in model.modules() if hasattr(x, "has_gate")), None)
    assert (experts is None) == (model_type in NO_INTERFACE)
    if experts is None:
        return
    fallbacks = []
    monkeypatch.setattr(implementation, "warn", lambda reason, other: fallbacks.append(reason))
    generator = torch.Generator().manual_seed(1)
    width = experts.down_proj.shape[2 if experts.is_transposed else 1]
    x = torch.randn(5, width, generator=generator).to(device).requires_grad_()
    index = torch.randint(0, EXPERTS, (5, 2), generator=generator).to(device)
    weights = torch.rand(5, 2, generator=generator).to(device).requires_grad_()
    found = []
    for name in ("eager", "hf_moe"):
        model.set_experts_implementation(name)
        output = experts(x, index, weights)
        leaves = [x, weights, *experts.parameters()]
        found.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    torch.testing.assert_close(*reversed(found), rtol=1e-4, atol=1e-5)
    assert bool(fallbacks) == (model_type in NOT_FOR["kernels"])
