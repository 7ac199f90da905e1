"""`hf-moe new router NAME`: what it writes is a router that works and a test that it passes."""

import subprocess
import sys

import pytest
import torch

from hf_moe import HfMoeForCausalLM
from hf_moe.plugins import load_plugin
from tests.conftest import tiny_config, tokens
from tests.plugins.conftest import forgotten  # noqa: F401  (a fixture)


def test_alone_it_says_what_there_is(command):
    code, out, err = command("new")
    assert code == 0 and "router" in out and err == ""


def test_what_it_writes_passes_its_test_and_trains(command, tmp_path, monkeypatch, forgotten):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    code, out, err = command("new", "router", "near_best")
    assert code == 0 and "pytest near_best.py" in out, err
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "near_best.py"]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout + result.stderr
    load_plugin("near_best.py")
    config = tiny_config(router_type="near_best", router_args={"share": 0.8})
    torch.manual_seed(0)
    model = HfMoeForCausalLM(config)
    model(tokens(), labels=tokens()).loss.backward()
    assert model.model.layers[1].mlp.gate.weight.grad.abs().sum() > 0
    _, _, index, _, _ = model.model.layers[1].mlp.gate(torch.randn(50, 48))
    assert (index == 7).any() and (index[:, 0] < 7).all()
    model.save_pretrained("saved")
    assert (tmp_path / "saved" / "plugin_near_best.py").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["softmax_topk"], "There is a router 'softmax_topk' already"),
        (["two words"], "The name 'two words' is none that a Python function can have"),
        (["mine", "--out", "there.py"], "there.py exists: give another --out"),
    ],
)
def test_what_it_refuses_is_one_line(command, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.py").write_text("")
    code, out, err = command("new", "router", *words)
    assert code == 2 and out == "" and err.count("\n") == 1 and said in err
    assert [path.name for path in tmp_path.iterdir()] == ["there.py"]
