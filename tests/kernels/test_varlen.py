"""Packed documents compute what each computes alone: full, sliding, chunked and latent attention, with gradients."""

from functools import wraps

import pytest
import torch
from torch.nn.attention import varlen as torch_varlen
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    masking_utils,
)

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.kernels import varlen

SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
OURS = SIZES | {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2, "initializer_range": 0.2}
SLIDING = ["sliding_attention", "full_attention"]
CHUNKED = ["chunked_attention", "full_attention"]
MODELS = {
    "heads": lambda: HfMoeForCausalLM(HfMoeConfig(**OURS)),
    "grouped, a window": lambda: HfMoeForCausalLM(
        HfMoeConfig(**OURS, num_key_value_heads=2, layer_types=SLIDING, sliding_window=3)
    ),
    "chunks": lambda: HfMoeForCausalLM(HfMoeConfig(**OURS, layer_types=CHUNKED, attention_chunk_size=3)),
    "latent": lambda: HfMoeForCausalLM(HfMoeConfig(**OURS, **LATENT, attention_type="mla")),
    "Mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, sliding_window=3)
    ),
    "DeepSeek": lambda: DeepseekV2ForCausalLM(
        DeepseekV2Config(**SIZES, **LATENT, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2)
    ),
    "Llama 4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **SIZES,
            head_dim=8,
            num_key_value_heads=2,
            intermediate_size_mlp=40,
            num_local_experts=4,
            attention_chunk_size=3,
            layer_types=CHUNKED,
        )
    ),
}
CHUNKS_OF_DOCUMENTS = hasattr(masking_utils, "remap_positions_for_packed_sequence")  # Transformers 5.23
LENGTHS = [5, 1, 8, 3]
NOT_READ = {"seq_idx": torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None].int()}


