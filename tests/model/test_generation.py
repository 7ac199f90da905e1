"""Everything a user calls to get text: caches, padding, beams, drafts, batching, compilation."""

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from hf_moe.demo import DEMO_MODEL
from tests.conftest import FEW_PAGES, compiles_backward, on_the_gpu, tiny_model, tokens

VARIANTS = {
    "softmax": {},
    "window": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "v3-router": {
        "router_type": "sigmoid_topk",
        "router_args": {"selection_bias": True},
        "num_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_shared_experts": 1,
    },
    "plain-experts": {"gated_mlp": False, "hidden_act": "gelu", "mlp_bias": True, "router_type": "topk_softmax"},
}


def greedy_without_cache(model, ids, steps):
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "cache",
    [
        "dynamic",
        "static",
        pytest.param("offloaded", marks=pytest.mark.gpu),
        pytest.param("offloaded_static", marks=pytest.mark.gpu),
    ],
)
def test_cached_decoding_equals_the_full_forward(variant, cache):
    model, ids = tiny_model(**VARIANTS[variant]), tokens(2, 7)
    if "offloaded" in cache:
        model, ids = on_the_gpu(model, ids)
    options = {"cache_implementation": cache, "disable_compile": True, "max_new_tokens": 9, "do_sample": False}
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(generated, greedy_without_cache(model, ids, 9))


def test_left_padding_changes_nothing():
    model, ids = tiny_model(), tokens(1, 6)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(10) >= 4).long().unsqueeze(0)
    batch, masks = torch.cat((padded, tokens(1, 10, seed=3))), torch.cat((mask, torch.ones_like(mask)))
    generated = model.generate(batch, attention_mask=masks, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated[:1, 4:], greedy_without_cache(model, ids, 8))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_mtp": True}], ids=["greedy", "beams", "drafts"])
def test_a_string_stops_the_text(options):
    """The tokenizer that generate() needs for it is no argument of a forward."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = tiny_model(vocab_size=512, num_mtp_layers=1)
    ids = tokens(1, 7, vocab_size=512)
    greedy = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8, **options}
    whole = model.generate(ids, **greedy)
    word = tokenizer.decode(whole[0, 9])
    stopped = model.generate(ids, stop_strings=[word], tokenizer=tokenizer, **greedy)
    assert ids.shape[1] < stopped.shape[1] <= 10
    assert torch.equal(stopped, whole[:, : stopped.shape[1]]) or "num_beams" in options


def test_beam_search_finds_at_least_as_good_a_text_as_greedy():
    model, ids = tiny_model(), tokens(1, 5)

    def log_probability(sequence):
        with torch.no_grad():
            logits = model(sequence).logits[:, 4:-1].log_softmax(-1)
        return logits.gather(-1, sequence[:, 5:, None]).sum()

    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    beams = model.generate(ids, num_beams=4, **options)
    assert log_probability(beams) >= log_probability(model.generate(ids, **options))


def test_a_dense_draft_model_assists():
    model, ids = tiny_model(), tokens(1, 6)
    draft = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=4,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, assistant_model=draft, **options), model.generate(ids, **options))


def test_the_first_layers_assist():
    model, ids = tiny_model(), tokens(1, 6)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, assistant_early_exit=2, **options), greedy_without_cache(model, ids, 8))


def test_continuous_batching():
    model = tiny_model()
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 8, 5)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(prompts, config, FEW_PAGES, progress_bar=False)
    assert len(results) == 3
    for result in results.values():
        prompt = torch.tensor([result.prompt_ids])
        expected = greedy_without_cache(model, prompt, 6)[0, prompt.shape[1] :].tolist()
        assert result.generated_tokens == expected


@pytest.mark.parametrize("variant", ["softmax", "v3-router"])
def test_compiles_as_one_graph(variant):
    model, ids = tiny_model(**VARIANTS[variant]), tokens(2, 9)
    assert model.config._experts_implementation == "grouped_mm"
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4
        )


@compiles_backward
def test_the_training_step_compiles_as_one_graph():
    model, ids = tiny_model(router_z_loss_coef=0.001).train(), tokens(2, 9)
    expected = model(ids, labels=ids, use_cache=False).loss
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_exports_for_any_shape():
    """Python's len() of a tensor would fix the number of tokens in the program; heads and hashes count tokens."""
    model = tiny_model(attention_type="moa", router_type="hash", num_hidden_layers=1, mlp_layer_types=["sparse"])
    shapes = {"input_ids": dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC), "use_cache": None}
    inputs, others = ({"input_ids": tokens(*shape), "use_cache": False} for shape in ((2, 11), (3, 7)))
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
        torch.testing.assert_close(program.module()(**others).logits, model(**others).logits)


def test_generates_from_embeddings():
    model = tiny_model()
    ids, greedy = tokens(), {"max_new_tokens": 5, "do_sample": False}
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **greedy), model.generate(ids, **greedy)[:, 11:])
