"""What a run on a GPU takes where nobody chose: the fastest that is right, said in one line."""

from types import SimpleNamespace

import pytest
import torch
from hf_moe.training.main import parse
from hf_moe.training.stages import fastest
from transformers.distributed import DistributedConfig

from hf_moe import HfMoeConfig, HfMoeForCausalLM

from .conftest import SIZES, tiny_hf_moe, tiny_olmoe

GPU = torch.device("cuda")


def args(**changes):
    said = {"device": GPU, "bf16": True, "fp16": False, "packing": True, "packing_strategy": "bfd"}
    return SimpleNamespace(**said | {"padding_free": False, "use_liger_kernel": False} | changes)


@pytest.fixture(autouse=True)
def everything_installed(monkeypatch):
    monkeypatch.setattr(fastest, "find_spec", lambda name: True)
    monkeypatch.setattr(fastest, "unusable", lambda device, dtype, size: None)
    monkeypatch.setattr(fastest, "flash_attention", lambda: None)


def test_hf_moes_own_model():
    model, given = tiny_hf_moe(), args()
    said = fastest.take_fastest(model, given, frozenset())
    assert said == "on this GPU: experts auto; attention varlen; norms and RoPE by Liger"
    assert model.config._experts_implementation == "auto" and model.config._attn_implementation == "varlen"
    assert given.use_liger_kernel


def test_transformers_own_model():
    model, given = tiny_olmoe(), args()
    said = fastest.take_fastest(model, given, frozenset())
    assert said == "on this GPU: experts auto; attention varlen; norms by Liger"
    assert model.config._attn_implementation == "varlen" and not given.use_liger_kernel


def test_experts_that_are_split_over_processes():
    model = tiny_hf_moe()
    model.config.distributed_config = DistributedConfig(fsdp_size=4, ep_size=2)
    assert fastest.experts(model, args()) == "experts auto of 2 processes"


def test_what_is_named_stays():
    model, given = tiny_hf_moe(), args()
    before = model.config._experts_implementation, model.config._attn_implementation
    named = {"experts_implementation", "attn_implementation", "use_liger_kernel"}
    assert fastest.take_fastest(model, given, frozenset(named)) is None
    assert (model.config._experts_implementation, model.config._attn_implementation) == before
    assert not given.use_liger_kernel


def test_without_a_gpu_nothing_changes():
    model = tiny_hf_moe()
    before = model.config._experts_implementation, model.config._attn_implementation
    assert fastest.take_fastest(model, args(device=torch.device("cpu")), frozenset()) is None
    assert (model.config._experts_implementation, model.config._attn_implementation) == before


@pytest.mark.parametrize(
    ("fields", "changes", "taken", "why"),
    [
        ({}, {"packing": False}, "sdpa", "rows are not packed"),
        ({}, {"packing_strategy": "wrapped"}, "sdpa", "rows are not packed"),
        ({}, {"packing": False, "padding_free": True}, "varlen", ""),
        ({"attn_logit_softcapping": 5.0}, {}, "flex_attention", "varlen has no soft-cap"),
        ({"attention_sinks": True}, {}, "flex_attention", "varlen has no sinks"),
        ({"attention_dropout": 0.1}, {}, "sdpa", "varlen has no dropout"),
    ],
)
def test_attention_is_one_that_the_model_can_have(fields, changes, taken, why):
    model = HfMoeForCausalLM(HfMoeConfig(**SIZES, **fields))
    if taken == "sdpa":
        model.set_attn_implementation("sdpa")
    said = fastest.attention(model, args(**changes))
    assert said.startswith(f"attention {taken}") and why in said and model.config._attn_implementation == taken


@pytest.mark.parametrize("missing", ["triton", "liger_kernel"])
def test_what_is_not_installed_is_named_with_the_way_to_it(missing, monkeypatch):
    monkeypatch.setattr(fastest, "find_spec", lambda name: None if name == missing else True)
    given = args()
    said = fastest.take_fastest(tiny_hf_moe(), given, frozenset())
    assert "pip install 'hf_moe[kernels]'" in said
    assert given.use_liger_kernel == (missing == "triton")


def test_an_installed_flash_attention_is_taken(monkeypatch):
    monkeypatch.setattr(fastest, "flash_attention", lambda: "flash_attention_3")
    model, taken = tiny_hf_moe(), []
    monkeypatch.setattr(model, "set_attn_implementation", taken.append)
    assert fastest.attention(model, args()) == "attention flash_attention_3" and taken == ["flash_attention_3"]


def test_a_recipe_and_a_command_line_choose():
    places = ["--model_name_or_path", "m", "--train_data", "d", "--output_dir", "o"]
    words = ["--use_liger_kernel", "false", "--attn_implementation", "null"]
    (given,) = (part for part in parse(["tiny/sft", *places, *words]) if hasattr(part, "chosen"))
    assert {"use_liger_kernel", "optim", "max_length"} <= given.chosen
    assert not {"experts_implementation", "attn_implementation"} & given.chosen
