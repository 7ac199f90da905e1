"""Routers found by what model classes say of themselves: which, and what is read of them."""

import weakref

import pytest
import torch
from hf_moe.training.balance.selection_bias import base_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe.routers import captured, find_routers, token_mask

from .training.models import LATENT, SIZES, hf_moe, hf_moe_biased

EXPERTS = {"num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "n_shared_experts": 1}
HOSTS = {
    "mixtral": {},
    "olmoe": {},
    "flex_olmo": {},
    "qwen2_moe": {},
    "qwen3_moe": {"head_dim": 8},
    "granitemoe": {},
    "gpt_oss": {"head_dim": 8},
    "phimoe": {},
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 8},
    "deepseek_v2": {**LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 0, "topk_method": "greedy"},
    "deepseek_v3": {**LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 0, "n_group": 2, "topk_group": 1},
    "glm4_moe": {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "head_dim": 8},
    "dots1": {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {"moe_num_experts": 6, "moe_k": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 1},
}
WITH_BIAS = ("deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe")


def host(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **EXPERTS, "shared_expert_intermediate_size": 16, **HOSTS[name]})
    return AutoModelForCausalLM.from_config(config).eval()


def first(seen: dict, path: str, value: torch.Tensor) -> None:
    seen.setdefault(path, value)


@pytest.mark.parametrize("name", HOSTS)
def test_routers_of_transformers_models(name):
    model, ids = host(name), torch.arange(3, 25).view(2, 11)
    routers = find_routers(model)
    assert len(routers) == (4 if name == "jetmoe" else 2)  # JetMoE routes attention heads too
    seen = {}
    for path, module in model.named_modules():
        if path.endswith(".experts") and name != "jetmoe":
            module.register_forward_pre_hook(lambda m, args, path=path: first(seen, path, args[1]))
    with captured(routers, 2) as routings, torch.no_grad():
        model(ids)
        model(ids.flip(0))  # not seen
    assert list(routings) == list(routers)
    for path, routing in routings.items():
        assert routing.logits_TE.shape == (22, 6) and routing.index_SK.shape == (22, 2)
        assert (routers[path].bias is not None) == (name in WITH_BIAS)
    chosen = zip(seen.values(), routings.values(), strict=True) if seen else ()
    for index, routing in chosen:  # what the experts were sent
        assert torch.equal(index.sort(-1).values, routing.index_SK.sort(-1).values)


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_type": "moa", "num_attention_heads": 4, "num_key_value_heads": 2}, {"router_type": "hash"}],
    ids=["mlp", "heads", "hash"],
)
def test_routers_of_hf_moe_models(changes):
    model, ids = hf_moe(**changes), torch.arange(3, 25).view(2, 11)
    routers = find_routers(model)
    names = [f"model.layers.{layer}.mlp.gate" for layer in (0, 1)]
    if changes.get("attention_type"):
        names += [f"model.layers.{layer}.self_attn.gate" for layer in (0, 1)]
    assert sorted(routers) == sorted(names)
    with captured(routers, 2) as routings:
        out = model(ids, output_router_logits=True)
    for logits, index in zip(out.router_logits, out.router_indices, strict=True):
        assert any(torch.equal(logits, x.logits_TE) and torch.equal(index, x.index_SK) for x in routings.values())


def test_gradients_flow_through_what_is_captured():
    model, ids = hf_moe_biased().train(), torch.arange(3, 25).view(2, 11)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    routers = find_routers(base_model(model))
    model(ids, labels=ids)  # Transformers adds its own hooks in the first forward
    hooks = [len(router.module._forward_hooks) for router in routers.values()]
    with captured(routers, 2) as routings:
        loss = model(ids, labels=ids).loss
    routed = {name: id(x.logits_TE) for name, x in routings.items()}
    (loss + sum(x.logits_TE.square().sum() for x in routings.values())).backward()
    assert {name: id(x.logits_TE) for name, x in routings.items()} == routed  # not those of the second forward
    assert all(router.module.weight.grad.abs().max() > 0 for router in routers.values())
    assert [len(router.module._forward_hooks) for router in routers.values()] == hooks


@pytest.mark.parametrize("make", [hf_moe, lambda: host("qwen3_moe")], ids=["hf_moe", "qwen3_moe"])
def test_tokens_that_checkpointing_frees_are_not_held(make):
    model, ids, given = make().train(), torch.arange(3, 25).view(2, 11), []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    routers = find_routers(model)
    for router in routers.values():
        router.module.register_forward_pre_hook(lambda module, args: given.append(weakref.ref(args[0])))
    with captured(routers, 2) as routings:
        loss = model(ids, labels=ids).loss
        assert len(given) == len(routers)
        assert all(tokens() is None for tokens in given)
    assert len(routings) == len(routers)
    assert loss.requires_grad


def test_a_dense_model_has_none():
    assert find_routers(hf_moe(mlp_layer_types=["dense", "dense"])) == {}


def test_padding_is_known_from_either_form_of_mask():
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    pairs = torch.ones(5, 5, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    for given in (mask, pairs):
        assert torch.equal(token_mask({"input_ids": ids, "attention_mask": given}), mask)
    assert torch.equal(token_mask({"inputs_embeds": torch.zeros(2, 5, 3)}), torch.ones_like(mask))
