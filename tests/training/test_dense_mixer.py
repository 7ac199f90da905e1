"""DenseMixer beside the authors' formula, computed expert by expert with autograd."""

import pytest
import torch
from hf_moe.training.balance.dense_mixer import add_dense_mixer, check_dense_mixer
from torch.utils.checkpoint import checkpoint

from hf_moe.routers import find_routers

from .balance_worker import train_one_step
from .models import deepseek_v3, hf_moe, mixtral, olmoe

SHARED = {"n_shared_experts": 1, "shared_expert_intermediate_size": 16}
MODELS = {
    "softmax_topk": lambda: hf_moe(num_experts=7, n_group=1, topk_group=1, num_experts_per_tok=3),
    "normalized": lambda: hf_moe(norm_topk_prob=True, routed_scaling_factor=2.5, **SHARED),
    "topk_softmax": lambda: hf_moe(router_type="topk_softmax"),
    "sigmoid_topk": lambda: hf_moe(
        router_type="sigmoid_topk", norm_topk_prob=True, router_args={"selection_bias": True}
    ),
    "sqrtsoftplus_topk": lambda: hf_moe(router_type="sqrtsoftplus_topk"),
    "capacity": lambda: hf_moe(expert_capacity_factor=0.7),
    "top-1": lambda: hf_moe(num_experts_per_tok=1),
    "every-expert": lambda: hf_moe(num_experts_per_tok=6, n_group=1, topk_group=1),
    "olmoe": olmoe,
    "mixtral": mixtral,
    "deepseek_v3": deepseek_v3,
}


def feed_forward(experts, expert: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
    return experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)


def slow_gradients(layer, inputs: torch.Tensor, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
    """The usual gradient, plus that of a second mixture: of the experts not chosen, which are constants there."""
    seen = {}
    handles = [
        layer.gate.register_forward_hook(lambda module, args, output: seen.update(gate=output)),
        layer.experts.register_forward_pre_hook(lambda module, args: seen.update(chosen=args)),
    ]
    inputs = inputs.clone().requires_grad_()
    output = layer(inputs)
    for handle in handles:
        handle.remove()
    logits = (
        (seen["gate"][0] if isinstance(seen["gate"], tuple) else seen["gate"]).float().view(-1, len(layer.gate.weight))
    )
    sigmoid = getattr(layer.gate, "e_score_correction_bias", None) is not None
    root = getattr(layer.gate, "config", None) and layer.gate.config.router_type == "sqrtsoftplus_topk"
    x, index, weights = seen["chosen"]
    loss = (output * wanted).sum()
    flat = wanted.reshape(len(x), -1)
    for t in range(len(x)):
        scores = logits[t].sigmoid() if sigmoid else logits[t].softmax(-1)
        scores = (1 + logits[t].exp()).log().sqrt() if root else scores
        kept = [(int(e), w) for e, w in zip(index[t], weights[t], strict=True) if w != 0]
        scale = sum(w for _, w in kept).detach() / sum(scores[e] for e, _ in kept).detach() if kept else 0.0
        for expert in set(range(len(scores))) - set(index[t].tolist()):
            constant = feed_forward(layer.experts, expert, x[t]).detach()
            loss = loss + scores[expert] * scale * (constant @ flat[t])
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, (inputs, *parameters), allow_unused=True)
    return dict(zip(("input", *names), found, strict=True))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_is_the_slow_one_and_the_output_bitwise_the_same(name, implementation):
    model = MODELS[name]().train()
    model.set_experts_implementation(implementation)
    layer = model.model.layers[1].mlp
    inputs, wanted = torch.randn(3, 5, 32), torch.randn(3, 5, 32)
    expected, plain = slow_gradients(layer, inputs, wanted), layer(inputs)

    add_dense_mixer(find_routers(model))
    for recompute in (False, True):
        inputs = inputs.detach().clone().requires_grad_()
        output = checkpoint(layer, inputs, use_reentrant=False) if recompute else layer(inputs)
        assert torch.equal(output, plain)
        parameters = dict(layer.named_parameters())
        found = torch.autograd.grad((output * wanted).sum(), (inputs, *parameters.values()), allow_unused=True)
        for (key, value), gradient in zip(expected.items(), found, strict=True):
            torch.testing.assert_close(
                gradient, value, rtol=2e-4, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_nothing_is_computed_outside_training():
    model = olmoe()
    add_dense_mixer(find_routers(model))
    ids = torch.arange(3, 20).unsqueeze(0)
    assert "StraightThrough" not in graph(model.eval()(ids).logits)
    assert "StraightThrough" in graph(model.train()(ids).logits)


def graph(tensor: torch.Tensor) -> str:
    """The names of the functions that a gradient passes."""
    found, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return " ".join(node.name() for node in found)


def test_a_run_with_it_moves_routers_otherwise_and_adds_up_over_micro_batches():
    none = {"router_aux_loss_coef": 0.0}
    plain, _ = train_one_step(olmoe(), 4, **none)
    model = olmoe()
    whole, _ = train_one_step(model, 1, densemixer=True, **none)
    assert not any(module._forward_hooks for module in model.modules())  # it leaves the model as it was
    parts, _ = train_one_step(olmoe(), 4, densemixer=True, **none)
    for name, gradient in parts.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=1e-6)
        if "gate.weight" in name or "layers.1.mlp.experts" in name:  # the last layer's experts lie below no router
            same = torch.allclose(gradient, plain[name], rtol=1e-3, atol=1e-6)
            assert same == ("experts" in name), name


def test_under_an_adapter_of_the_experts():
    """The experts that were not chosen answer with their adapters."""
    adapters = pytest.importorskip("hf_moe.training.weights.adapters")
    adapted, _ = adapters.add_adapter(olmoe(), adapters.AdapterArguments(lora_parts=["routed_experts"], lora_r=2))
    model = adapted.get_base_model().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    layer, inputs, wanted = model.model.layers[1].mlp, torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    layer.gate.weight.requires_grad_()
    plain = torch.autograd.grad((layer(inputs) * wanted).sum(), layer.gate.weight)[0]
    add_dense_mixer(find_routers(model))
    (layer(inputs) * wanted).sum().backward()
    expected = plain.clone()
    flat, out = inputs.flatten(0, 1), wanted.flatten(0, 1)
    with torch.no_grad():
        _, _, index = layer.gate(flat)[:3]
    for expert in range(6):
        answer = layer.experts(flat, torch.full((6, 1), expert), torch.ones(6, 1)).detach()
        scores = (flat @ layer.gate.weight.T).softmax(-1)[:, expert]
        away = (index != expert).all(dim=1)
        loss = (scores * (answer * out).sum(dim=1) * away).sum()
        expected += torch.autograd.grad(loss, layer.gate.weight)[0]
    torch.testing.assert_close(layer.gate.weight.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{"router_type": "expert_choice"}, {"router_type": "hash"}, {"router_type": "dense"}],
    ids=lambda changes: changes["router_type"],
)
def test_refused_where_it_has_no_meaning(changes):
    model = hf_moe(n_group=1, topk_group=1, **changes)
    with pytest.raises(ValueError, match=r"densemixer is on, but .*gate does not choose the top k") as error:
        check_dense_mixer(model, find_routers(model))
    assert "\n" not in str(error.value)
