"""set_experts_implementation("hf_moe") on our models and on Transformers' own, beside "eager"."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import transformers
import triton
from torch.utils.checkpoint import checkpoint

from hf_moe.kernels import auto, feed_forward
from hf_moe.kernels import experts as implementation
from hf_moe.kernels.formula import Formula
from hf_moe.kernels.low_rank import beside
from hf_moe.kernels.operators import experts_up
from hf_moe.kernels.recomputation import Selective
from tests.conftest import tiny_model, tokens

SIZES = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
FINE = SIZES | {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
THEIRS = {
    "Mixtral": SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Olmoe": SIZES | {"num_experts": 3, "num_experts_per_tok": 2},
    "Qwen3Moe": FINE | {"num_experts": 3, "head_dim": 8},
    "GptOss": SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
    "DeepseekV3": FINE | MLA | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
}
OURS = {
    "gated": {},
    "plain-bias": {"gated_mlp": False, "mlp_bias": True, "hidden_act": "gelu"},
    "shared": {"n_shared_experts": 1},
    "clamped": {"experts_swiglu_limit": 0.05, "mlp_bias": True},
}


def gradients(model, name, ids):
    model.set_experts_implementation(name)
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return {"logits": out.logits.detach()} | {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def agree(model, device):
    model.to(device).train()
    ids = tokens(1, 7).to(device)
    expected, actual = gradients(model, "eager", ids), gradients(model, "hf_moe", ids)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture
def no_fallback(monkeypatch):
    def refuse(reason, other):
        raise AssertionError(f"fell back: {reason}")

    monkeypatch.setattr(implementation, "warn", refuse)


@pytest.mark.parametrize("family", THEIRS)
def test_models_of_transformers(device, no_fallback, family):
    config = getattr(transformers, f"{family}Config")(**THEIRS[family])
    torch.manual_seed(1)
    agree(getattr(transformers, f"{family}ForCausalLM")(config), device)


@pytest.mark.parametrize("variant", OURS)
def test_our_models(device, no_fallback, variant):
    changes = {"num_hidden_layers": 1, "mlp_layer_types": ["sparse"], "num_experts": 3, "num_experts_per_tok": 2}
    agree(tiny_model(hidden_size=24, moe_intermediate_size=9, **changes, **OURS[variant]), device)


def layer(device, dtype=torch.float32, **changes):
    """One layer's experts, and inputs for them."""
    model = tiny_model(num_experts=2, num_experts_per_tok=2, hidden_size=24, moe_intermediate_size=8, **changes)
    experts = model.model.layers[1].mlp.experts.to(device, dtype)
    experts.config._experts_implementation = "hf_moe"
    x = torch.randn(6, 24).to(device, dtype).requires_grad_()
    index, weights = torch.randint(0, 2, (6, 2)).to(device), torch.rand(6, 2).to(device).requires_grad_()
    return experts, (x, index, weights)


def step(function, arguments):
    """Output and the gradients of x and the weights."""
    output = function(*arguments)
    return output, *torch.autograd.grad(output.square().sum(), [arguments[0], arguments[2]])


def test_compiles_as_one_graph(device, no_fallback):
    experts, arguments = layer(device)
    expected = step(experts, arguments)
    actual = step(torch.compile(experts, fullgraph=True, backend="aot_eager"), arguments)
    torch.testing.assert_close(actual, expected)


def test_gradient_checkpointing(device, no_fallback):
    experts, arguments = layer(device)
    expected = step(experts, arguments)
    actual = step(lambda *inputs: checkpoint(experts, *inputs, use_reentrant=False), arguments)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rank", [0, 2])
def test_checkpointing_computes_again_what_was_kept_alone(device, no_fallback, monkeypatch, rank):
    """The activations and what of them an adapter's gradients need, not the second product."""
    calls = Counter()

    def counted(name, function):
        return lambda *given: calls.update([name]) or function(*given)

    for name in ("up", "narrowed", "down"):
        monkeypatch.setattr(feed_forward, name, counted(name, getattr(feed_forward, name)))
    experts, (x, index, weights) = layer(device)
    count, size, inner = experts.down_proj.shape
    lhs, rhs = (
        torch.randn(count, *shape, device=device, requires_grad=True) for shape in ((size, rank), (rank, inner))
    )
    with beside(experts, "down_proj", lhs, rhs, 1.0) if rank else nullcontext():
        checkpoint(experts, x, index, weights, use_reentrant=False).sum().backward()
    assert calls == {"up": 2, "down": 1} | ({"narrowed": 2} if rank else {})


@pytest.mark.parametrize("rank", [0, 2])
def test_selective_checkpointing_computes_no_product_again(device, no_fallback, monkeypatch, rank):
    """What follows needs the output again, and so all of the experts; their activations are not kept for it."""
    calls, modes, selective = Counter(), [], Selective()

    def counted(name, function):
        return lambda *given: calls.update([name]) or function(*given)

    def contexts():
        modes.append(found := selective.contexts())
        return found

    experts, arguments = layer(device)
    count, size, inner = experts.down_proj.shape
    lhs, rhs = (
        torch.randn(count, *shape, device=device, requires_grad=True) for shape in ((size, rank), (rank, inner))
    )

    def wave(*inputs):
        return experts(*inputs).sin()

    with beside(experts, "down_proj", lhs, rhs, 1.0) if rank else nullcontext():
        expected = step(wave, arguments)
        for name in ("up", "narrowed", "down"):
            monkeypatch.setattr(feed_forward, name, counted(name, getattr(feed_forward, name)))
        output = checkpoint(wave, *arguments, use_reentrant=False, context_fn=contexts)
        ((keeping, _),) = modes
        activations = keeping.kept[0][2].numel()
        actual = output, *torch.autograd.grad(output.square().sum(), [arguments[0], arguments[2]])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert calls == {"up": 1, "down": 1} | ({"narrowed": 1} if rank else {})
    assert activations == 0


