"""A saved folder is enough: it loads where hf_moe is not installed, also through the Hub's cache, and saves again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_moe
from tests.conftest import tiny_config, tiny_model, tokens

MODEL_FILES = {path.name for path in Path(hf_moe.__file__).with_name("model").glob("*.py")} - {"__init__.py"}
OF_GRAFTS = {"modeling_hf_moe_graft.py", "configuration_hf_moe_graft.py", "feed_forward.py", "host_code.py"}
MODEL_FILES -= OF_GRAFTS

# Runs where hf_moe cannot be imported; prints the logits of two Auto classes, saves again, loads what it saved.
WITHOUT_HF_MOE = """
import json, sys
class NoHfMoe:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_moe":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoHfMoe())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification
repo, again, ids = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
def logits(path):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        return model, model(ids).logits
model, first = logits(repo)
assert "hf_moe" not in sys.modules
model.save_pretrained(again)
_, second = logits(again)
torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)  # the weights lie elsewhere: other kernels
hidden = AutoModel.from_pretrained(again, trust_remote_code=True).eval()(ids).last_hidden_state
AutoModelForTokenClassification.from_pretrained(again, trust_remote_code=True)
auto_map = AutoConfig.from_pretrained(again, trust_remote_code=True).auto_map
print(json.dumps({"logits": first.tolist(), "hidden": hidden.tolist(), "auto_map": auto_map}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = tiny_model(router_type="sigmoid_topk", router_args={"selection_bias": True}, tie_word_embeddings=True)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_()
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return model, folder


def test_every_file_of_the_model_travels(saved):
    _, folder = saved
    assert {path.name for path in folder.glob("*.py")} == MODEL_FILES
    for name in MODEL_FILES:
        assert (folder / name).read_bytes() == Path(hf_moe.__file__).with_name("model").joinpath(name).read_bytes()


def test_loads_with_hf_moe_bit_for_bit(saved):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is hf_moe.HfMoeForCausalLM
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert type(AutoModel.from_pretrained(folder)) is hf_moe.HfMoeModel


def test_bf16_loading_keeps_the_selection_bias_exact(saved):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    bias = loaded.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, model.model.layers[1].mlp.gate.e_score_correction_bias)
    assert loaded.model.layers[1].mlp.experts.down_proj.dtype == torch.bfloat16


def hub_snapshot(folder: Path, cache: Path) -> str:
    """Lay `folder` out as the Hub's cache does: blobs, and a snapshot of links to them."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = cache / "hub" / "models--someone--some-moe"
    for name in ("refs", "blobs", f"snapshots/{revision}"):
        (repo / name).mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    for number, path in enumerate(sorted(folder.iterdir())):
        (repo / "blobs" / str(number)).write_bytes(path.read_bytes())
        (repo / "snapshots" / revision / path.name).symlink_to(f"../../blobs/{number}")
    return "someone/some-moe"


def test_loads_without_hf_moe_through_the_hub_cache_and_saves_again(saved, tmp_path):
    model, folder = saved
    ids = tokens(2, 9)
    repo = hub_snapshot(folder, tmp_path / "cache")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_HF_MOE, repo, str(tmp_path / "again"), json.dumps(ids.tolist())]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    printed = json.loads(result.stdout.splitlines()[-1])
    with torch.no_grad():
        expected = model(ids)
        hidden = model.model(ids).last_hidden_state
    torch.testing.assert_close(torch.tensor(printed["logits"]), expected.logits)
    torch.testing.assert_close(torch.tensor(printed["hidden"]), hidden)
    assert set(printed["auto_map"].values()) == set(
        json.loads((folder / "config.json").read_text())["auto_map"].values()
    )
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == MODEL_FILES


def test_a_classifier_starts_from_a_language_model(saved):
    model, folder = saved
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4)
    assert torch.equal(classifier.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert classifier.score.weight.shape == (4, 48)


def test_shards(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_initialisation_covers_every_tensor():
    """from_config and loading with missing keys both end in initialised, finite tensors of the configured spread."""
    model = hf_moe.HfMoeForCausalLM(tiny_config(router_type="sigmoid_topk", router_args={"selection_bias": True}))
    experts = model.model.layers[1].mlp.experts
    for weight in (experts.gate_up_proj, experts.down_proj, model.model.layers[1].mlp.gate.weight):
        assert weight.std().item() == pytest.approx(0.2, rel=0.15)
    assert not model.model.layers[1].mlp.gate.e_score_correction_bias.any()
