"""`hf-moe prune`, `grow` and `experts` as commands; what they compute: tests/conversion/test_reshape.py."""

import json
import multiprocessing
import os
import signal

import pytest
import torch
from hf_moe.conversion.files import writer
from hf_moe.training import router_tuning
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
    code, out, err = command("prune", upcycled, tmp_path / "none", "--ratio", "0.2,0.4")
    assert code == 2 and "0.2,0.4 is no number: it is one for all layers, as no family's config" in err
    assert err.count("\n") == 1 and not (tmp_path / "none").exists()
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
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert f"| Started from | {upcycled.name} |" in card and "| Training data | text.txt |" in card
    assert "# tuned\n" in card and "untuned" not in card


def test_routers_are_tuned_on_what_calibration_reads(command, upcycled, tmp_path):
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in postcard_rows(6, held_out=False, seed=1))
    )
    words = ["--add", f"{upcycled}:1", "--no-verify", "--tune-tokens", 500]
    code, _, err = command("experts", upcycled, tmp_path / "out", *words, "--tune-router", tmp_path / "chats.jsonl")
    assert code == 0, err


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("absent.txt", "There is no file"),
        ("empty.txt", "to tune the routers on is empty"),
        ("nobody/no-such-data", "nobody/no-such-data"),
    ],
)
def test_what_no_router_can_be_tuned_on_is_said_first(source, said, command, upcycled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    for more in ([], ["--dry-run"]):
        code, _, err = command("experts", upcycled, "out", "--add", upcycled, "--tune-router", source, *more)
        assert code == 2 and said in err and err.count("\n") == 1, err
        assert {x.name for x in tmp_path.iterdir()} == {"empty.txt"}


def tuned(arguments: dict, killed_before: str | None) -> None:
    """`exchange_and_tune`, killed as it calls what has this name."""
    if killed_before is not None:
        setattr(writer if killed_before == "write_shard" else router_tuning, killed_before, kill)
    router_tuning.exchange_and_tune(**arguments)


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_while_routers_are_tuned_loses_nothing(upcycled, text, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cli.test_reshape", "hf_moe.training.stages.pretrain"])
    arguments = {"src": upcycled, "text": text, "tokens": 500, "add": [f"{upcycled}:1"]}
    arguments |= {"verify": False, "progress": False}
    tuned(arguments | {"dst": tmp_path / "whole" / "out"}, None)
    expected = load_file(tmp_path / "whole" / "out" / "model.safetensors")
    for point in ("write_shard", "tune_router", "describe", "publish"):
        given = arguments | {"dst": tmp_path / point / "out"}
        process = context.Process(target=tuned, args=(given, point))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL and list((tmp_path / point).iterdir())
        with pytest.raises(FileExistsError, match="--resume"):
            tuned(given, None)
        tuned(given | {"resume": True}, None)
        assert [x.name for x in (tmp_path / point).iterdir()] == ["out"]
        found = load_file(tmp_path / point / "out" / "model.safetensors")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], x) for name, x in expected.items())


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