def test_same_bits_every_time(device, no_fallback):
    experts, arguments = layer(device)
    assert all(torch.equal(a, b) for a, b in zip(step(experts, arguments), step(experts, arguments), strict=True))


def test_autocast_computes_in_its_dtype(device, no_fallback):
    experts, arguments = layer(device)
    expected = step(experts, arguments)
    with torch.autocast(device.type, dtype=torch.float16):
        actual = step(experts, arguments)
    assert [value.dtype for value in actual] == [torch.float32] * 3
    for a, b in zip(actual, expected, strict=True):
        assert 0 < (a - b).norm() < 1e-2 * b.norm()


def test_frozen_experts_give_no_gradient(device, no_fallback):
    experts, (x, index, weights) = layer(device)
    expected = step(experts, (x, index, weights))
    torch.testing.assert_close(step(experts.requires_grad_(False), (x, index, weights)), expected)
    assert not experts(x.detach(), index, weights.detach()).requires_grad


def test_what_is_kept_for_the_backward_is_the_up_projection(device, no_fallback):
    experts, (x, index, weights) = layer(device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts(x, index, weights)
    floats = [t.shape for t in kept if t.is_floating_point() and not t.requires_grad]
    assert floats == [(12, 16)]  # 6 tokens, 2 choices; gate and up of 8


def test_slots_of_weight_zero_cost_nothing_without_gradients(device):
    experts, (x, index, weights) = layer(device)
    weights = weights.detach().clone()
    weights[:, 1] = 0
    with torch.no_grad():
        routing = experts_up(
            x,
            index,
            weights,
            experts.gate_up_proj,
            experts.down_proj,
            None,
            None,
            None,
            None,
            None,
            *Formula("silu"),
            False,
        )[6]
    assert routing[0, -1] == 6


REASONS = {
    "activation": ({"hidden_act": "tanh"}, "(Tanh)"),
    "gate": (
        {"experts_swiglu_limit": 7.0, "experts_swiglu_alpha": 1.5},
        "what HfMoeClampedExperts computes",
    ),
}


@pytest.mark.parametrize(("changes", "reason"), REASONS.values(), ids=REASONS)
def test_a_fallback_says_why(device, changes, reason, monkeypatch):
    reasons = []
    monkeypatch.setattr(implementation, "warn", lambda reason, other: reasons.append(reason))
    experts, arguments = layer(device, **changes)
    actual = step(experts, arguments)
    assert len(reasons) == 1 and reason in reasons[0]
    experts.config._experts_implementation = "eager"
    torch.testing.assert_close(actual, step(experts, arguments))


@pytest.mark.parametrize(("size", "dtype"), [(7, torch.float32), (8, torch.float64)], ids=["odd rows", "float64"])
@pytest.mark.parametrize("name", ["hf_moe", "auto"])
def test_a_fallback_computes_what_grouped_mm_cannot(device, monkeypatch, name, size, dtype):
    for module in (implementation, auto):
        monkeypatch.setattr(module, "unusable", lambda device: "need a GPU")
    model = tiny_model(num_hidden_layers=1, mlp_layer_types=["sparse"], moe_intermediate_size=size).to(device, dtype)
    outputs = []
    for implementation_name in ("eager", name):
        model.set_experts_implementation(implementation_name)
        outputs.append(model(tokens(1, 5).to(device)).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


def test_where_the_kernels_cannot_run(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert implementation.unusable("cpu") == "run on a GPU, not on a CPU"
    monkeypatch.setattr(implementation, "find_spec", lambda name: None)
    assert "pip install 'hf_moe[kernels]'" in implementation.unusable("cuda")


def test_lora_on_the_experts(device, no_fallback):
    peft = pytest.importorskip("peft")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = tiny_model(hidden_size=24, moe_intermediate_size=8, num_experts=2, num_experts_per_tok=2)
    lora = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
    model = peft.get_peft_model(model, lora)
    agree(model, device)


def test_auto_takes_the_fastest_that_knows_the_experts(monkeypatch, device):
    experts = tiny_model().to(device).model.layers[-1].mlp.experts
    x = torch.zeros(3, experts.hidden_dim, device=device)
    assert auto.fastest(experts, x) == "hf_moe"
    monkeypatch.setattr(auto, "is_sonicmoe_loadable", lambda: True)
    assert auto.fastest(experts, x) == "hf_moe"  # float32
    assert auto.fastest(experts.bfloat16(), x.bfloat16()) == "sonicmoe"
    experts.config.hidden_act = "quick_gelu"
    assert auto.fastest(experts, x.bfloat16()) == "hf_moe"
    monkeypatch.setattr(auto, "unusable", lambda device: "need a GPU")
    assert auto.fastest(experts, x.bfloat16()) == "grouped_mm"


def test_auto_computes_what_it_names(device):
    model, ids = tiny_model().to(device).eval(), tokens(1, 7).to(device)
    outputs = []
    for name in ("eager", "auto"):
        model.set_experts_implementation(name)
        outputs.append(model(ids).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-5)
