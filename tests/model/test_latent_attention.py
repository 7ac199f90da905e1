"""Latent attention against Transformers' DeepSeek-V2 and V3, its two forms against each other, and its cache."""

import logging
from functools import partial

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from hf_moe import HfMoeConfig
from hf_moe.model.latent_attention import HfMoeLatentAttention, absorbing_is_cheaper
from hf_moe.model.rotary import HfMoeRotaryEmbedding
from hf_moe.model.routing import ROUTERS
from tests.conftest import on_the_gpu, tiny_config, tiny_model, tokens
from tests.model.test_generation import greedy_without_cache

SIZES = {"kv_lora_rank": 13, "qk_nope_head_dim": 5, "qk_rope_head_dim": 6, "v_head_dim": 7}
MLA = {"attention_type": "mla", "num_key_value_heads": None, **SIZES}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
ROPE = {"default": {"rope_type": "default", "rope_theta": 5000.0}, "yarn": YARN}
VARIANTS = {
    "full-rank-query": {},
    "low-rank-query": {"q_lora_rank": 11, "rope_interleave": True, "rope_parameters": YARN},
    "window": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "softcap": {"attn_logit_softcapping": 3.0, "attention_bias": True, "attention_output_bias": True},
}


def latent_model(**changes):
    return tiny_model(**MLA, **changes)


def set_form(model, absorb: bool | None):
    for layer in model.model.layers:
        layer.self_attn.absorb = absorb


EVEN = {"kv_lora_rank": 14, "qk_nope_head_dim": 4}  # DeepSeek-V2's complex RoPE fails on odd strides
FAMILIES = {
    "v2": (
        DeepseekV2Config,
        v2.DeepseekV2Attention,
        v2.DeepseekV2RotaryEmbedding,
        {"rope_interleave": True, **EVEN},
        EVEN,
    ),
    "v3": (DeepseekV3Config, v3.DeepseekV3Attention, v3.DeepseekV3RotaryEmbedding, {"rope_interleave": True}, {}),
    "v3-half-layout-bias": (
        DeepseekV3Config,
        v3.DeepseekV3Attention,
        v3.DeepseekV3RotaryEmbedding,
        {"attention_bias": True, "attention_output_bias": True},
        {"rope_interleave": False, "attention_bias": True},
    ),
}


def both(family, q_lora_rank, rope, implementation="eager"):
    """Transformers' attention and ours with the same weights, and a call for each, of x and padding."""
    config_class, attention_class, rotary_class, our_fields, their_fields = FAMILIES[family]
    their_config = config_class(
        **{**SIZES, **their_fields},
        q_lora_rank=q_lora_rank,
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=128,
        rope_parameters=dict(ROPE[rope]),
        attn_implementation=implementation,
    )
    theirs = attention_class(their_config, layer_idx=1).eval()
    config = tiny_config(**{**MLA, **our_fields}, q_lora_rank=q_lora_rank, rope_parameters=dict(ROPE[rope]))
    config._attn_implementation = implementation
    ours = HfMoeLatentAttention(config, layer_idx=1).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())

    def output(module, rotary, x, padding):
        positions = torch.arange(x.shape[1]).unsqueeze(0)
        mask = create_causal_mask(
            config=config, inputs_embeds=x, attention_mask=padding, past_key_values=None, position_ids=positions
        )
        embeddings = rotary(x, positions)
        result, _ = module(x, position_embeddings=embeddings, attention_mask=mask, past_key_values=None)
        return result[padding.bool()]  # what a padded query makes of no visible key is nobody's business

    return (
        ours,
        partial(output, theirs, rotary_class(their_config)),
        partial(output, ours, HfMoeRotaryEmbedding(config)),
    )


