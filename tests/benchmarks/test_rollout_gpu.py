"""The script writes rollouts with both trainers, and finds weights whose change was not seen."""

import torch

from .scripts import load, run

SIZES = ("--shape=tiny", "--prompts=2", "--generations=2", "--context=5", "--new=7", "--rounds=1")


def test_from_rollouts_to_table(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = run("rollout_gpu", monkeypatch, tmp_path / "out.json", *SIZES)
    assert report["exit_code"] == 0 and report["replay"]["failures"] == []
    assert list(report["results"]) == ["trl", "hf_moe"]
    for row in report["results"].values():
        assert 4 <= row["tokens"][0] <= 28 and row["tokens_per_second"] > 0
    assert report["replay"]["rows"] == 4 and report["replay"]["changed_texts"] > 0


def test_a_change_that_nobody_saw_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script = load("rollout_gpu", monkeypatch)
    monkeypatch.setattr(script, "change", lambda model, seed: None)
    model = script.build(script.hf_moe_model, script.shape("tiny"), "cpu", torch.float32)
    args = script.argparse.Namespace(prompts=2, generations=2, context=5, new=7, vocabulary=512, device="cpu")
    assert script.replays(model, args)["failures"] == ["the change changed no text"]
