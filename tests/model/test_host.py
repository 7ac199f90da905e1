"""What the model's files take from Transformers is what they were written against, and nothing vanishes on the way."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Cache, DynamicCache, GenerationMixin, LlamaConfig, PreTrainedModel

import hf_moe
from hf_moe.model import host, modeling_hf_moe
from hf_moe.model.decoding import HfMoeReservedLayer
from hf_moe.model.growing_layer import HfMoeGrowingLayer
from tests import picture_families
from tests.conftest import tiny_config, tiny_model, tokens
from tests.renamed_host import copy_renamed

MODEL = Path(hf_moe.__file__).with_name("model")
METHODS = [(owner, name) for owner, methods in host.PRIVATE.items() for name in methods]
OURS = [getattr(modeling_hf_moe, name) for name in modeling_hf_moe.__all__]
OURS += [hf_moe.HfMoeGraftForCausalLM, hf_moe.HfMoeGraftForImageTextToText, HfMoeReservedLayer, HfMoeGrowingLayer]
LLAMA = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(("owner", "name"), METHODS, ids=lambda x: getattr(x, "__name__", x))
def test_the_host_takes_the_arguments_that_are_written_down(owner, name):
    written, reason = host.PRIVATE[owner][name]
    assert reason
    assert written is None or host.arguments(getattr(owner, name)) == written


@pytest.mark.parametrize("ours", OURS, ids=lambda x: x.__name__)
def test_every_private_method_that_is_overridden_is_written_down(ours):
    listed = {name for _, name in METHODS}
    of_the_host = [x for x in ours.__mro__ if x.__module__.startswith("transformers.")]
    assert of_the_host
    for base in ours.__mro__:
        if not base.__module__.startswith("hf_moe."):
            continue
        for name, value in vars(base).items():
            private = name.startswith("_") and not name.startswith("__") and inspect.isfunction(value)
            if private and any(hasattr(x, name) for x in of_the_host):
                assert name in listed, f"{base.__name__}.{name} overrides the host's"


def test_private_names_of_the_host_are_imported_by_the_seam_alone():
    for path in sorted(MODEL.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                private = [x.name for x in node.names if x.name.startswith("_")]
                assert path.name == "host.py" or not private, (path.name, private)


def test_the_mask_functions_take_the_cache_in_fourth_place():
    for function in modeling_hf_moe.MASKS.values():
        assert list(inspect.signature(function).parameters)[3] == host.CACHE


# ---- nothing is swallowed ----


@pytest.mark.parametrize(
    "ours", [getattr(hf_moe, name) for name in hf_moe.__all__ if name.startswith("HfMoe") and "Config" not in name]
)
def test_a_keyword_that_nobody_takes_is_refused_by_name(ours):
    backbones = {
        hf_moe.HfMoeGraftForCausalLM: LlamaConfig(**LLAMA),
        hf_moe.HfMoeGraftForImageTextToText: picture_families.config_of("llava"),
    }
    grafted = ours in backbones
    config = hf_moe.HfMoeGraftConfig(backbone=backbones[ours]) if grafted else tiny_config(num_labels=2)
    model = ours(config).eval()
    for name in ("kv_store", "atention_mask", "output_router_logit"):
        with pytest.raises(TypeError, match=f"forward\\(\\) got an unexpected keyword argument '{name}'"):
            model(tokens(1, 5), **{name: None})
    with pytest.raises((TypeError, ValueError), match="past_key_value_s"):
        model(tokens(1, 5), past_key_value_s=DynamicCache())


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("base", [True, False], ids=["decoder", "causal"])
def test_the_cache_comes_by_either_name(name, base):
    model, ids = tiny_model(), tokens(2, 9)
    model = model.model if base else model
    with torch.no_grad():
        whole = model(ids)[0]
        cache = getattr(model(ids[:, :6], use_cache=True), host.CACHE)
        assert isinstance(cache, Cache)
        rest = model(ids[:, 6:], **{name: cache}, use_cache=True)[0]
    torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-4, atol=1e-4)


def test_one_cache_is_enough():
    model, caches = tiny_model(), {"cache": DynamicCache(), "past_key_values": DynamicCache()}
    with pytest.raises(TypeError, match="Give the cache once"):
        model(tokens(1, 5), **caches)


def test_attention_of_continuous_batching_without_its_cache_is_refused():
    model = tiny_model()
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(TypeError, match="no paged cache came"):
        model(tokens(1, 5))


def test_the_shown_signature_has_the_hosts_name_for_the_cache():
    for ours in (hf_moe.HfMoeModel, hf_moe.HfMoeForCausalLM):
        assert host.CACHE in inspect.signature(ours.forward).parameters
    ours, theirs = hf_moe.HfMoeForCausalLM.prepare_inputs_for_generation, PreTrainedModel
    theirs = GenerationMixin.prepare_inputs_for_generation
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert ours.__doc__ != theirs.__doc__


# ---- hosts that were not tested ----


def test_an_older_host_is_refused_and_a_newer_one_said(caplog, monkeypatch):
    with pytest.raises(ImportError, match=r"needs Transformers 5\.21 or newer, this is 5\.20\.2: pip install"):
        host.check_version("5.20.2")
    newest = host.TESTED[1]
    host.check_version(f"{newest[0]}.{newest[1]}.9")
    said = []
    monkeypatch.setattr(host.logger, "warning_once", said.append)
    host.check_version(f"{newest[0]}.{newest[1] + 1}.0.dev0")
    assert len(said) == 1 and f"this is {newest[0]}.{newest[1] + 1}.0.dev0" in said[0]


def test_a_newer_host_that_differs_is_refused(monkeypatch):
    monkeypatch.setitem(host.PRIVATE[Cache], "update", ("self, key_states", "a test"))
    monkeypatch.setitem(host.PRIVATE[Cache], "crop_all", ("self", "a test"))
    with pytest.raises(
        ImportError, match=r"Cache\.update takes \(self, .*\), not \(self, key_states\) \(and 1 more\)"
    ):
        host.check_version("6.0.0")


# Right text, or an error: what a renamed keyword may do. Runs with the renamed host first on the path.
WITH_A_RENAMED_HOST = """
import sys, json, torch
import hf_moe
from tests.conftest import tiny_model, tokens
from tests.model.test_generation import greedy_without_cache
for fields in ({}, {"num_mtp_layers": 1}):
    model, ids = tiny_model(**fields), tokens(2, 7)
    options = {"use_mtp": True} if fields else {}
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(text, greedy_without_cache(model, ids, 6)), "ANOTHER TEXT"
print("THE SAME TEXT")
"""


@pytest.mark.parametrize(
    ("old", "right"),
    [
        (host.CACHE, True),
        # Of a host that still takes the old name beside the new one: that it no longer does.
        *([("past_key_values", True)] if host.CACHE != "past_key_values" else []),
        ("attention_mask", False),
        ("next_sequence_length", False),
    ],
)
def test_a_host_that_renames_a_keyword_writes_the_same_text_or_fails(old, right, tmp_path):
    copy_renamed(tmp_path, old, f"{old}_as_renamed", version=f"{host.TESTED[1][0]}.{host.TESTED[1][1] + 1}.0")
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), root)), "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", WITH_A_RENAMED_HOST], env=env, capture_output=True, text=True)
    assert "ANOTHER TEXT" not in result.stderr
    assert (result.returncode == 0) == right, result.stderr[-2000:]
    if right:
        assert "THE SAME TEXT" in result.stdout
        assert "this is" in result.stderr  # said once
    else:
        assert old in result.stderr
