"""What blocks may have beside Llama's: whole models of Transformers' families with their own weights, equal logits."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.integrations.finegrained_fp8 import FP8Experts

from hf_moe import HfMoeForCausalLM
from hf_moe.model.modeling_hf_moe import HfMoeSparseMoeBlock
from hf_moe.model.norms import make_norm
from tests.conftest import FEW_PAGES, tiny_config, tiny_model, tokens

SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
DENSE = {"mlp_layer_types": ["dense"] * 4}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
CHUNKED = ["chunked_attention", "full_attention", "chunked_attention", "chunked_attention"]
ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 3.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
GEMMA = {"rms_norm_unit_offset": True, "layer_norm_placement": "sandwich", "embedding_multiplier": 24**0.5}
GEMMA |= {"hidden_act": "gelu_pytorch_tanh", "head_dim": 10, "attention_multiplier": 7**-0.5, **DENSE}
THEIR_GEMMA = {"head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 5, "layer_types": MIXED}
MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4}
MULTIPLIERS |= {"logits_scaling": 1.7}


def no_names(name, x):
    return {name: x}


def llama4(name, x):
    name = name.replace("feed_forward.router", "mlp.gate").replace("feed_forward.shared_expert", "mlp.shared_experts")
    name = name.replace("feed_forward", "mlp")
    return {name: x.mT if ".experts." in name else x}


def gpt_oss(name, x):
    name = name.replace("mlp.router", "mlp.gate")
    if ".experts.gate_up" in name:  # gate and up take turns
        x = torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)
    return {name: x.mT if ".experts." in name and x.ndim == 3 else x}


def dbrx(name, x):
    for theirs, ours in {
        "transformer.blocks": "model.layers",
        "transformer.wte": "model.embed_tokens",
        "transformer.norm_f": "model.norm",
        "norm_attn_norm.norm_1": "input_layernorm",
        "norm_attn_norm.norm_2": "post_attention_layernorm",
        "norm_attn_norm.attn.out_proj": "self_attn.o_proj",
        "ffn.router.layer": "mlp.gate",
    }.items():
        name = name.replace(theirs, ours)
    if name.endswith("Wqkv.weight"):
        prefix = name.split("norm_attn_norm")[0] + "self_attn."
        parts = zip(("q_proj", "k_proj", "v_proj"), x.split([24, 12, 12]), strict=True)
        return {f"{prefix}{part}.weight": rows for part, rows in parts}
    prefix = name.split("ffn")[0] + "mlp.experts."
    if name.endswith("mlp.w1"):
        return {prefix + "gate_proj": x.view(5, 12, 24)}
    if name.endswith("mlp.v1"):
        return {prefix + "up_proj": x.view(5, 12, 24)}
    return {prefix + "down_proj": x.view(5, 12, 24).mT} if name.endswith("mlp.w2") else {name: x}


FAMILIES = {
    "granite-multipliers": ("granite", MULTIPLIERS, {**MULTIPLIERS, **DENSE}, no_names),
    "olmo2-post-norm": ("olmo2", {}, {"layer_norm_placement": "post", "qk_norm": "projection", **DENSE}, no_names),
    "gemma2-sandwich": (
        "gemma2",
        {**THEIR_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "layer_types": MIXED},
        no_names,
    ),
    "gemma3-rope-by-layer-type": (
        "gemma3_text",
        {**THEIR_GEMMA, "rope_parameters": ROPES},
        {**GEMMA, "qk_norm": "head", "layer_types": MIXED, "rope_parameters": ROPES},
        no_names,
    ),
    "smollm3-no-rope": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": False, "rope_parameters": ROPES["sliding_attention"]},
        {"no_rope_layers": [1, 0, 1, 0], "rope_parameters": ROPES["sliding_attention"], **DENSE},
        no_names,
    ),
    "llama4-chunks-temperature": (
        "llama4_text",
        {
            **{"no_rope_layers": [1, 0, 1, 1], "attention_chunk_size": 5, "floor_scale": 3, "attn_scale": 0.6},
            **{"intermediate_size": 12, "intermediate_size_mlp": 36, "interleave_moe_layer_step": 2, "head_dim": 6},
            **{"num_local_experts": 5, "num_experts_per_tok": 2},
        },
        {
            **{"no_rope_layers": [1, 0, 1, 1], "attention_chunk_size": 5, "floor_scale": 3, "attn_scale": 0.6},
            **{"attn_temperature_tuning": True, "layer_types": CHUNKED, "qk_norm": "l2", "rope_interleave": True},
            **{"mlp_layer_types": ["dense", "sparse"] * 2, "moe_intermediate_size": 12, "n_shared_experts": 1},
            **{"num_experts_per_tok": 2, "router_type": "sigmoid_topk", "expert_input_scaling": True},
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
        llama4,
    ),
    "gpt_oss-sinks-clamp-bias": (
        "gpt_oss",
        {
            **{"num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 12, "swiglu_limit": 0.8},
            **{"head_dim": 6, "sliding_window": 5, "layer_types": MIXED, "attention_bias": True},
            **{"rope_parameters": {"rope_type": "default", "rope_theta": 90.0}, "swiglu_alpha": 1.3},
        },
        {
            **{"mlp_layer_types": ["sparse"] * 4, "moe_intermediate_size": 12, "num_experts_per_tok": 3},
            **{"experts_swiglu_limit": 0.8, "experts_swiglu_alpha": 1.3, "mlp_bias": True, "attention_sinks": True},
            **{"router_type": "topk_softmax", "router_args": {"router_bias": True}, "attention_bias": True},
            **{"attention_output_bias": True, "layer_types": MIXED, "head_dim": 6},
            "rope_parameters": {"rope_type": "default", "rope_theta": 90.0},
        },
        gpt_oss,
    ),
    "dbrx-layer-norm": (
        "dbrx",
        {
            **{"d_model": 24, "n_heads": 4, "n_layers": 4, "max_seq_len": 64, "resid_pdrop": 0.0},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.1, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 5, "moe_top_k": 2, "hidden_size": 24},
        },
        {
            **{"norm_type": "layer_norm", "clip_qkv": 1.1, "router_type": "topk_softmax", "num_experts_per_tok": 2},
            **{"mlp_layer_types": ["sparse"] * 4, "moe_intermediate_size": 12},
        },
        dbrx,
    ),
}


def their_model(model_type: str, changes: dict):
    """A random model whose norms, biases and sinks are random too."""
    sizes = {name: size for name, size in SIZES.items() if model_type != "dbrx" or "token" in name or "vocab" in name}
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or model_type == "dbrx":
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def our_model(theirs, changes: dict, rename):
    window = {"sliding_window": 5} if "sliding_attention" in changes.get("layer_types", []) else {}
    tied = {"tie_word_embeddings": theirs.config.tie_word_embeddings}
    model = HfMoeForCausalLM(tiny_config(**{**SIZES, "num_experts": 5, **tied, **window, **changes})).eval()
    state = {}
    for name, x in theirs.state_dict().items():
        state |= rename(name, x)
    for name in [name for name in state if name.endswith("experts.gate_proj")]:
        up = name.replace("gate_proj", "up_proj")
        state[name.replace("gate_proj", "gate_up_proj")] = torch.cat((state.pop(name), state.pop(up)), dim=1)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_text_are_the_familys(family):
    model_type, theirs, ours, rename = FAMILIES[family]
    theirs = their_model(model_type, theirs)
    ours = our_model(theirs, ours, rename)
    ids = tokens(length=23)
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-5)
        ours.set_attn_implementation("eager")
        torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-5)
    greedy = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **greedy), theirs.generate(ids, **greedy))


@pytest.mark.parametrize("changes", [{}, {"rms_norm_unit_offset": True}, {"norm_type": "layer_norm"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_norms_are_the_formulas(changes, dtype):
    norm = make_norm(tiny_config(rms_norm_eps=0.1, **changes), 31).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(5, 31).to(dtype)
    y, weight = x.double(), norm.weight.detach().double()
    if changes == {"norm_type": "layer_norm"}:
        y = y - y.mean(-1, keepdim=True)
    expected = y / (y.square().mean(-1, keepdim=True) + 0.1).sqrt() * (weight + bool("unit" in str(changes)))
    torch.testing.assert_close(norm(x), expected.to(dtype))


def test_a_fresh_norm_with_an_offset_changes_nothing():
    model = tiny_model(rms_norm_unit_offset=True, layer_norm_placement="sandwich", num_mtp_layers=1)
    norms = [x for name, x in model.named_parameters() if name.split(".")[-2].endswith("norm")]
    assert len(norms) == 3 * 4 + 1 + 4 + 3 and all((x == 0).all() for x in norms)
    model.add_mtp_layers(1)
    assert (model.model.mtp_layers[1].enorm.weight == 0).all()


def test_input_scaling_weighs_what_an_expert_reads():
    """sum_k FFN_k(w_k x), token by token; a slot without weight gives nothing, although the experts have biases."""
    config = tiny_config(expert_input_scaling=True, mlp_bias=True, router_type="sigmoid_topk")
    moe = HfMoeSparseMoeBlock(config, layer_idx=1)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    moe.experts.config._experts_implementation = "eager"
    x, weights = torch.randn(13, 48), torch.rand(13, 3)
    weights[4, 1] = 0
    index = torch.randint(0, 7, (13, 3))
    expected = torch.zeros(13, 48)
    for t in range(13):
        for e, w in zip(index[t].tolist(), weights[t], strict=True):
            if w > 0:
                expected[t] += moe.experts.feed_forward((w * x[t])[None], e)[0]
    torch.testing.assert_close(moe.scaled_inputs(x, index, weights), expected)


def test_clamped_gate_is_the_one_of_transformers_fp8_experts():
    x = torch.randn(5, 62) * 3
    for changes in ({"experts_swiglu_limit": 1.5, "experts_swiglu_alpha": 1.2}, {}):
        config = tiny_config(**changes)
        theirs, ours = FP8Experts(config), HfMoeSparseMoeBlock(config, layer_idx=1).experts
        torch.testing.assert_close(ours._apply_gate(x), theirs._apply_gate(x))


def test_embeddings_that_are_given_are_scaled_too():
    model = tiny_model(embedding_multiplier=3.0, num_mtp_layers=1)
    x = tokens()
    with torch.no_grad():
        given = model(inputs_embeds=model.get_input_embeddings()(x), labels=x, output_mtp_loss=True)
        looked_up = model(x, labels=x, output_mtp_loss=True)
    assert torch.equal(given.logits, looked_up.logits) and torch.equal(given.mtp_loss, looked_up.mtp_loss)
    assert not torch.allclose(looked_up.logits, tiny_model(num_mtp_layers=1)(x).logits, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_norm_placement": "sandwich", "embedding_multiplier": 3.0, "logits_scaling": 2.0},
        {
            "rope_parameters": ROPES,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ],
    ids=["norms-and-multipliers", "rope-by-layer-type"],
)
def test_speculation_writes_the_same_text(changes):
    model = tiny_model(num_mtp_layers=2, **changes)
    greedy = {"max_new_tokens": 12, "do_sample": False}
    ids = tokens(1, 9)
    assert torch.equal(model.generate(ids, use_mtp=True, **greedy), model.generate(ids, **greedy))


def test_implementations_that_cannot_are_refused():
    sinks, chunks = tiny_model(attention_sinks=True), tiny_model(layer_types=CHUNKED[:3], attention_chunk_size=4)
    assert sinks.config._attn_implementation == "eager" and not sinks.supports_context_parallel
    with pytest.raises(ValueError, match=r"attention_sinks \(True\) needs attn_implementation eager"):
        sinks.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="chunked_attention, which needs attn_implementation eager"):
        chunks.set_attn_implementation("flash_attention_2")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attn_logit_softcapping": 3.0}, r"no cap on logits \(attn_logit_softcapping 3\.0\) without flash attention"),
        ({"layer_types": CHUNKED[:3], "attention_chunk_size": 4}, "no chunks"),
    ],
    ids=["cap", "chunks"],
)
def test_continuous_batching_refuses_what_its_attention_leaves_out(changes, match):
    with pytest.raises(ValueError, match=f"Continuous batching has {match}"):
        tiny_model(**changes).generate_batch([[1, 2, 3]], progress_bar=False)


def test_continuous_batching_with_sinks():
    model, prompt = tiny_model(attention_sinks=True), tokens(1, 7)
    torch.nn.init.normal_(model.model.layers[0].self_attn.sinks)
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    (result,) = model.generate_batch(prompt.tolist(), greedy, FEW_PAGES, progress_bar=False).values()
    assert torch.equal(torch.tensor([result.generated_tokens]), model.generate(prompt, greedy)[:, 7:])


VARIANTS = {
    "gemma": {
        **GEMMA,
        **{"mlp_layer_types": ["dense", "sparse", "sparse"], "qk_norm": "head", "rope_parameters": ROPES},
        **{"sliding_window": 5, "layer_types": MIXED[:3]},
    },
    "llama4": {
        **{"no_rope_layers": [1, 0, 1], "layer_types": CHUNKED[:3], "attention_chunk_size": 5, "qk_norm": "l2"},
        **{"attn_temperature_tuning": True, "floor_scale": 3, "rope_interleave": True, "expert_input_scaling": True},
    },
    "gpt_oss": {
        **{"attention_sinks": True, "experts_swiglu_limit": 0.8, "mlp_bias": True, "router_type": "topk_softmax"},
        **{"router_args": {"router_bias": True}, "sliding_window": 5, "layer_types": MIXED[:3]},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_static_caches_and_compilation_change_nothing(variant):
    model, ids = tiny_model(**VARIANTS[variant]), tokens(2, 17)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    padded = torch.cat((torch.zeros(2, 4, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(21) >= 4).long().expand(2, -1)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            following = model(expected, use_cache=False).logits[:, -1:].argmax(-1)
            expected = torch.cat((expected, following), dim=1)
        logits = model(ids).logits
    assert torch.equal(model.generate(ids, **greedy), expected)
    assert torch.equal(model.generate(padded, attention_mask=mask, **greedy)[:, 4:], expected)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(ids, **static, **greedy), expected)
    model.set_experts_implementation("grouped_mm")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, logits, rtol=1e-4, atol=1e-4)


MLA = {"attention_type": "mla", "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
MLA |= {"num_key_value_heads": None}
REFUSED = {
    "norm of outputs": (
        {"sparse_output_norm": True, "layer_norm_placement": "post"},
        r"sparse_output_norm \(True\) needs layer_norm_placement 'pre', but 'post'",
    ),
    "norm": ({"norm_type": "layer_norm", "rms_norm_unit_offset": True}, r"rms_norm_unit_offset \(True\)"),
    "logits": ({"logits_scaling": 0}, r"logits_scaling \(0\)"),
    "indices": ({"no_rope_layers": [0, 2]}, r"no_rope_layers \(\[0, 2\]\) must hold 1 .* num_hidden_layers \(3\)"),
    "temperature": ({"attn_temperature_tuning": True}, "no_rope_layers is None"),
    "chunk": ({"layer_types": CHUNKED[:3]}, "layer_types has chunked_attention, but attention_chunk_size is None"),
    "both": (
        {"layer_types": [*CHUNKED[:2], MIXED[0]], "attention_chunk_size": 4, "sliding_window": 5},
        r"sliding_attention \(5\) and chunked_attention \(4\)",
    ),
    "ropes": ({"rope_parameters": {"full_attention": None}}, "layer_types has full_attention, too"),
    "limit": ({"experts_swiglu_limit": 7.0, "hidden_act": "gelu"}, r"experts_swiglu_limit \(7.0\) needs .*'gelu'"),
    "limit-0": ({"experts_swiglu_limit": 0}, r"experts_swiglu_limit \(0\) must be above 0"),
    "mla": ({**MLA, "attention_sinks": True}, r"attention_sinks \(True\) needs attention_type 'gqa', not 'mla'"),
    "moa": (
        {"attention_type": "moa", "qk_norm": "l2", "num_key_value_heads": 2},
        r"qk_norm \('l2'\) needs attention_type 'gqa', not 'moa'",
    ),
}


@pytest.mark.parametrize(("changes", "match"), REFUSED.values(), ids=REFUSED)
def test_contradictions_name_the_numbers(changes, match):
    with pytest.raises(StrictDataclassClassValidationError, match=match):
        tiny_config(**changes)
