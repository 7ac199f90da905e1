"""`hf-moe trace`: what it prints, and its mistakes in one line."""

import json

import pytest

from hf_moe.demo import DEMO_MODEL


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a little fox. She lived by the river.\n" * 3)
    return path


def test_json_and_files(command, upcycled, text, tmp_path, monkeypatch):
    figures = pytest.importorskip("hf_moe.telemetry.figures", exc_type=ImportError)
    monkeypatch.setattr(figures, "FIGURES", {"load": figures.load})  # the first alone, to save time
    result = command("trace", upcycled, "--data", text, "--out", tmp_path / "out", "--prune-tokens", 0, "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert report["tokens"] > 30 and report["duplicate_experts"] == report["experts"]  # copies of the dense MLP
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "numbers.json", "figures"}
    assert "trace" in result.err  # the progress bar


def test_mistakes_take_one_line(command, text, tmp_path):
    pytest.importorskip("matplotlib")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": ')
    for words, said in (
        ([DEMO_MODEL, "--data", text, "--out", tmp_path / "out"], "is a dense model"),
        ([DEMO_MODEL, "--data", text, "--out", tmp_path], "is not empty"),
        (["no/such/model", "--data", text, "--out", tmp_path / "out"], "no/such/model"),
    ):
        result = command("trace", *words)
        lines = [line for line in result.err.splitlines() if line.startswith("hf-moe:")]
        assert result.code == 2 and result.out == "" and len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "out").exists()