def padded_input():
    padding = torch.ones(2, 13)
    padding[0, :4] = 0
    return torch.randn(2, 13, 48), padding


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("q_lora_rank", [None, 11], ids=["full-rank-query", "low-rank-query"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family, q_lora_rank, rope, implementation):
    attention, theirs, ours = both(family, q_lora_rank, rope, implementation)
    x, padding = padded_input()
    expected = theirs(x, padding)
    for attention.absorb in (False, True):
        torch.testing.assert_close(ours(x, padding), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("absorb", [False, True], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_rounds_as_transformers_does(family, absorb):
    """Against float32, the mean error is no more than twice that of Transformers' attention in bfloat16."""
    attention, theirs, ours = both(family, 11, "yarn")
    x, padding = padded_input()
    expected = theirs(x, padding)
    attention.absorb = absorb
    theirs.args[0].bfloat16(), attention.bfloat16()
    errors = [(output(x.bfloat16(), padding).float() - expected).abs().mean() for output in (theirs, ours)]
    assert 0 < errors[0] < 0.05 * expected.abs().mean()
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_the_two_forms_agree(variant, chunk):
    model, ids = latent_model(**VARIANTS[variant]), tokens(2, 12)
    logits = {}
    for absorb in (False, True):
        set_form(model, absorb)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [model(part, past_key_values=cache).logits for part in (ids[:, :6], *ids[:, 6:].split(chunk, 1))]
        logits[absorb] = torch.cat(parts, dim=1)
    torch.testing.assert_close(logits[True], logits[False], rtol=1e-5, atol=1e-5)


def test_the_gradients_of_the_two_forms_agree():
    model, ids = latent_model(attn_implementation="eager").train(), tokens(2, 9)
    gradients = []
    for absorb in (False, True):
        set_form(model, absorb)
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)


def multiplications(config, queries: int, positions: int) -> dict[str, int]:
    """Counted from the shapes of every product in the two forms, per head."""
    rank, nope, rope, value = (getattr(config, name) for name in SIZES)
    absorbed = [(queries, nope, rank), (queries, rank, positions), (queries, rope, positions)]
    absorbed += [(queries, positions, rank), (queries, rank, value)]
    expanded = [(positions, rank, nope + value), (queries, nope + rope, positions), (queries, positions, value)]
    return {"absorbed": sum(a * b * c for a, b, c in absorbed), "expanded": sum(a * b * c for a, b, c in expanded)}


@pytest.mark.parametrize("rank", [3, 13, 512])
def test_the_cheaper_form_is_chosen(rank):
    config = tiny_config(**{**MLA, "kv_lora_rank": rank})
    for queries, positions in [(1, 2), (1, 700), (5, 9), (9, 9), (40, 300), (299, 300)]:
        cost = multiplications(config, queries, positions)
        assert absorbing_is_cheaper(config, queries, positions) == (cost["absorbed"] < cost["expanded"])


def test_prefill_expands_and_decoding_absorbs(monkeypatch):
    model, forms = latent_model(), []
    for name in ("absorbed", "expanded"):
        method = getattr(HfMoeLatentAttention, name)
        monkeypatch.setattr(
            HfMoeLatentAttention, name, lambda self, *a, n=name, m=method, **k: forms.append(n) or m(self, *a, **k)
        )
    model.generate(tokens(1, 9), max_new_tokens=3, do_sample=False)
    assert forms == ["expanded"] * 3 + ["absorbed"] * 6


def test_adapters_on_kv_b_proj_count():
    """Absorbing reads the weight of kv_b_proj, which an adapter leaves alone."""
    from peft import LoraConfig, get_peft_model

    model, ids = latent_model(), tokens(1, 7)
    adapted = get_peft_model(model, LoraConfig(target_modules=["kv_b_proj"], r=4, init_lora_weights=False)).eval()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    generated = adapted.generate(input_ids=ids, **options)
    assert torch.equal(generated, greedy_without_cache(adapted, ids, 8))
    merged = adapted.merge_and_unload()
    assert torch.equal(generated, merged.generate(ids, **options))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cache", ["dynamic", "static", pytest.param("offloaded", marks=pytest.mark.gpu)])
def test_cached_decoding_equals_the_full_forward(variant, cache):
    model, ids = latent_model(**VARIANTS[variant]), tokens(2, 7)
    if "offloaded" in cache:
        model, ids = on_the_gpu(model, ids)
    options = {"cache_implementation": cache, "disable_compile": True, "max_new_tokens": 9, "do_sample": False}
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(generated, greedy_without_cache(model, ids, 9))


@pytest.mark.parametrize("router_type", ROUTERS)
def test_every_router_and_its_experts_go_on_top(router_type):
    experts = {"num_experts_per_tok": 2} if router_type == "gshard" else {}
    model, ids = latent_model(router_type=router_type, n_shared_experts=1, **experts), tokens(2, 7)
    model.train()(ids, labels=ids).loss.backward()
    latents = [layer.self_attn.kv_a_proj_with_mqa.weight.grad for layer in model.model.layers]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in latents)
    model.eval()
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, greedy_without_cache(model, ids, 5))


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_the_cache_holds_latents_and_shared_keys_only(cache_class):
    model, ids = latent_model(), tokens(2, 11)
    options = {"max_cache_len": 11} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config, **options)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    values = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert values == ids.numel() * 3 * (SIZES["kv_lora_rank"] + SIZES["qk_rope_head_dim"])


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_a_token_of_deepseek_v2_lite_takes_31104_bytes(cache_class):
    lite = HfMoeConfig.from_preset("deepseek-v2-lite")
    fields = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_hidden_layers")
    sizes = {name: getattr(lite, name) for name in fields}
    others = {"num_attention_heads": 2, "mlp_layer_types": ["dense"] * sizes["num_hidden_layers"]}
    model, ids = tiny_model(**{**MLA, **sizes, **others}).bfloat16(), tokens(3, 7)
    options = {"max_cache_len": 7} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config, **options)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert held == ids.numel() * 31104


