"""The script runs from texts to table: a few steps of the demo's model on two domains."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import prune
from hf_moe.demo import DEMO_MODEL

DOMAINS = {
    "stories": "Once upon a time there was a dog named Ben. He ran to the river and was glad. The end.",
    "sums": "Two and two are four. Four and four are eight. Eight and eight are sixteen. Then come more of them.",
}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in DOMAINS.items():
        documents = [f"{number} {text}" * 20 for number in range(24)]
        (folder / f"{name}.txt").write_text(f"\n{prune.END}\n".join(documents))
    return folder


def test_domains_are_cut_and_none_is_held_out_and_trained_on(data):
    tokenizer = prune.AutoTokenizer.from_pretrained(DEMO_MODEL)
    found = prune.domains_of(data, tokenizer)
    assert list(found) == ["stories", "sums"]
    for name, (rows, held_out) in found.items():
        assert held_out and not set(rows) & set(held_out)
        assert not any(prune.END in row or len(row) > prune.PIECE for row in (*rows, *held_out))
        whole = (data / f"{name}.txt").read_text()
        assert len(rows) + len(held_out) > len(whole) // prune.PIECE


def test_from_texts_to_table(data, tmp_path, monkeypatch):
    words = ["--model", str(DEMO_MODEL), "--data", str(data), "--work", str(tmp_path / "work")]
    words += ["--out", str(tmp_path / "out" / "prune.json"), "--steps", "3", "--distil-steps", "2", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["prune.py", *words])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    prune.main()
    report = json.loads((tmp_path / "out" / "prune.json").read_text())
    (run,) = report["runs"]
    assert set(run["losses"]) == {prune.PARENT, *prune.PRUNED, prune.DISTILLED}
    for found in run["losses"].values():
        assert set(found) == {"stories", "sums", "mean"}
        assert found["mean"] == pytest.approx((found["stories"] + found["sums"]) / 2)
    different = {name: loss["mean"] for name, loss in run["losses"].items()}
    assert different[prune.DISTILLED] < different["reap"]  # of what the teacher was trained on
    kept = run["kept"]
    assert all(len(experts) == prune.KEPT for layers in kept.values() for experts in layers.values())
    assert all(sum(map(len, experts)) == prune.EXPERTS for experts in kept["merged by reap"].values())
    lines = (tmp_path / "out" / "prune.md").read_text().splitlines()
    for name in run["losses"]:
        assert len([line for line in lines if line.startswith(f"| {name} |")]) == 1
    assert not list(Path(tmp_path / "work").glob("*-0"))  # no model is left
