"""What `inspect` and `plan` say of grafts, beside what models that really run compute and keep."""

from dataclasses import replace

import pytest
import torch
from hf_moe.training.weights.groups import train_group
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.cache_utils import Cache

from hf_moe import HfMoeConfig, HfMoeGraftConfig, HfMoeGraftForCausalLM
from hf_moe.model.host import CACHE
from hf_moe.sizes import sizes
from hf_moe.sizes.plan import Rate, Run, plan, state_memory
from tests import picture_families
from tests.conftest import tokens
from tests.dense_families import config_of
from tests.test_plan import SMALL, allocated, saved_bytes

# Sandwich norms and windows, three kinds of states beside keys and values, one layer run many times,
# embeddings a layer, latents, eager attention alone.
FAMILIES = ("gemma3_text", "qwen3_5_text", "falcon_h1", "bamba", "hrm_text", "gemma3n_text", "minicpm3", "bloom")
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 61, "intermediate_size": 20, "max_position_embeddings": 32}


def config_for(model_type: str, **fields) -> HfMoeGraftConfig:
    return HfMoeGraftConfig(backbone=config_of(model_type), num_experts=4, **fields)


def test_a_llamas_sizes_are_those_of_the_same_model_in_our_architecture():
    fields = {"num_experts": 5, "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 14}
    grafted = sizes(HfMoeGraftConfig(backbone=LlamaConfig(**SIZES), **fields), 21)
    own = sizes(HfMoeConfig(**SIZES, **fields), 21)
    assert grafted["kv_cache_bytes_fixed"] == 0
    assert grafted["kv_cache_bytes_at_context"] == 21 * own["kv_cache_bytes_per_token"]
    assert {name: x for name, x in grafted.items() if name in own} == {
        name: own[name] for name in own if name in grafted
    }
    assert own.keys() - grafted.keys() == {
        "kv_cache_bytes_per_token_by_dtype",
        "kv_cache_bytes_per_token_beyond_window",
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_forward_computes_and_caches(name):
    config = config_for(name, n_shared_experts=1)
    report = sizes(config, 40)
    model = HfMoeGraftForCausalLM(config).to(torch.bfloat16).eval()
    assert report["total_params"] == sum(x.numel() for x in model.parameters())
    for which in ("attn", "experts"):
        getattr(model, f"set_{which}_implementation")("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = model(tokens(1, 40, 128), use_cache=True)[CACHE]
    assert report["flops_per_token"] == counter.get_total_flops() // 40
    assert report["kv_cache_bytes_at_context"] == held(cache)
    assert (report["kv_cache_bytes_fixed"] > 0) is (name in ("qwen3_5_text", "falcon_h1", "bamba"))
    per_token, fixed = report["kv_cache_bytes_per_token"], report["kv_cache_bytes_fixed"]
    assert report["kv_cache_bytes_at_context"] == 40 * per_token + fixed


def held(cache: Cache) -> int:
    found = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for x in value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]:
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    found[id(x)] = x.nbytes
    return sum(found.values())


def test_a_window_bounds_the_cache():
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    report = sizes(HfMoeGraftConfig(backbone=config_of("gemma3_text", sliding_window=16, layer_types=kinds)), 40)
    assert report["kv_cache_bytes_at_context"] == report["kv_cache_bytes_per_token"] * (40 + 3 * 15) // 4


@pytest.mark.parametrize("name", FAMILIES)
def test_memory_is_what_training_keeps(name):
    config = config_for(name)
    run = Run(trainable="all", **SMALL, experts_implementation="grouped_mm")
    memory = plan(config, run)["memory_per_gpu"]
    model = HfMoeGraftForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    kept = saved_bytes(model, 2, 24)
    if name == "minicpm3":  # whose values are narrower than its keys: the CPU keeps their scores, a GPU does not
        assert 0.9 * kept < memory["activations"] < kept
    else:
        assert memory["activations"] == pytest.approx(kept, rel=0.02)
    for part, size in allocated(model).items():
        assert memory[part] == pytest.approx(size, rel=0.05), part
    few = plan(config, replace(run, gradient_checkpointing=True))["memory_per_gpu"]
    assert few["activations"] < 0.8 * memory["activations"]


def test_of_a_host_that_reads_pictures_a_text_counts():
    config = HfMoeGraftConfig(backbone=picture_families.config_of("gemma3"), num_experts=4)
    alone = HfMoeGraftConfig(backbone=config.backbone.get_text_config(), num_experts=4)
    whole, text = (sizes(x, 40) for x in (config, alone))
    assert whole["total_params"] > text["total_params"]
    for name in ("flops_per_token", "kv_cache_bytes_per_token", "kv_cache_bytes_at_context"):
        assert whole[name] == text[name]
    kept = [plan(x, Run(**SMALL))["memory_per_gpu"]["activations"] for x in (config, alone)]
    assert kept[0] == pytest.approx(kept[1], rel=0.02)


def test_a_part_trains_as_in_a_run():
    config, run = config_for("cohere"), Run(trainable="router_only", gpus=2, sharding="zero3", **SMALL)
    model = HfMoeGraftForCausalLM(config)
    train_group(model, "router_only")
    report = plan(config, run, Rate(1e9, "mine"))
    assert report["trained_params"] == sum(x.numel() for x in model.parameters() if x.requires_grad)
    assert report["memory_per_gpu"] | state_memory(model, config, run) == report["memory_per_gpu"]
    assert report["memory_per_gpu"]["gathered"] == 8 * sum(x.numel() for x in model.model.layers[0].parameters())
    assert report["tokens_per_second"] > 0


def test_what_the_data_decide_is_unknown(monkeypatch):
    config = config_for("llama", router_type="base", router_args={"solver": "auction"}, num_experts_per_tok=1)
    assert plan(config, Run(**SMALL))["memory_per_gpu"]["activations"] is None  # the auction is held in training alone

    def forward(model, length):
        raise DynamicOutputShapeException("nonzero")

    monkeypatch.setattr("hf_moe.sizes.forward.forward", forward)
    report = sizes(config, 16)
    assert report["total_params"] > report["active_params"] > 0
    assert report["flops_per_token"] is report["kv_cache_bytes_per_token"] is None
    for rate in (None, Rate(1e9, "mine")):
        assert plan(config, Run(**SMALL, train_tokens=1e6), rate)["time_unknown"] == "the data decide about the FLOPs"
