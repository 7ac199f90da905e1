"""Attention against Transformers' own families, on their weights; RoPE of every type against Llama's and Phi-3's."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from hf_moe.model.attention import HfMoeAttention
from hf_moe.model.modeling_hf_moe import MASKS
from hf_moe.model.rotary import HfMoeRotaryEmbedding
from tests.conftest import tiny_config, tiny_model, tokens

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
}
WIDE = {**SIZES, "head_dim": 10}
FAMILIES = {
    "llama-gqa": (LlamaConfig, LlamaAttention, SIZES, {}),
    "llama-mha": (LlamaConfig, LlamaAttention, {**SIZES, "num_key_value_heads": 6}, {"num_key_value_heads": 6}),
    "llama-mqa": (LlamaConfig, LlamaAttention, {**SIZES, "num_key_value_heads": 1}, {"num_key_value_heads": 1}),
    "llama-bias": (
        LlamaConfig,
        LlamaAttention,
        {**WIDE, "attention_bias": True},
        {"head_dim": 10, "attention_bias": True, "attention_output_bias": True},
    ),
    "qwen2-qkv-bias": (Qwen2Config, Qwen2Attention, SIZES, {"attention_bias": True}),
    "qwen3-head-norm": (Qwen3Config, Qwen3Attention, WIDE, {"head_dim": 10, "qk_norm": "head"}),
    "olmoe-projection-norm": (
        OlmoeConfig,
        OlmoeAttention,
        {**SIZES, "clip_qkv": 0.5},
        {"qk_norm": "projection", "clip_qkv": 0.5},
    ),
    "mistral-window": (MistralConfig, MistralAttention, {**SIZES, "sliding_window": 4}, {"sliding_window": 4}),
    "gemma2-softcap": (
        Gemma2Config,
        Gemma2Attention,
        {**WIDE, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 1.5, "layer_types": ["full_attention"] * 3},
        {"head_dim": 10, "attn_logit_softcapping": 1.5},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_transformers(family, implementation):
    config_class, attention_class, their_fields, our_fields = FAMILIES[family]
    if family == "gemma2-softcap" and implementation == "sdpa":
        pytest.skip("sdpa cannot cap logits")
    their_config = config_class(**their_fields, attn_implementation=implementation, rms_norm_eps=1e-5)
    theirs = attention_class(their_config, layer_idx=1).eval()
    config = tiny_config(**our_fields)
    config._attn_implementation = implementation
    ours = HfMoeAttention(config, layer_idx=1).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())

    x = torch.randn(2, 13, 48)
    padding = torch.ones(2, 13)
    padding[0, :4] = 0
    positions = torch.arange(13).unsqueeze(0)
    rotary = HfMoeRotaryEmbedding(config)(x, positions)
    mask = MASKS[config.layer_types[1]](
        config=config, inputs_embeds=x, attention_mask=padding, past_key_values=None, position_ids=positions
    )
    kwargs = {"position_embeddings": rotary, "attention_mask": mask}
    torch.testing.assert_close(ours(x, **kwargs)[0], theirs(x, **kwargs)[0])


def test_the_window_is_seen():
    model = tiny_model(sliding_window=4, num_hidden_layers=1, mlp_layer_types=["dense"])
    x = tokens(1, 12)
    changed = x.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 97
    with torch.no_grad():
        difference = (model(x).logits - model(changed).logits).abs().amax(-1)[0]
    assert (difference[3:7] > 1e-4).all() and (difference[7:] == 0).all() and (difference[:3] == 0).all()


def test_layer_types_mix():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_model(sliding_window=4, layer_types=types)
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [4, None, 4]


ROPE = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("rope_type", ROPE)
@pytest.mark.parametrize("length", [20, 150], ids=["short", "beyond-the-maximum"])
def test_every_rope_type_equals_llamas(rope_type, length):
    parameters = {"rope_theta": 5000.0, **ROPE[rope_type]}
    ours = HfMoeRotaryEmbedding(tiny_config(rope_parameters=dict(parameters)))
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SIZES, rope_parameters=dict(parameters)))
    x, positions = torch.randn(1, length, 48), torch.arange(length).unsqueeze(0)
    for mine, other in zip(ours(x, positions), theirs(x, positions), strict=True):
        torch.testing.assert_close(mine, other)


def test_rope_types_are_all_there():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPE_INIT_FUNCTIONS) <= set(ROPE)


def test_partial_rotary_equals_phi3s_and_leaves_the_rest_alone():
    parameters = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    ours = HfMoeRotaryEmbedding(tiny_config(rope_parameters=dict(parameters)))
    theirs = Phi3RotaryEmbedding(Phi3Config(**SIZES, rope_parameters=dict(parameters), pad_token_id=0))
    x, positions = torch.randn(1, 9, 48), torch.arange(9).unsqueeze(0)
    cos, sin = ours(x, positions)
    torch.testing.assert_close((cos, sin), theirs(x, positions))

    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    from hf_moe.model.rotary import rotate

    q, k = torch.randn(1, 6, 9, 8), torch.randn(1, 2, 9, 8)
    torch.testing.assert_close((rotate(q, cos, sin), rotate(k, cos, sin)), apply_rotary_pos_emb(q, k, cos, sin))
    assert torch.equal(rotate(q, cos, sin)[..., 4:], q[..., 4:])


def test_interleaved_rope_is_half_rope_on_reordered_rows():
    half, interleaved = tiny_model(), tiny_model(rope_interleave=True)
    order = torch.cat((torch.arange(0, 8, 2), torch.arange(1, 8, 2))).argsort()  # from halves to pairs side by side
    for layer in interleaved.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data = projection.weight.data.unflatten(0, (-1, 8))[:, order].flatten(0, 1)
    x = tokens()
    with torch.no_grad():
        torch.testing.assert_close(interleaved(x).logits, half(x).logits, rtol=1e-4, atol=1e-4)


def test_soft_capping_chooses_eager_and_refuses_sdpa():
    model = tiny_model(attn_logit_softcapping=5.0)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"attn_logit_softcapping \(5.0\) needs attn_implementation eager"):
        model.set_attn_implementation("sdpa")


def test_soft_capping_in_flex_attention():
    model = tiny_model(attn_logit_softcapping=0.5, head_dim=16)
    x = tokens(2, 16)
    with torch.no_grad():
        eager = model(x).logits
        model.set_attn_implementation("flex_attention")
        flex = model(x).logits
    torch.testing.assert_close(flex, eager, rtol=1e-4, atol=1e-4)


def test_final_soft_capping():
    plain, capped = tiny_model(), tiny_model(final_logit_softcapping=2.0)
    x = tokens()
    with torch.no_grad():
        torch.testing.assert_close(capped(x).logits, 2.0 * torch.tanh(plain(x).logits / 2.0))