def by_document(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch documents of varlen_attn, a document and a head at a time."""
    assert int(cu_seq_q.diff().max()) <= max_q and window_size[1] == 0 and cu_seq_q is cu_seq_k
    assert (
        query.shape[-1] == key.shape[-1] == value.shape[-1]
        and query.shape[-1] % 8 == 0
        and len(query) == len(key) == int(cu_seq_q[-1])
    )
    assert enable_gqa == (query.shape[1] != key.shape[1])
    repeats = query.shape[1] // key.shape[1]
    rows = []
    for first, end in zip(cu_seq_q.tolist()[:-1], cu_seq_q.tolist()[1:], strict=True):
        place = torch.arange(end - first)
        seen = place[:, None] >= place
        if window_size[0] >= 0:
            seen &= place[:, None] - place <= window_size[0]
        heads = []
        for head in range(query.shape[1]):
            scores = query[first:end, head] @ key[first:end, head // repeats].T * scale
            heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[first:end, head // repeats])
        rows.append(torch.stack(heads, dim=1))
    return torch.cat(rows)


def packed(documents):
    ends = torch.tensor([0, *(len(x) for x in documents)]).cumsum(0).int()
    longest = max(len(x) for x in documents)
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(len(x)) for x in documents])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        **NOT_READ,
    }


def results(model, batches):
    """Logits [T, V] of the batches one after the other, and the gradients of a sum of them."""
    logits = torch.cat([model(**batch, use_cache=False).logits[0] for batch in batches])
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    return logits, dict(
        zip(names, torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True), strict=True)
    )


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kernel", [True, False])
def test_documents_in_a_pack_see_only_themselves(make, kernel, monkeypatch):
    if not kernel and make in (MODELS["chunks"], MODELS["Llama 4"]) and not CHUNKS_OF_DOCUMENTS:
        pytest.skip("this host's masks count chunks from the row's beginning")
    torch.manual_seed(0)
    model = make()
    documents = [torch.randint(0, 37, (length,)) for length in LENGTHS]
    model.set_attn_implementation("eager")
    expected, expected_gradients = results(model, [{"input_ids": x[None]} for x in documents])
    called = []
    if kernel:
        monkeypatch.setattr(varlen, "unusable", lambda *args: None)

        @wraps(by_document)
        def watched(*args, **options):
            called.append(1)
            return by_document(*args, **options)

        monkeypatch.setattr(torch_varlen, "varlen_attn", watched)
    model.set_attn_implementation("varlen")
    actual, gradients = results(model, [packed(documents)])
    assert len(called) == (2 if kernel else 0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in expected_gradients.items():
        if gradient is None:
            assert gradients[name] is None or not gradients[name].any()
        else:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def test_what_has_no_documents_is_sdpas_own():
    torch.manual_seed(0)
    model = MODELS["grouped, a window"]().eval()
    ids = torch.randint(0, 37, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        text = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=6)
        model.set_attn_implementation("varlen")
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)
        assert torch.equal(model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=6), text)


def test_chunks_begin_with_each_document():
    ends = torch.tensor([0, 5, 6, 14, 17], dtype=torch.int32)
    cut = varlen.chunks(ends, 17, 3)
    assert cut.dtype == torch.int32 and cut.unique().tolist() == [0, 3, 5, 6, 9, 12, 14, 17]
    assert len(cut) == 4 + 17 // 3 + 1


@pytest.mark.parametrize("fields", [{"attn_logit_softcapping": 5.0}, {"attention_sinks": True}])
def test_what_it_does_not_have_is_refused(fields):
    model = HfMoeForCausalLM(HfMoeConfig(**OURS, **fields))
    model.set_attn_implementation("varlen")
    with pytest.raises(ValueError, match=r'"varlen" has no (softcap|s_aux): take flex_attention'):
        model(torch.arange(5)[None])


def test_documents_that_see_their_future_are_refused():
    module, heads = torch.nn.Identity(), torch.randn(1, 2, 5, 8)
    output, _ = varlen.varlen_attention_forward(module, heads, heads, heads, None, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    with pytest.raises(ValueError, match=r'"varlen" is causal'):
        varlen.varlen_attention_forward(
            module, heads, heads, heads, None, is_causal=False, cu_seq_lens_q=torch.tensor([0, 5]), max_length_q=5
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["heads", "grouped, a window", "chunks", "latent"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(name, dtype):
    torch.manual_seed(0)
    model = MODELS[name]().cuda()
    batch = {
        key: x.cuda() if isinstance(x, torch.Tensor) else x
        for key, x in packed([torch.randint(0, 37, (length,)) for length in LENGTHS]).items()
    }
    found = {}
    for kind in ("sdpa", "varlen"):
        model.set_attn_implementation(kind)
        with torch.autocast("cuda", dtype):
            logits = model(**batch, use_cache=False).logits.float()
        found[kind] = torch.autograd.grad(logits.square().mean(), list(model.parameters()), allow_unused=True)
        found[kind] += (logits,)
    for actual, expected in zip(found["varlen"], found["sdpa"], strict=True):
        if expected is not None:
            assert (actual - expected).norm() <= 0.05 * expected.norm() + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{"attn_logit_softcapping": 5.0}, {"attention_sinks": True}])
def test_what_it_does_not_have_flex_attention_has(fields):
    torch.manual_seed(0)
    model = HfMoeForCausalLM(HfMoeConfig(**OURS | {"num_attention_heads": 2}, **fields)).cuda()
    batch = {
        key: x.cuda() if isinstance(x, torch.Tensor) else x
        for key, x in packed([torch.randint(0, 37, (length,)) for length in (150, 7, 99)]).items()
    }
    del batch["seq_idx"]
    found = {}
    for kind in ("eager", "flex_attention"):
        model.set_attn_implementation(kind)
        found[kind] = model(**batch, use_cache=False).logits
    torch.testing.assert_close(found["flex_attention"], found["eager"], rtol=2e-3, atol=2e-3)