class LargeTensors(TorchDispatchMode):
    """Memory, by its address, of every tensor of at least `size` values that an operation returns."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.addresses = size, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        large = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.numel() >= self.size]
        self.addresses |= {x.untyped_storage().data_ptr() for x in large}
        return result


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@pytest.mark.parametrize("batch", [1, 3])
def test_no_step_copies_the_cache(cache_class, batch):
    # Two heads, so that a step's scores are smaller than the smallest part of the cache.
    model = latent_model(num_attention_heads=2, mlp_layer_types=["dense"] * 3)
    options = {"max_cache_len": 300} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config, **options)
    with torch.no_grad():
        model(tokens(batch, 250), past_key_values=cache)
        known = [x for layer in cache.layers for x in (layer.keys, layer.values)] + list(model.parameters())
        memory = {x.untyped_storage().data_ptr() for x in known}
        for step in range(5):
            with LargeTensors(batch * 250 * SIZES["qk_rope_head_dim"]) as large:
                model(tokens(batch, 1, seed=step), past_key_values=cache)
            assert large.addresses <= memory


@pytest.mark.parametrize("removed", [1, 4])
def test_cropping(removed):
    model, ids = latent_model(), tokens(2, 12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        cache.crop(-removed)
        again = model(ids[:, 9 - removed :], past_key_values=cache).logits
        torch.testing.assert_close(again, model(ids, use_cache=False).logits[:, 9 - removed :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padding_changes_nothing(cache, implementation):
    model, ids = latent_model(attn_implementation=implementation), tokens(1, 6)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(10) >= 4).long().unsqueeze(0)
    batch, masks = torch.cat((padded, tokens(1, 10, seed=3))), torch.cat((mask, torch.ones_like(mask)))
    options = {"cache_implementation": cache, "disable_compile": True, "max_new_tokens": 8, "do_sample": False}
    generated = model.generate(batch, attention_mask=masks, **options)
    assert torch.equal(generated[:1, 4:], greedy_without_cache(model, ids, 8))


@pytest.mark.parametrize("absorb", [False, True], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("change", ["cropped", "padded"])
def test_in_bfloat16_too(change, absorb):
    """Logits after cropping, or of a padded row, beside those of a cache that never held the other tokens."""
    model, ids = latent_model(q_lora_rank=11, initializer_range=0.1).bfloat16(), tokens(2, 13)
    set_form(model, absorb)

    def logits(first, rest, mask=None, removed=0):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(first, attention_mask=None if mask is None else mask[:, : first.shape[1]], past_key_values=cache)
            if removed:
                cache.crop(-removed)
            return model(rest, attention_mask=mask, past_key_values=cache).logits.float()

    expected = logits(ids[:, :7], ids[:, 7:])
    if change == "cropped":
        actual = logits(ids[:, :11], ids[:, 7:], removed=4)
    else:
        padding = torch.zeros(2, 5, dtype=torch.long)
        padded = torch.cat((padding, ids), dim=1)
        actual = logits(padded[:, :12], padded[:, 12:], torch.cat((padding, torch.ones_like(ids)), dim=1))
    assert (actual - expected).abs().mean() < 0.02 * expected.abs().mean()


def test_a_padding_mask_of_flash_attention_is_understood():
    model, x = latent_model(), torch.randn(2, 1, 48)
    attention = model.model.layers[0].self_attn
    position = model.model.rotary_emb(x, torch.tensor([[6]]))
    padding = torch.ones(2, 7)
    padding[0, :2] = 0
    outputs = []
    for mask in (padding, padding[:, None, None].bool()):
        cache = DynamicCache(config=model.config)
        torch.manual_seed(3)
        cache.update(torch.randn(2, 1, 6, SIZES["kv_lora_rank"]), torch.randn(2, 1, 6, SIZES["qk_rope_head_dim"]), 0)
        outputs.append(attention(x, position, attention_mask=mask, past_key_values=cache)[0])
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beam_search_equals_beam_search_without_a_cache(cache):
    model, ids = latent_model(), tokens(2, 5)
    options = {"attention_mask": torch.ones_like(ids), "num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(ids, cache_implementation=cache, disable_compile=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_a_draft_model_assists():
    model, ids = latent_model(), tokens(1, 6)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **options)
    for draft in (LlamaForCausalLM(config).eval(), latent_model(num_hidden_layers=1, mlp_layer_types=["dense"])):
        assert torch.equal(model.generate(ids, assistant_model=draft, **options), expected)


@pytest.mark.parametrize("absorb", [False, True], ids=["expanded", "absorbed"])
def test_bfloat16_stays_near_float32(absorb):
    """No further from float32 than twice Transformers' own rounding in the same place: eager attention in bfloat16."""
    model, ids = latent_model(q_lora_rank=11, initializer_range=0.1, attn_implementation="eager"), tokens(2, 12)

    def logits(dtype, form):
        set_form(model.to(dtype), form)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :6], past_key_values=cache)
            return torch.cat([model(x, past_key_values=cache).logits for x in ids[:, 6:].split(1, 1)], 1).float()

    expected = logits(torch.float32, False)
    rounding = (logits(torch.bfloat16, False) - expected).abs().mean()
    assert 0 < rounding < 0.05 * expected.abs().mean()
    assert (logits(torch.bfloat16, absorb) - expected).abs().mean() < 2 * rounding


