"""`hf-moe inspect` on presets and folders, and `hf-moe presets`."""

import json

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_moe import HfMoeForCausalLM
from hf_moe.demo import DEMO_MODEL
from hf_moe.sizes.presets import PRESETS

NAMES = {"total_params", "active_params", "flops_per_token", "kv_cache_bytes_per_token"}


def inspected(command, *words) -> dict:
    code, out, _ = command("inspect", *words, "--json")
    assert code == 0
    return json.loads(out)


def test_a_preset(command):
    report = inspected(command, "deepseek-v2")
    assert report.keys() >= NAMES
    assert round(report["total_params"] / 1e9) == 236
    assert round(report["active_params"] / 1e9) == 21
    assert report["kv_cache_bytes_per_token"] == 60 * (512 + 64) * 2
    assert report["kv_cache_alternatives"] == {
        "MHA": 60 * 2 * 128 * 128 * 2,
        "GQA, 8 key-value heads": 60 * 2 * 8 * 128 * 2,
        "MQA": 60 * 2 * 128 * 2,
    }
    assert report["published"]["total"] == PRESETS["deepseek-v2"]["published"]["total"]


def test_the_table_of_a_preset(command):
    code, out, err = command("inspect", "deepseek-v2")
    assert (code, err) == (0, "")
    assert "235,741,434,880 (236B)\n" in out
    assert "(21.4B), 9.1%\n" in out
    assert "published: 21B\n" in out
    assert "6 of 160" in out
    assert "published: 93.3% less, with this model's cache at 6 bits; computed: 93.3%" in out
    assert "82.2% less" in out


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("qwen3-30b-a3b", ["3.353B, which would round to 3.4B", "4 for keys and values"]),
        ("minicpm-moe-8x2b", ["13.6B; counted that way (no embeddings) this is 13.6B", "as MHA: the same"]),
        ("minimax-text-01", ["45.9B; counted that way (no embeddings, with what is left out here) this is 45.9B"]),
        ("llama-4-scout", ["36 layers within chunks of 8,192", "for each token beyond a chunk", "and 1 shared"]),
    ],
    ids=["mismatch", "counts", "absent", "window"],
)
def test_what_is_special_is_said(command, name, lines):
    out = command("inspect", name).out
    for line in lines:
        assert line in out


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_table(command, name):
    code, out, _ = command("inspect", name)
    assert code == 0
    assert out.startswith(f"{name} ")
    differs = PRESETS[name]["differs"]
    assert differs is None or differs in out


def test_a_longer_context_costs_more(command):
    report = inspected(command, "mixtral-8x7b", "--context", "8192")
    shorter = inspected(command, "mixtral-8x7b")["flops_per_token"]
    assert report["flops_per_token"] - shorter == 32 * 4096 * 2 * 32 * 256


def test_folders_are_counted_as_they_load(command, upcycled, tmp_path):
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
        )
    )
    mixtral.save_pretrained(tmp_path)
    for folder, model in (
        (upcycled, HfMoeForCausalLM.from_pretrained(upcycled)),
        (DEMO_MODEL, LlamaForCausalLM.from_pretrained(DEMO_MODEL)),
        (tmp_path, mixtral),
    ):
        report = inspected(command, folder)
        assert report["total_params"] == sum(parameter.numel() for parameter in model.parameters())
    assert report["active_params"] == report["total_params"] - 2 * 3 * 24 * 20  # 2 of 3 experts in 2 layers


def test_of_a_model_that_sees_pictures_the_language_model_counts(command, tmp_path):
    text = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "head_dim": 6}
    Gemma3Config(text_config=text).save_pretrained(tmp_path)
    with torch.device("meta"):
        alone = Gemma3ForCausalLM(Gemma3TextConfig(**text))
    report = inspected(command, tmp_path)
    assert report["total_params"] == alone.num_parameters()
    assert report["sliding_layers"] == 2


def test_a_dense_model_is_called_one(command):
    report = inspected(command, DEMO_MODEL)
    assert report["active_params"] == report["total_params"]
    assert (report["num_experts"], report["router_type"]) == (0, None)
    assert "none: a dense model" in command("inspect", DEMO_MODEL).out


@pytest.fixture
def wrong(tmp_path):
    """Folders that are each wrong in one way, by name."""
    contents = {
        "unknown": '{"model_type": "no_such_type"}',
        "cut": '{"model_type": "mixtral"',
        "contradicting": '{"model_type": "hf_moe", "num_experts": 2, "num_experts_per_tok": 5}',
        "refused": '{"model_type": "mixtral", "router_jitter_noise": 0.5}',
    }
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("mixtral-8x7",), "did you mean mixtral-8x7b"),
        (("{wrong}/none",), "{wrong}/none is no folder"),
        (("{wrong}/cut/config.json",), "config.json is no folder"),
        (("{wrong}/empty",), "config.json"),
        (("{wrong}/unknown",), "'no_such_type'"),
        (("{wrong}/cut",), "{wrong}/cut/config.json"),
        (("{wrong}/contradicting",), "(5)"),
        (("{wrong}/refused",), "0.5"),
        (("mixtral-8x7b", "--context", "0"), "--context"),
        ((), "PATH_OR_PRESET"),
    ],
    ids=["name", "folder", "file", "empty", "model-type", "cut", "contradicting", "refused", "context", "nothing"],
)
def test_a_mistake_is_one_line(command, wrong, words, named):
    code, out, err = command("inspect", *(word.format(wrong=wrong) for word in words))
    assert (code, out) == (2, "")
    assert err.startswith("hf-moe: ") and len(err.splitlines()) == 1
    assert named.format(wrong=wrong) in err


def test_the_list_of_presets(command):
    code, out, _ = command("presets")
    assert code == 0
    head, *rows = out.splitlines()
    assert head.split()[0] == "preset"
    assert [row.split()[0] for row in rows] == list(PRESETS)
    assert json.loads(command("presets", "--json").out) == json.loads(json.dumps(PRESETS))
