"""Sizes against a count by hand, and against what a small model that really runs computes and keeps."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.sizes.counts import cache_alternatives, sizes
from hf_moe.sizes.presets import preset_config

from .conftest import tiny_config, tokens

MLA = {
    "attention_type": "mla",
    "num_key_value_heads": None,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 9,
}
MOA = {"attention_type": "moa", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}  # 3 of 7 experts
KINDS = {
    "gqa": {},
    "mha": {"num_key_value_heads": None},
    "mqa": {"num_key_value_heads": 1, "head_dim": 10},
    "attention-biases": {"attention_bias": True, "attention_output_bias": True},
    "norm-of-heads": {"qk_norm": "head"},
    "norm-of-heads-after-rope": {"qk_norm": "head_after_rope"},
    "norm-of-projections": {"qk_norm": "projection"},
    "norm-of-sparse-output": {"sparse_output_norm": True},
    "plain-mlp": {"gated_mlp": False},
    "mlp-biases": {"mlp_bias": True},
    "plain-mlp-biases": {"gated_mlp": False, "mlp_bias": True},
    "shared": {"n_shared_experts": 2, "shared_expert_intermediate_size": 13},
    "latent-experts": {"moe_latent_size": 20, "n_shared_experts": 1, "mlp_bias": True},
    "shared-gate": {"n_shared_experts": 1, "shared_expert_gate": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "selection-bias": {"router_type": "sigmoid_topk", "router_args": {"selection_bias": True}},
    "dense-layers-only": {"mlp_layer_types": ["dense"] * 3},
    "dense-router": {"router_type": "dense"},
    "one-expert": {"num_experts_per_tok": 1},
    "mla": MLA,
    "moa": {**MOA, "attention_output_bias": True},
    "moa-dense-router": {**MOA, "router_type": "dense", "num_attention_heads": 14, "qk_norm": "head"},
    "mla-low-rank-queries": {**MLA, "q_lora_rank": 15, "attention_bias": True},
}


def count_by_hand(c: HfMoeConfig) -> tuple[int, int]:
    """All and active parameters, from the architecture's description."""
    linear = lambda inputs, outputs, bias=False: inputs * outputs + (outputs if bias else 0)  # noqa: E731
    d, heads = c.hidden_size, c.num_attention_heads
    if c.attention_type == "mla":
        query, latent = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), c.kv_lora_rank
        attention = linear(d, latent + c.qk_rope_head_dim, c.attention_bias) + latent
        attention += linear(latent, heads * (c.qk_nope_head_dim + c.v_head_dim)) + linear(heads * c.v_head_dim, d)
        if c.q_lora_rank:
            attention += linear(d, c.q_lora_rank, c.attention_bias) + c.q_lora_rank + linear(c.q_lora_rank, query)
        else:
            attention += linear(d, query)
    else:
        query, key = heads * c.head_dim, c.num_key_value_heads * c.head_dim
        attention = linear(d, query, c.attention_bias) + 2 * linear(d, key, c.attention_bias)
        attention += linear(query, d, c.attention_output_bias)
        attention += {None: 0, "projection": query + key}.get(c.qk_norm, 2 * c.head_dim)

    def mlp(width: int, d: int = d) -> int:
        return (2 if c.gated_mlp else 1) * linear(d, width, c.mlp_bias) + linear(width, d, c.mlp_bias)

    norms = c.num_hidden_layers * 2 * d + c.sparse_output_norm * c.mlp_layer_types.count("sparse") * d
    embeddings = c.vocab_size * d * (1 if c.tie_word_embeddings else 2)
    chosen = c.num_experts if c.router_type == "dense" else c.num_experts_per_tok
    total = active = embeddings + d + c.num_hidden_layers * attention + norms
    if c.attention_type == "moa":  # q and o above are those of a token's experts, which every layer has E of
        per_expert = 2 * linear(d, c.num_key_value_heads * c.head_dim)
        total += c.num_hidden_layers * ((c.num_experts - chosen) * per_expert + c.num_experts * d)
        active += c.num_hidden_layers * c.num_experts * d
    for kind in c.mlp_layer_types:
        if kind == "dense":
            total += mlp(c.intermediate_size)
            active += mlp(c.intermediate_size)
            continue
        always = c.num_experts * d + (2 * d * c.moe_latent_size if c.moe_latent_size else 0)
        if c.n_shared_experts:
            always += mlp(c.n_shared_experts * c.shared_expert_intermediate_size) + (d if c.shared_expert_gate else 0)
        expert = mlp(c.moe_intermediate_size, c.moe_latent_size or d)
        total += always + c.num_experts * expert
        active += always + chosen * expert
    return total, active


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_parameters_are_those_counted_by_hand(changes):
    config = tiny_config(**changes)
    measured = sizes(config)
    assert (measured["total_params"], measured["active_params"]) == count_by_hand(config)
    assert measured["head_params"] == 97 * 48
    assert measured["embedding_params"] == (0 if config.tie_word_embeddings else 97 * 48)
    assert measured["weight_bytes"] == {
        "float32": 4 * measured["total_params"],
        "bfloat16": 2 * measured["total_params"],
        "float8": measured["total_params"],
    }


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_flops_are_those_of_a_model_that_runs(changes):
    """PyTorch counts the matrix products of one forward; every token attends to all 11, as `sizes` assumes."""
    config = tiny_config(**changes)
    config._attn_implementation = config._experts_implementation = "eager"
    model = HfMoeForCausalLM(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(batch=1), use_cache=False)
    assert sizes(config, context=11)["flops_per_token"] * 11 == counter.get_total_flops()


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_the_cache_is_that_of_a_model_that_runs(changes):
    config = tiny_config(**changes)
    model = HfMoeForCausalLM(config).eval()
    with torch.no_grad():
        cache = model(tokens(batch=1), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert sizes(config)["kv_cache_bytes_per_token_by_dtype"]["float32"] * 11 == kept


def test_modules_for_multi_token_prediction_are_in_the_total_alone():
    plain, ahead = sizes(tiny_config()), sizes(tiny_config(num_mtp_layers=2))
    assert ahead["total_params"] == sum(
        p.numel() for p in HfMoeForCausalLM(tiny_config(num_mtp_layers=2)).parameters()
    )
    assert ahead["total_params"] > plain["total_params"]
    for name in ("active_params", "flops_per_token", "kv_cache_bytes_per_token"):
        assert ahead[name] == plain[name]


def test_training_costs_three_forwards():
    measured = sizes(tiny_config())
    assert measured["training_flops_per_token"] == 3 * measured["flops_per_token"]


def test_a_window_bounds_attention_and_cache():
    layers = ["sliding_attention", "full_attention", "full_attention"]
    full, sliding = sizes(tiny_config(), 100), sizes(tiny_config(layer_types=layers, sliding_window=30), 100)
    assert full["flops_per_token"] - sliding["flops_per_token"] == 70 * 2 * 6 * (8 + 8)  # 6 heads of 8
    assert sliding["kv_cache_bytes_per_token"] == full["kv_cache_bytes_per_token"]
    assert sliding["kv_cache_bytes_per_token_beyond_window"] * 3 == full["kv_cache_bytes_per_token"] * 2
    assert full["kv_cache_bytes_per_token_beyond_window"] == full["kv_cache_bytes_per_token"]


def test_the_context_is_the_models_where_that_is_short():
    assert sizes(tiny_config(max_position_embeddings=128))["context"] == 128
    assert sizes(tiny_config(max_position_embeddings=9999))["context"] == 4096
    shorter, longer = (sizes(tiny_config(), context)["flops_per_token"] for context in (64, 65))
    assert longer - shorter == 3 * 2 * 6 * (8 + 8)


def test_alternatives_of_the_cache():
    """MHA 2 n_h d_h, GQA 2 n_g d_h, MQA 2 d_h a layer (https://arxiv.org/abs/2405.04434, table 1), in bfloat16."""
    assert list(cache_alternatives(tiny_config(**MLA)).values()) == [3 * 2 * count * 6 * 2 for count in (6, 3, 1)]
    config = tiny_config(num_key_value_heads=3)
    assert cache_alternatives(config)["GQA, 3 key-value heads"] == sizes(config)["kv_cache_bytes_per_token"]
    prime = tiny_config(num_attention_heads=5, num_key_value_heads=1, head_dim=8)
    assert list(cache_alternatives(prime)) == ["MHA", "MQA"]


def test_the_largest_preset_takes_seconds():
    start = time.perf_counter()
    sizes(preset_config("deepseek-v3"))
    assert time.perf_counter() - start < 5