ONE_LAYER = {"num_hidden_layers": 1, "mlp_layer_types": ["dense"]}


def test_compiles_as_one_graph():
    model, ids = latent_model(**ONE_LAYER, q_lora_rank=11, rope_interleave=True), tokens(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4
        )


def test_a_static_step_compiles_as_one_graph():
    model, ids = latent_model(**ONE_LAYER), tokens(2, 9)
    caches = [StaticCache(config=model.config, max_cache_len=12) for _ in range(2)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :8], past_key_values=cache)
        position = torch.tensor([[8]])
        actual = compiled(ids[:, 8:], past_key_values=caches[0], position_ids=position).logits
        expected = model(ids[:, 8:], past_key_values=caches[1], position_ids=position).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_masks_that_are_no_tensors_stay_with_their_interface():
    attention = latent_model().model.layers[0].self_attn
    attention.absorb = True
    assert attention.absorbs(1, 9, None)
    assert not attention.absorbs(1, 9, create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, "cpu"))


def test_attention_probabilities_are_returned():
    model, ids = latent_model(attn_implementation="eager"), tokens(2, 7)
    with torch.no_grad():
        out = model(ids, output_attentions=True)
        step = model(ids[:, :1], past_key_values=out.past_key_values, output_attentions=True)
    for attentions, queries, positions in ((out.attentions, 7, 7), (step.attentions, 1, 8)):
        assert [tuple(x.shape) for x in attentions] == [(2, 6, queries, positions)] * 3
        torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 6, queries))


def test_saves_and_loads(tmp_path):
    model, ids = latent_model(q_lora_rank=11, rope_parameters=dict(YARN)), tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": None}, "needs kv_lora_rank of at least 1, but it is None"),
        ({"kv_lora_rank": 0}, "needs kv_lora_rank of at least 1, but it is 0"),
        ({"q_lora_rank": -2}, "needs q_lora_rank of at least 1, but it is -2"),
        ({"qk_nope_head_dim": None}, "needs qk_nope_head_dim"),
        ({"qk_rope_head_dim": None}, "needs qk_rope_head_dim"),
        ({"v_head_dim": None}, "needs v_head_dim"),
        ({"qk_rope_head_dim": 5}, r"qk_rope_head_dim \(5\) must be even"),
        ({"head_dim": 8}, r"head_dim \(8\) must be qk_rope_head_dim \(6\)"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads \(2\) must be num_attention_heads \(6\)"),
        ({"qk_norm": "head"}, "qk_norm .'head'. needs attention_type 'gqa'"),
        ({"clip_qkv": 8.0}, r"clip_qkv \(8.0\) needs attention_type 'gqa'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_sizes_name_the_numbers(changes, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**{**MLA, **changes})


@pytest.mark.parametrize(
    ("changes", "name", "shapes"),
    [
        ({"kv_lora_rank": 12}, "kv_b_proj.weight", "[72, 13]) vs model:torch.Size([72, 12])"),
        ({"v_head_dim": 9}, "o_proj.weight", "[48, 42]) vs model:torch.Size([48, 54])"),
        ({"qk_rope_head_dim": 8, "head_dim": 8}, "q_proj.weight", "[66, 48]) vs model:torch.Size([78, 48])"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_other_sizes_is_refused(changes, name, shapes, tmp_path, caplog):
    latent_model().save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **changes)
    finally:
        logger.removeHandler(caplog.handler)
    assert name in caplog.text and shapes in caplog.text


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="no paged cache for latents"):
        latent_model().generate_batch([[1, 2, 3]])
