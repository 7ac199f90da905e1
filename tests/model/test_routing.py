"""Every router against a slow computation of its formula, one token at a time, and against Transformers' own."""

import math

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from hf_moe.model.routing import ROUTERS, RouterState
from tests.conftest import tiny_config

T, E, K = 13, 12, 3
TOKEN_CHOICE = ["softmax_topk", "topk_softmax", "sigmoid_topk", "sqrtsoftplus_topk"]


def route(logits, router_type, top_k=K, training=False, mask=None, bias_E=None, hashed=None, nulls=2, **fields):
    """Of null experts the last `nulls` logits; thresholds are 0.5."""
    experts = logits.shape[1] - (nulls if router_type == "null_experts" else 0)
    config = tiny_config(num_experts=experts, num_experts_per_tok=top_k, router_type=router_type, **fields)
    state = RouterState(training, mask, bias_E, hashed, threshold_E=torch.full((experts,), 0.5))
    return ROUTERS[router_type].assign(logits, config, state)


def one_token(logits, router_type, top_k, norm, scale, bias, n_group, topk_group, group_score):
    """The same formulas on lists of floats: {expert: weight}."""
    total = sum(math.exp(x) for x in logits)
    softmax = [math.exp(x) / total for x in logits]
    sigmoid = [1 / (1 + math.exp(-x)) for x in logits]
    root = [math.sqrt(math.log(1 + math.exp(x))) for x in logits]
    scores = {"sigmoid_topk": sigmoid, "sqrtsoftplus_topk": root}.get(router_type, softmax)
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // n_group
    groups = [choice[g * size : (g + 1) * size] for g in range(n_group)]
    best = {"best": max, "two_best": lambda group: sum(sorted(group)[-2:])}[group_score]
    open_groups = sorted(range(n_group), key=lambda g: best(groups[g]))[-topk_group:]
    candidates = [e for e in range(len(logits)) if e // size in open_groups]
    chosen = sorted(candidates, key=lambda e: choice[e])[-top_k:]
    if router_type == "topk_softmax":
        total = sum(math.exp(logits[e]) for e in chosen)
        weights = {e: math.exp(logits[e]) / total for e in chosen}
    else:
        weights = {e: scores[e] for e in chosen}
        if norm:
            total = sum(weights.values())
            weights = {e: w / total for e, w in weights.items()}
    return {e: w * scale for e, w in weights.items()}


@pytest.mark.parametrize("router_type", TOKEN_CHOICE)
@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (6, 3), (12, 5)])
@pytest.mark.parametrize("group_score", ["best", "two_best"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_formula(router_type, norm, n_group, topk_group, group_score, biased):
    logits = torch.randn(T, E) * 2
    bias = torch.randn(E) * 0.1 if biased else None
    weights, index, _ = route(
        logits,
        router_type,
        K,
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
        bias_E=bias,
        n_group=n_group,
        topk_group=topk_group,
        router_args={"group_score": group_score},
    )
    for t in range(T):
        expected = one_token(
            logits[t].double().tolist(),
            router_type,
            K,
            norm,
            2.5,
            bias.double().tolist() if biased else [0.0] * E,
            n_group,
            topk_group,
            group_score,
        )
        actual = dict(zip(index[t].tolist(), weights[t].tolist(), strict=True))
        assert actual == pytest.approx(expected, rel=1e-5)


def dense(weights, index, num_experts=E):
    return torch.zeros(len(index), num_experts).scatter(-1, index, weights.float())


def copy_weights(router):
    torch.nn.init.normal_(router.weight)
    return router.weight


def test_equals_mixtral():
    router = MixtralTopKRouter(MixtralConfig(hidden_size=20, num_local_experts=E, num_experts_per_tok=K))
    x = torch.randn(T, 20)
    logits = x @ copy_weights(router).T
    _, weights, index = router(x)
    torch.testing.assert_close(dense(*route(logits, "topk_softmax")[:2]), dense(weights, index))


@pytest.mark.parametrize("norm", [False, True])
def test_equals_qwen3_moe(norm):
    config = Qwen3MoeConfig(hidden_size=20, num_experts=E, num_experts_per_tok=K, norm_topk_prob=norm)
    router = Qwen3MoeTopKRouter(config)
    x = torch.randn(T, 20)
    logits = x @ copy_weights(router).T
    _, weights, index = router(x)
    ours = route(logits, "softmax_topk", K, norm_topk_prob=norm)
    torch.testing.assert_close(dense(*ours[:2]), dense(weights, index))


def test_equals_deepseek_v3():
    config = DeepseekV3Config(hidden_size=20, n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2)
    router = DeepseekV3TopkRouter(config)
    router.e_score_correction_bias.copy_(torch.randn(E) * 0.1)
    x = torch.randn(T, 20)
    logits = x @ copy_weights(router).T
    _, weights, index = router(x)
    ours = route(
        logits,
        "sigmoid_topk",
        K,
        norm_topk_prob=True,
        routed_scaling_factor=config.routed_scaling_factor,
        bias_E=router.e_score_correction_bias,
        n_group=4,
        topk_group=2,
    )
    torch.testing.assert_close(dense(*ours[:2]), dense(weights, index))


def test_equals_deepseek_v4():
    v4 = pytest.importorskip("transformers.models.deepseek_v4")
    config = v4.DeepseekV4Config(hidden_size=20, n_routed_experts=E, num_experts_per_tok=K)
    router = v4.modeling_deepseek_v4.DeepseekV4TopKRouter(config)
    router.e_score_correction_bias.copy_(torch.randn(E) * 0.1)
    x = torch.randn(T, 20)
    logits = x @ copy_weights(router).T
    _, weights, index = router(x)
    scale = {"norm_topk_prob": True, "routed_scaling_factor": config.routed_scaling_factor}
    ours = route(logits, "sqrtsoftplus_topk", K, bias_E=router.e_score_correction_bias, **scale)
    torch.testing.assert_close(dense(*ours[:2]), dense(weights, index))


def test_equals_deepseek_v2_device_limited():
    config = DeepseekV2Config(
        num_attention_heads=4,
        hidden_size=20,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=16.0,
    )
    router = DeepseekV2TopkRouter(config)
    x = torch.randn(T, 20)
    logits = x @ copy_weights(router).T
    _, weights, index = router(x)
    best = {"group_score": "best"}
    ours = route(logits, "softmax_topk", routed_scaling_factor=16.0, n_group=4, topk_group=2, router_args=best)
    torch.testing.assert_close(dense(*ours[:2]), dense(weights, index))


@pytest.mark.parametrize("router_type", [name for name in ROUTERS if name != "hash"])
@pytest.mark.parametrize("training", [False, True], ids=["", "training"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_gradient_equals_finite_differences(router_type, training, masked):
    """Of the weights, with the choice, the draws and what is dropped held still. (A hash has no gradient.)"""
    logits = torch.randn(7, E, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0]) if masked else None

    def weights(x):
        torch.manual_seed(0)
        top_k = 2 if router_type == "gshard" else K
        return route(x, router_type, top_k, training, mask, norm_topk_prob=True, expert_capacity_factor=1.0).weights_TK

    torch.autograd.gradcheck(weights, logits)


@pytest.mark.parametrize("router_type", TOKEN_CHOICE)
def test_the_bias_moves_the_choice_and_never_the_weights(router_type):
    logits = torch.zeros(T, E)
    bias = torch.zeros(E)
    bias[[2, 5, 11]] = 1.0
    weights, index, _ = route(logits, router_type, norm_topk_prob=True, bias_E=bias)
    assert set(index.flatten().tolist()) == {2, 5, 11}
    torch.testing.assert_close(weights, torch.full((T, K), 1 / K))


@pytest.mark.parametrize("router_type", ["sigmoid_topk", "sqrtsoftplus_topk"])
def test_scores_that_all_underflow_give_finite_weights_and_gradients(router_type):
    logits = torch.full((2, E), -200.0, requires_grad=True)
    weights, _, _ = route(logits, router_type, K, norm_topk_prob=True)
    weights.square().sum().backward()
    assert weights.isfinite().all() and logits.grad.isfinite().all()
