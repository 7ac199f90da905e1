"""The benchmark's module is right about the share that it is to be, and its text is that of the model alone."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_config

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "mtp_decode_gpu.py"


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_module_that_is_right_about_a_share(share, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("mtp_decode_gpu", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sizes = {"vocab_size": 997, "hidden_size": 96, "num_mtp_layers": 1, "initializer_range": 0.02}
    model = script.build(tiny_config(**sizes), "cpu", torch.float32)
    script.teach(model, share)
    prompts = [torch.randint(3, 997, (1, 9)) for _ in range(3)]
    rounds, acceptance = script.counted(model, prompts, 100)
    assert acceptance == pytest.approx(share, abs=0.1)
    assert rounds == pytest.approx(300 / (1 + acceptance), abs=3)
    ids = prompts[0]
    texts = [model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, use_mtp=x) for x in (0, 1)]
    assert torch.equal(*texts) and len(set(texts[0][0, 9:].tolist())) == 50
