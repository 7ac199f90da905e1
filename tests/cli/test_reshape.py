"""`hf-moe prune`, `grow` and `experts` as commands; what they compute: tests/conversion/test_reshape.py."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hf_moe.demo.text import postcard_rows


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a dog named Ben. He ran to the river and was glad.\n" * 40)
    return path


def test_prune_says_what_stays(command, upcycled, text, tmp_path):
    words = ["prune", upcycled, tmp_path / "out", "--experts", 2, "--calibration", text, "--data", text]
    code, out, err = command(*words, "--calibration-tokens", 100)
    assert code == 0, err
    assert "kept in model.layers.0" in out and "perplexity on text.txt" in out and "scores" not in out
    code, out, err = command(*words[:2], tmp_path / "json", *words[3:], "--json")
    report = json.loads(out)
    assert len(report["kept"]) == len(report["scores"]) == 4 and report["domains"][0]["perplexity_b"] > 1
    code, out, err = command("prune", upcycled, tmp_path / "none", "--experts", 1)
    assert code == 2 and "1 experts are fewer than the 2" in err and not (tmp_path / "none").exists()


def test_grow_starts_where_the_model_was(command, upcycled, tmp_path):
    code, out, err = command("grow", upcycled, tmp_path / "out", "--experts", 6, "--json")
    assert code == 0 and json.loads(out)["max_abs_diff"] < 1e-4, err


def test_routers_are_tuned_alone(command, upcycled, text, tmp_path):
    add = ["--add", f"{upcycled}:1", "--no-verify"]
    assert command("experts", upcycled, tmp_path / "joined", *add).code == 0
    tune = ["--tune-router", text, "--tune-tokens", 2000]
    code, out, err = command("experts", upcycled, tmp_path / "tuned", *add, *tune, "--json")
    assert code == 0 and json.loads(out)["train_loss"] > 0, err
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("joined", "tuned"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith("gate.weight")}
    assert {x.name for x in tmp_path.iterdir()} == {"text.txt", "joined", "tuned"}
    code, _, err = command("experts", upcycled, tmp_path / "none", *add, "--tune-router", tmp_path / "absent.txt")
    assert code == 2 and "There is no text" in err and not (tmp_path / "none").exists()


def test_a_mistake_in_a_swap_is_one_line(command, upcycled, tmp_path):
    code, _, err = command("experts", upcycled, tmp_path / "out", "--swap", "1")
    assert code == 2 and "--swap is 1; write I=SIBLING" in err


def test_conversations_are_read_by_their_template(command, upcycled, tmp_path):
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in postcard_rows(6, held_out=False, seed=1))
    )
    words = ["--experts", 2, "--calibration", tmp_path / "chats.jsonl", "--no-verify"]
    code, _, err = command("prune", upcycled, tmp_path / "out", *words)
    assert code == 0, err
