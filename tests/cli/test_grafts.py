"""`hf-moe inspect` and `hf-moe plan` of grafts."""

import json

import pytest
from hf_moe.conversion import upcycle

from hf_moe import HfMoeGraftConfig, HfMoeGraftForCausalLM
from tests.dense_families import config_of, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("sizes")
    tiny("qwen3_5_text").save_pretrained(where / "dense")
    upcycle(where / "dense", where / "moe", experts=4, top_k=2, progress=False, verify=False, layers="0,2")
    return where / "moe"


def test_the_commands_say_it(command, folder):
    code, out, _ = command("inspect", folder)
    assert code == 0
    for line in (
        "experts grafted onto a qwen3_5_text (Qwen3_5ForCausalLM)",
        "upcycle copy of dense, a qwen3_5_text",
        "4: 3 linear_attention, 1 full_attention; attention of 4 heads, 2 for keys and values",
        "2 of 4, each 24 wide, in 2 layers; router topk_softmax",
        "64 bytes in bfloat16, and 6,488,064 whatever their number",
    ):
        assert line in out
    report = json.loads(command("inspect", folder, "--json").out)
    assert report["provenance"]["method"] == "upcycle" and report["layer_types"]["linear_attention"] == 3
    code, out, _ = command("plan", folder, "--length", "16")
    assert code == 0 and "no run of a grafted qwen3_5_text was measured; give --tflops or --mfu" in out
    code, out, _ = command("plan", folder, "--length", "16", "--tflops", "300", "--tokens", "1e6")
    assert code == 0 and "300 TFLOP/s a GPU" in out and "GPU-days" in out and "unknown" not in out


def test_a_cache_that_the_host_does_not_show_is_unknown(command, tmp_path):
    HfMoeGraftForCausalLM(HfMoeGraftConfig(backbone=config_of("openai-gpt"))).save_pretrained(tmp_path)
    code, out, _ = command("inspect", tmp_path)
    assert code == 0 and "unknown: its host, openai-gpt, shows none" in out


@pytest.mark.parametrize("name", ["inspect", "plan"])
def test_of_a_model_on_the_hub_the_config_is_read(name, command, folder, monkeypatch):
    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(folder)

    monkeypatch.setattr("hf_moe.conversion.files.source.snapshot_download", download)
    code, out, _ = command(name, "some/model", "--json")
    assert (code, asked) == (0, [("some/model", ["config.json"])])
    assert json.loads(out)["model"] == "some/model"
