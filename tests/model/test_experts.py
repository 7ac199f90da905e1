"""Eager against a plain loop, and the host's faster implementations against eager, forward and backward."""

import pytest
import torch
from torch.nn import functional as F

from hf_moe.model.modeling_hf_moe import HfMoeSparseMoeBlock
from tests.conftest import tiny_config, tiny_model, tokens

KINDS = {
    "gated": {},
    "plain": {"gated_mlp": False, "hidden_act": "gelu"},
    "gated-bias": {"mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    "plain-bias": {"gated_mlp": False, "mlp_bias": True, "hidden_act": "relu2"},
}


def block(kind: str, dtype=torch.float32, **changes) -> HfMoeSparseMoeBlock:
    config = tiny_config(**KINDS[kind], **changes)
    config._experts_implementation = "eager"
    moe = HfMoeSparseMoeBlock(config, layer_idx=0)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe.to(dtype)


def loop(moe, x, index, weights):
    """sum_k w_k FFN_k(x), one token and one slot at a time, in float64."""
    experts = {name: parameter.double() for name, parameter in moe.experts.named_parameters()}
    zero = torch.zeros(1, dtype=torch.float64)
    output = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for e, w in zip(index[t].tolist(), weights[t].double(), strict=True):
            if e == moe.experts.num_experts:
                continue
            if moe.experts.has_gate:
                bias = experts["gate_up_proj_bias"][e] if moe.experts.has_bias else zero
                gate, up = (experts["gate_up_proj"][e] @ x[t].double() + bias).chunk(2)
                hidden = moe.experts.act_fn(gate) * up
            else:
                bias = experts["up_proj_bias"][e] if moe.experts.has_bias else zero
                hidden = moe.experts.act_fn(experts["up_proj"][e] @ x[t].double() + bias)
            bias = experts["down_proj_bias"][e] if moe.experts.has_bias else zero
            output[t] += w * (experts["down_proj"][e] @ hidden + bias)
    return output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 23])
def test_eager_is_the_formula(kind, T):
    moe = block(kind)
    x, weights = torch.randn(T, 48), torch.rand(T, 3)
    index = torch.randint(0, 8, (T, 3))  # 7 stands for an expert on another rank
    torch.testing.assert_close(moe.experts(x, index, weights), loop(moe, x, index, weights).float())


def run(moe, x, index, weights, implementation):
    moe.experts.config._experts_implementation = implementation
    moe.zero_grad()
    x, weights = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    output = moe.experts(x, index, weights)
    output.float().square().sum().backward()
    grads = {name: parameter.grad for name, parameter in moe.experts.named_parameters()}
    return {"output": output, "x": x.grad, "weights": weights.grad, **grads}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_implementations_agree(kind, implementation, dtype):
    moe = block(kind, dtype)
    x, weights = torch.randn(23, 48, dtype=dtype), torch.rand(23, 3)
    index = torch.stack([torch.randperm(6)[:3] for _ in range(23)])  # expert 6 stays empty
    reference = run(moe.float(), x.float(), index, weights, "eager")
    eager = run(moe.to(dtype), x, index, weights, "eager")
    fast = run(moe, x, index, weights, implementation)
    for name, expected in reference.items():
        if dtype == torch.float32:
            torch.testing.assert_close(fast[name], expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        else:  # as close to float32 as eager is, within a factor
            scale = expected.norm() + 1e-6
            eager_error = (eager[name].float() - expected).norm() / scale
            assert (fast[name].float() - expected).norm() / scale <= 2 * eager_error + 1e-3, name


def test_rows_that_grouped_mm_cannot_read_run_eager():
    model = tiny_model(hidden_size=99, head_dim=6, moe_intermediate_size=23)
    assert model.config._experts_implementation == "eager"
    assert model(tokens()).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"hidden_size \(99\) in torch.float32 is no multiple of 16 bytes"):
        model.set_experts_implementation("grouped_mm")


def test_float64_runs_eager(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    double = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(double(tokens()).logits.float(), model(tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True], ids=["", "sigmoid-gate"])
def test_shared_experts_are_a_sum_of_small_ones(gated):
    moe = block("gated", n_shared_experts=3, shared_expert_intermediate_size=10, shared_expert_gate=gated)
    x = torch.randn(2, 5, 48)
    tokens = x.view(10, 48)
    _, weights, index, *_ = moe.gate(tokens)
    shared = moe.shared_experts
    expected = torch.zeros(10, 48)
    for rows in torch.arange(30).split(10):
        hidden = F.silu(tokens @ shared.gate_proj.weight[rows].T) * (tokens @ shared.up_proj.weight[rows].T)
        expected += hidden @ shared.down_proj.weight[:, rows].T
    if gated:
        expected *= torch.sigmoid(tokens @ moe.shared_expert_gate.weight.T)
    expected += loop(moe, tokens, index, weights).float()
    torch.testing.assert_close(moe(x).view(10, 48), expected)


def test_the_router_computes_in_float32_in_a_bf16_model_and_under_autocast():
    moe = block("gated", torch.bfloat16)
    x = torch.randn(9, 48, dtype=torch.bfloat16)
    logits, weights, *_ = moe.gate(x)
    assert logits.dtype == weights.dtype == torch.float32
    assert torch.equal(logits, x.float() @ moe.gate.weight.float().T)
    moe = block("gated")
    x = torch.randn(9, 48)
    expected = moe.gate(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(moe.gate(x)[0], expected)


def test_the_selection_bias_stays_float32():
    moe = block("gated", router_type="sigmoid_topk", router_args={"selection_bias": True})
    assert "gate.e_score_correction_bias" in moe.state_dict()
