"""Every strategy on grafts whose feed-forward networks differ most, and what can't be cut."""

import re
from importlib import import_module

import pytest
import torch
from hf_moe.conversion import upcycle
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests import picture_families
from tests.conftest import tokens
from tests.conversion.test_upcycling import EQUAL, REPORTED, assert_equal, convert
from tests.dense_families import tiny

# Hybrid, sandwich norms, one matrix with biases, fused gate and up, multipliers beside a state space.
FAMILIES = ("qwen3_5_text", "gemma3_text", "gpt_neox", "phi3", "falcon_h1")
FAMILIES += ("llava",)  # which reads pictures, too
WIDTH = 96


@pytest.fixture(autouse=True)
def read_words(monkeypatch):
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(128)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    for name in ("upcycling.evidence", "verify"):
        monkeypatch.setattr(import_module(f"hf_moe.conversion.{name}"), "load_tokenizer", lambda folder: tokenizer)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """sources(family) -> the dense model, its folder, token ids and their logits."""
    made = {}

    def make(family: str) -> tuple:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            make = picture_families.tiny if family in picture_families.PICTURES else tiny
            model = make(family, intermediate_size=WIDTH, initializer_range=0.2)
            model.save_pretrained(folder)
            text = tokens(1, 300, 61, seed=5)[0].tolist()
            (folder / "calibration.txt").write_text(" ".join(f"w{index}" for index in text))
            (folder / "prompts.yaml").write_text("- w1 w2 w3\n- [w4 w5, w6]\n- w7 w8\n")
            ids = tokens(length=19, vocab_size=61)
            with torch.inference_mode():
                made[family] = model, folder, ids, model(ids).logits
        return made[family]

    return make


@pytest.mark.parametrize("case", EQUAL | REPORTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_matrix(family, case, sources, tmp_path):
    dense, folder, ids, logits = sources(family)
    report = convert(folder, tmp_path / "moe", **(EQUAL | REPORTED)[case], layers="0,2", graft=True)
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    assert isinstance(moe, type(dense))
    with torch.inference_mode():
        found = moe(ids).logits
    if case in EQUAL:
        assert_equal(found, logits)
        assert report["equal_at_step_0"] or case == "merge-identical"
    else:
        assert not report["equal_at_step_0"]
        assert torch.isfinite(found).all() and (found - logits).abs().max() > 1e-4


@pytest.mark.parametrize(("family", "said"), {"bitnet": "RMSNorm over all its neurons", "apertus": "learns"}.items())
@pytest.mark.parametrize("options", [{"granularity": 4, "strategy": "granular"}, {"strategy": "shared"}], ids=str)
def test_what_is_not_cut(family, said, options, tmp_path):
    tiny(family).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        upcycle(tmp_path / "dense", tmp_path / "moe", experts=2, top_k=1, progress=False, **options)
    assert "\n" not in str(raised.value) and not (tmp_path / "moe").exists()


def test_widths_that_differ_by_layer(tmp_path):
    dense = tiny("gemma3n_text", intermediate_size=[24, 32, 40, 24])
    dense.save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=2, top_k=1, granularity=2, progress=False)
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    assert moe.config.moe_intermediate_size == [12, 16, 20, 12] and moe.config.num_experts == 4
    ids = tokens(length=9, vocab_size=61)
    with torch.inference_mode():
        torch.testing.assert_close(moe(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_a_source_on_the_hub_is_asked_for_once(family, tmp_path, monkeypatch):
    tiny(family).save_pretrained(tmp_path / "dense")
    asked = []

    def download(name, **kwargs):
        asked.append(name)
        return str(tmp_path / "dense")

    monkeypatch.setattr(import_module("hf_moe.conversion.files.source"), "snapshot_download", download)
    report = upcycle("some/model", tmp_path / "moe", experts=2, top_k=1, dry_run=True)
    assert asked == ["some/model"] == [report["source"]]
