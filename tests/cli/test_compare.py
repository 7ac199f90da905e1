"""`hf-moe compare`: what runs led to and were told, side by side."""

import csv
import json

import pytest
from hf_moe.training.main import main

from tests.training.conftest import tiny_hf_moe, tiny_tokenizer, write_rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in their learning rate and their rows."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_hf_moe().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": "Say red.", "completion": " red"}] * 8
    for name, rate, count in (("slow", "1e-4", 8), ("fast", "1e-2", 6)):
        data = write_rows(folder / f"{name}.jsonl", rows[:count])
        places = [f"--train_data={data}", f"--output_dir={folder / name}"]
        places += [f"--model_name_or_path={folder / 'model'}", f"--eval_data={data}"]
        main(["tiny/sft", *places, "--max_steps=2", "--logging_steps=1", f"--learning_rate={rate}", "--save_steps=1"])
    return folder


def test_losses_loads_and_what_differs_are_in_one_table(runs, command, tmp_path):
    code, out, _ = command("compare", runs / "slow", runs / "fast", "--out", tmp_path / "out")
    assert code == 0
    table = {line.split("  ")[0]: line.split()[-2:] for line in out.splitlines()}
    assert table["run"] == ["slow", "fast"] and table["learning_rate"] == ["0.0001", "0.01"]
    assert (
        float(table["held-out loss"][1]) < float(table["held-out loss"][0]) < float(table["held-out loss before"][0])
    )
    assert {"training loss", "busiest expert, 1 at balance", "idle experts", "rows of train_data"} <= table.keys()
    assert not {"seed", "output_dir", "max_steps"} & table.keys()
    with (tmp_path / "out" / "compare.csv").open(encoding="utf-8") as file:
        assert {line[0] for line in csv.reader(file)} == table.keys()
    assert (tmp_path / "out" / "compare.md").read_text(encoding="utf-8").startswith("| run | slow | fast |\n| --- |")
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_json_has_a_row_a_run_and_a_checkpoint_is_one(runs, command):
    code, out, _ = command("compare", runs / "slow" / "checkpoint-1", runs / "slow", "--json")
    rows = json.loads(out)["runs"]
    state = json.loads((runs / "slow" / "trainer_state.json").read_text())
    assert code == 0 and [row["steps"] for row in rows] == [1, 2]
    assert rows[1]["held-out loss"] == [x["eval_loss"] for x in state["log_history"] if "eval_loss" in x][-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{runs}/slow"], "Give the folders of two runs at least"),
        (["{runs}/slow", "{runs}/absent"], "There is no folder .*/absent"),
        (["{runs}/slow", "{runs}/model"], "model holds no log of a run"),
        (["{runs}/slow", "{runs}/slow.jsonl"], "There is no folder .*/slow.jsonl"),
    ],
)
def test_a_folder_that_is_no_run_is_one_line(runs, command, words, message):
    import re

    code, out, err = command("compare", *(word.format(runs=runs) for word in words))
    assert (code, out, len(err.splitlines())) == (2, "", 1) and re.search(message, err)


def test_a_run_that_is_under_way_has_its_lines(runs, command, tmp_path):
    for name in ("slow", "fast"):
        (tmp_path / name).mkdir()
        lines = (runs / name / "metrics.jsonl").read_text(encoding="utf-8")
        (tmp_path / name / "metrics.jsonl").write_text(lines + '{"loss": 1', encoding="utf-8")  # a kill
    code, out, _ = command("compare", tmp_path / "slow", tmp_path / "fast", "--json")
    assert code == 0 and [row["steps"] for row in json.loads(out)["runs"]] == [2, 2]


@pytest.mark.parametrize("line", [b"3\n", b"{broken\n", b"\xff\n"], ids=["number", "cut", "bytes"])
def test_a_log_that_is_none_is_named(line, runs, command, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(line)
    code, _, err = command("compare", runs / "slow", tmp_path)
    assert code == 2 and f"{tmp_path / 'metrics.jsonl'} is no log of a run: " in err and err.count("\n") == 1


def test_a_resumed_run_has_each_log_once(runs):
    def log(name):
        return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]

    before = [entry["step"] for entry in log("fast") if "loss" in entry]
    given = ["tiny/sft", f"--output_dir={runs / 'fast'}", f"--train_data={runs / 'fast.jsonl'}", "--max_steps=2"]
    given += [f"--model_name_or_path={runs / 'model'}", "--logging_steps=1", "--learning_rate=1e-2", "--save_steps=1"]
    main([*given, f"--resume_from_checkpoint={runs / 'fast' / 'checkpoint-1'}"])
    assert [entry["step"] for entry in log("fast") if "loss" in entry] == before == [1, 2]
