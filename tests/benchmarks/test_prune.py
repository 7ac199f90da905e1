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


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """The script with further words."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--model", str(DEMO_MODEL), "--data", str(data), "--work", str(tmp_path / "work")]
    words += ["--out", str(tmp_path / "out" / "prune.json"), "--distil-steps", "2"]

    def run(*more: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["prune.py", *words, *more])
        prune.main()
        return json.loads((tmp_path / "out" / "prune.json").read_text())

    return run


def test_from_texts_to_table(run, tmp_path):
    (one,) = run("--steps", "3", "--seeds", "1", "--strategy", "drop")["runs"]
    assert set(one["losses"]) == {prune.PARENT, *prune.PRUNED, prune.DISTILLED}
    for found in one["losses"].values():
        assert set(found) == {"stories", "sums", "mean"}
        assert found["mean"] == pytest.approx((found["stories"] + found["sums"]) / 2)
    different = {name: loss["mean"] for name, loss in one["losses"].items()}
    assert different[prune.DISTILLED] < different["reap"]  # of what the teacher was trained on
    kept = one["kept"]
    assert all(len(experts) == prune.KEPT for layers in kept.values() for experts in layers.values())
    assert all(sum(map(len, experts)) == prune.EXPERTS for experts in kept["merged by reap"].values())
    lines = (tmp_path / "out" / "prune.md").read_text().splitlines()
    for name in one["losses"]:
        assert len([line for line in lines if line.startswith(f"| {name} |")]) == 1
    assert not list(Path(tmp_path / "work").glob("*-0"))  # no model is left


def test_a_seed_that_is_done_is_not_done_again(run, tmp_path, monkeypatch):
    names = (prune.PARENT, *prune.PRUNED, prune.DISTILLED)
    measured = {name: {"stories": 1.0, "sums": 2.0, "mean": 1.5} for name in names}
    begun, stop = [], 2

    def begin(args, setting, seed, *rest):
        if seed == stop:
            raise KeyboardInterrupt
        begun.append(seed)
        return seed

    def finish(args, setting, seed, *rest):
        return {"seed": seed, "losses": measured, "kept": {}, "seconds": {"training": 1.0}}

    monkeypatch.setattr(prune, "begin", begin)
    monkeypatch.setattr(prune, "finish", finish)
    with pytest.raises(KeyboardInterrupt):
        run("--seeds", "4")
    out = tmp_path / "out" / "prune.json"
    assert begun == [0, 1] and [one["seed"] for one in json.loads(out.read_text())["runs"]] == [0]
    stop = None
    begun.clear()
    assert [one["seed"] for one in run("--seeds", "3")["runs"]] == [0, 1, 2] and begun == [1, 2]
    before = out.read_bytes()
    run("--seeds", "3")
    assert begun == [1, 2]
    with pytest.raises(SystemExit, match=r"prune.json has setting .*'steps': 120.*, now it is .*'steps': 4.*name an"):
        run("--steps", "4")
    assert out.read_bytes() == before


def test_what_is_missing_is_said_before_anything_is_trained(run, data, tmp_path, monkeypatch):
    (data / "short.txt").write_text("Too short.")
    with pytest.raises(SystemExit, match=r"^short.txt is too short"):
        run()
    monkeypatch.setattr(prune, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(SystemExit, match=r"^no_such_package is not installed: pip install "):
        run()
    assert not (tmp_path / "work").exists()
