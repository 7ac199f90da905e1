"""fast_generate: Transformers' own models write the same texts, on a GPU by recorded steps, and else stay."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OlmoeForCausalLM

from hf_moe import (
    HfMoeGraftConfig,
    HfMoeGraftForCausalLM,
    HfMoeGraftForImageTextToText,
    fast_generate,
    fast_generation,
)
from hf_moe.model import decoding
from hf_moe.model.decoding import KEPT, HfMoeReservedCache
from tests import picture_families
from tests.conftest import tiny_model
from tests.families import tiny
from tests.recordings import decode_on_cpu

DENSE = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
DENSE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 64}
# With kernels of attention, blocks and layers; glm4_moe with those of norms, gpt_oss with none.
FAMILIES = (
    "olmoe",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "deepseek_v2",
    "granitemoe",
    "graft",
    "glm4_moe",
    "gpt_oss",
)
CPU_FAMILIES = ("olmoe", "deepseek_v2", "gpt_oss", "graft")


def model_of(family: str, **changes):
    if family != "graft":
        return tiny(family, **{"num_hidden_layers": 2, "initializer_range": 0.2, "eos_token_id": None} | changes)
    torch.manual_seed(0)
    config = HfMoeGraftConfig(backbone=LlamaConfig(**DENSE), num_experts=6, num_experts_per_tok=2)
    return HfMoeGraftForCausalLM(config).eval()


def prompts(device: str, rows: int = 3, length: int = 9, padding: int = 2):
    ids = torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


# ---- what stays ----


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "graft"])
def test_saved_files_names_and_classes_stay(family, tmp_path):
    model = model_of(family)
    kind, shown = type(model), repr(model)
    model.save_pretrained(tmp_path / "before")
    assert fast_generate(model) is model and fast_generate(model) is model
    model.save_pretrained(tmp_path / "after")
    before, after = ({x.name: x.read_bytes() for x in (tmp_path / name).iterdir()} for name in ("before", "after"))
    assert before == after and "model.safetensors" in before
    assert isinstance(model, kind) and type(model).__name__ == kind.__name__ and repr(model) == shown
    if family != "graft":
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "after")) is kind


def test_a_forward_and_what_it_records_stay():
    plain, model = model_of("olmoe"), fast_generate(model_of("olmoe"))
    model.set_experts_implementation("grouped_mm")  # ours would be interpreted
    asked = {"output_hidden_states": True, "output_router_logits": True, "labels": prompts("cpu")["input_ids"]}
    expected, actual = (x(**prompts("cpu"), **asked) for x in (plain, model))
    assert len(actual.router_logits) == len(expected.router_logits) == 2
    for name in ("loss", "logits", "aux_loss", "hidden_states", "router_logits"):
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_is_fast_too(twin):
    model = fast_generate(model_of("olmoe"))
    other = twin(model)
    assert type(other) is type(model)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    assert other.lm_head.weight is not model.lm_head.weight


def test_models_of_ours_are_fast_as_they_are():
    model = tiny_model()
    kind = type(model)
    assert type(fast_generate(model)) is kind


@pytest.mark.parametrize(("chosen", "becomes"), [("grouped_mm", "hf_moe"), ("eager", "hf_moe"), ("auto", "auto")])
def test_experts_that_may_wait_for_the_device_become_ours(chosen, becomes):
    model = model_of("olmoe")
    model.set_experts_implementation(chosen)
    assert fast_generate(model).config._experts_implementation == becomes


# ---- what can't be ----


class Guessing(OlmoeForCausalLM):
    _can_compile_fullgraph = False


REFUSED = {
    "dense": (lambda: LlamaForCausalLM(LlamaConfig(**DENSE)), "LlamaForCausalLM: it has no experts that"),
    "experts of its own": (lambda: tiny("dbrx"), "it has no experts that Transformers' experts interface calls"),
    "states": (lambda: tiny("qwen3_next"), r"more than a key and a value a token and layer \(LinearAttentionLayer\)"),
    "no model": (lambda: torch.nn.Linear(2, 2), "Linear: it is no model of Transformers that generates"),
    "decoder alone": (lambda: tiny("olmoe").model, "OlmoeModel: it is no model of Transformers that generates"),
    "by values": (lambda: Guessing(tiny("olmoe").config), "_can_compile_fullgraph"),
    "pictures": (
        lambda: HfMoeGraftForImageTextToText(HfMoeGraftConfig(backbone=picture_families.config_of("llava"))),
        "reads more than one text",
    ),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_can_never_be_recorded_is_refused_in_one_line(make, reason):
    model = make()
    kind = type(model)
    with pytest.raises(ValueError, match=f"^fast_generate can't record .*{reason}") as error:
        fast_generate(model)
    assert "\n" not in str(error.value) and type(model) is kind


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "is on cpu, not on a GPU"),
        ({"num_beams": 2}, "beam_search has no recorded step"),
        ({"cache_implementation": "dynamic"}, "cache_implementation is 'dynamic'"),
        ({"use_cache": False}, "use_cache is false"),
        ({"disable_compile": True}, "disable_compile is true"),
    ],
)
def test_a_warning_says_why_a_text_is_as_before(options, reason, monkeypatch):
    said, (model, plain), inputs = [], (model_of("olmoe"), model_of("olmoe")), prompts("cpu")
    monkeypatch.setattr(fast_generation.logger, "warning_once", said.append)
    fast_generate(model).set_experts_implementation("grouped_mm")  # ours would be interpreted
    text = model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
    assert torch.equal(text, plain.generate(**inputs, max_new_tokens=5, do_sample=False, **options))
    assert len(said) == 1 and reason in said[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.train(), "in training mode"),
        (lambda model: model.set_experts_implementation("eager"), "eager experts count tokens on the host"),
        (lambda model: model.model.norm.register_forward_hook(print), "a hook on a module"),
        (lambda model: model.config.rope_parameters.update(rope_type="longrope"), "RoPE looks at the length"),
        (lambda model: model.set_attn_implementation("varlen"), "its attention is 'varlen'"),
        (lambda model: setattr(model, "hf_device_map", {"": 0, "lm_head": 1}), "is on several devices"),
    ],
)
def test_each_obstacle_is_named(change, reason):
    model = fast_generate(model_of("olmoe"))
    before = list(decoding.obstacles(model))
    change(model)
    (new,) = [x for x in decoding.obstacles(model) if x not in before]
    assert reason in new


# ---- texts ----


@pytest.fixture
def steps_on_cpu(monkeypatch):
    decode_on_cpu(monkeypatch)


@pytest.mark.parametrize("family", CPU_FAMILIES)
def test_texts_are_those_of_transformers(family, steps_on_cpu):
    plain, model, inputs = model_of(family), fast_generate(model_of(family)), prompts("cpu")
    model.set_experts_implementation("grouped_mm")  # ours would be interpreted
    eos = int(plain.generate(**inputs, max_new_tokens=10, do_sample=False)[0, 14])
    for options in ({"do_sample": False}, {"do_sample": False, "eos_token_id": eos}, {"do_sample": True}):
        texts = []
        for writer in (plain, model):
            torch.manual_seed(3)
            texts.append(writer.generate(**inputs, max_new_tokens=10, return_dict_in_generate=True, **options))
        assert torch.equal(texts[0].sequences, texts[1].sequences)
        assert isinstance(getattr(texts[1], decoding.CACHE), HfMoeReservedCache)


@pytest.mark.gpu
@pytest.mark.parametrize("padding", [0, 2], ids=["no padding", "left padding"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_texts_are_those_of_transformers(family, rows, padding):
    plain, model = model_of(family).cuda(), fast_generate(model_of(family).cuda())
    inputs = prompts("cuda", rows, padding=padding)
    plain.set_experts_implementation("eager")
    expected = plain.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), expected)
    graph = KEPT[model].step
    assert graph is not None
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False), expected)
    assert KEPT[model].step is graph
    sampled = model.generate(**inputs, max_new_tokens=20, do_sample=True)
    assert sampled.shape == expected.shape and KEPT[model].step is graph


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_logits_in_bf16(family):
    model, inputs = fast_generate(model_of(family).to("cuda", torch.bfloat16)), prompts("cuda")
    options = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, **options)
    assert getattr(out, decoding.CACHE).step is not None
    whole = torch.cat((inputs["attention_mask"], torch.ones_like(out.sequences[:, 9:])), dim=1)
    position_ids = (whole.cumsum(-1) - 1).clamp_min(0)
    expected = model(out.sequences, attention_mask=whole, position_ids=position_ids).logits[:, 8:-1].float()
    error = (torch.stack(out.logits, dim=1) - expected).abs().amax(-1) / expected.abs().max()  # [B, N]
    assert error.median() < 3e-2  # a tie between experts may fall the other way: that changes single tokens
