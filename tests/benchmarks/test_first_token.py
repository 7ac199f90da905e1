"""Two processes start, and each says how long its parts took."""

import pytest
import torch

from .scripts import load, run

PARTS = ["import_transformers", "import_hf_moe", "load", "first_token", "later_first_token", "process"]


def test_two_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    report = run("first_token", monkeypatch, tmp_path / "out.json", "--shape=tiny", "--context=7", "--new=3")
    for name in ("first_start", "second_start"):
        row = report[name]
        assert list(row) == PARTS
        assert all(0 <= row[part] < row["process"] for part in PARTS[:-1])
    assert report["exit_code"] == int(report["second_start"]["first_token"] > 2)


def test_without_a_place_to_write_to_it_says_so(monkeypatch):
    script = load("first_token", monkeypatch)
    monkeypatch.setattr(script.sys, "argv", ["first_token.py"])
    with pytest.raises(SystemExit) as refused:
        script.main()
    assert refused.value.code == 2
