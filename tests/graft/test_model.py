"""What a graft is besides its text: implementations, plans, configs, errors."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from hf_moe.model.configuration_hf_moe_graft import HfMoeGraftConfig
from hf_moe.model.modeling_hf_moe_graft import HfMoeGraftForCausalLM
from tests.conftest import tokens
from tests.dense_families import config_of, tiny


def graft(model_type: str = "llama", **fields) -> HfMoeGraftForCausalLM:
    return HfMoeGraftForCausalLM(HfMoeGraftConfig(backbone=config_of(model_type), num_experts=3, **fields)).eval()


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm"])
def test_experts_take_an_implementation(name, tmp_path):
    tiny("llama")  # the host's class has remembered that it has no experts
    model, ids = graft(), tokens(2, 9, 100)
    assert model.config._experts_implementation == "grouped_mm"
    expected = model(input_ids=ids).logits
    model.set_experts_implementation(name)
    assert model.config._experts_implementation == name
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=name)
    assert again.config._experts_implementation == name
    torch.testing.assert_close(again(input_ids=ids).logits, expected)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_is_the_hosts(name, tmp_path):
    model = graft()
    assert model.config._attn_implementation == model.model.config._attn_implementation == "sdpa"
    model.set_attn_implementation(name)
    assert model.model.layers[0].self_attn.config._attn_implementation == name
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    assert again.model.layers[0].self_attn.config._attn_implementation == name == again.config._attn_implementation
    torch.testing.assert_close(again(input_ids=tokens(1, 9, 100)).logits, model(input_ids=tokens(1, 9, 100)).logits)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_5_text"])
def test_a_static_cache_knows_the_padding(model_type):
    """Capacity by the tokens that count, and masks of queries and keys by the kind of a layer."""
    model, ids = graft(model_type, router_type="softmax_topk", expert_capacity_factor=0.7), tokens(2, 9, 100)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**given, cache_implementation="static"), model.generate(**given))


def test_a_config_asks_its_backbone(tmp_path):
    config = HfMoeGraftConfig(backbone=config_of("gpt2"), num_experts=4)
    assert (config.hidden_size, config.n_embd, config.vocab_size) == (32, 32, 128)
    config.use_cache = False
    assert config.backbone.use_cache is False
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is HfMoeGraftConfig and type(again.backbone) is type(config.backbone)
    assert again.to_diff_dict() | {"backbone": None} == config.to_diff_dict() | {"backbone": None}
    assert again.backbone.to_diff_dict() == config.backbone.to_diff_dict()
    with pytest.raises(AttributeError, match="num_expertz"):
        config.num_expertz  # noqa: B018


def test_names_that_do_not_change_are_the_hosts():
    model, dense = graft(sparse_layers=[1, 3]), tiny("llama")
    kept = {name for name in dense.state_dict() if not name.startswith(("model.layers.1.mlp", "model.layers.3.mlp"))}
    assert kept <= model.state_dict().keys() and isinstance(model, LlamaForCausalLM)
    assert model._no_split_modules == dense._no_split_modules


ROUTERS = ["topk_softmax", "softmax_topk", "hash", "expert_choice", "base", "sigmoid_topk"]
ROUTERS += ["sqrtsoftplus_topk", "top_p", "expert_threshold", "relu", "null_experts"]


@pytest.mark.parametrize("router", ROUTERS)
def test_every_kind_of_router(router):
    model, ids = graft("qwen3", router_type=router), tokens(2, 9, 100)
    assert model(input_ids=ids).logits.isfinite().all()
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()


def test_bfloat16_and_tied_embeddings(tmp_path):
    graft("gemma3_text").save_pretrained(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert again.dtype == torch.bfloat16 and again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(input_ids=tokens(1, 9, 100)).logits, model(input_ids=tokens(1, 9, 100)).logits)


def test_compiles():
    model, ids = graft(), tokens(2, 9, 100)
    expected = model(input_ids=ids).logits
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids).logits, expected)


REFUSED = {
    "no_network": (lambda: graft("mamba"), "No layer of a mamba has a dense feed-forward network"),
    "layer": (
        lambda: graft(sparse_layers=[7]),
        "sparse_layers has 7, a layer of a llama without .*: 0, 1, 2, 3",
    ),
    "unknown": (
        lambda: HfMoeGraftConfig(backbone={"model_type": "gpt7"}),
        "model_type 'gpt7', which Transformers .* does not know",
    ),
    "encoder": (
        lambda: HfMoeGraftForCausalLM(HfMoeGraftConfig(backbone={"model_type": "t5"})),
        "A t5 is no decoder that writes text",
    ),
    "experts": (lambda: graft(num_experts_per_tok=4), r"num_experts_per_tok \(4\) must be between 1 and num_experts"),
    "router": (lambda: graft(router_type="best"), "router_type 'best' is unknown"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case):
    make, said = REFUSED[case]
    with pytest.raises((ValueError, StrictDataclassError), match=said):
        make()
