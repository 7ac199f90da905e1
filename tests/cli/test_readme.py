"""The README's commands, code and numbers are those of the repository; so are the table of commands and the rooms."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import typer
from hf_moe.conversion.families import DENSE_FAMILIES, FAMILIES
from hf_moe.conversion.upcycling import UPCYCLERS
from hf_moe_cli import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_set_up_commands_are_one_line_each():
    assert blocks("bash")[:2] == [
        'pip install -e ".[train]" && hf-moe demo\n',
        'pip install -e ".[dev]" && pytest -n 2\n',
    ]


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    expression = re.search(r"tests=\$\(sed -n '(.*)' README\.md\)", script).group(1)
    found = subprocess.run(["sed", "-n", expression, ROOT / "README.md"], capture_output=True, text=True, check=True)
    assert found.stdout == "pytest -n 2\n"


def test_the_python_runs_and_runs_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    exec(block, {})
    first = capsys.readouterr().out
    assert first.startswith("Once upon a time there was")
    assert (tmp_path / "my_moe" / "config.json").is_file()
    exec(block, {})  # what one tries again
    assert first == capsys.readouterr().out


def test_the_table_of_commands_is_complete():
    named = re.findall(r"^\| `hf-moe (\w+)", COMMANDS, flags=re.MULTILINE)
    assert named == list(typer.main.get_command(app).commands)


@pytest.mark.parametrize("page", [README, COMMANDS], ids=["README.md", "commands.md"])
def test_its_commands_have_the_options_that_it_names(page):
    known = typer.main.get_command(app).commands
    named = re.findall(r"`hf-moe ([a-z]+)([^`]*)`", page)
    assert len(named) > 4
    for name, words in named:
        options = {option for parameter in known[name].params for option in parameter.opts}
        said = set(re.findall(r"--[\w-]+", words)) - {"--key", "--help"}
        assert said <= options, name


def results(name: str) -> str:
    return (ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8")


def test_its_numbers_are_those_of_the_results():
    measured = json.loads(results("whole_model.json"))["results"]
    speed = {name: {work: row["tokens_per_second"] for work, row in rows.items()} for name, rows in measured.items()}
    written = {name: rows["decoding, batch 1"] for name, rows in speed.items() if "decoding, batch 1" in rows}
    plain, compiled = written["transformers"], written["transformers, compiled"]
    assert f"| {written['hf_moe']} | Transformers {plain}, compiled {compiled} |" in README
    ours, theirs = (f"{speed[name]['training']:,.0f}" for name in ("hf_moe", "transformers"))
    assert f"| {ours} | Transformers {theirs} |" in README
    texts = json.loads(results("rollout_gpu.json"))["results"]
    ours, theirs = (f"{texts[name]['tokens_per_second']:,.0f}" for name in ("hf_moe", "trl"))
    assert f"| {ours} | TRL {theirs} |" in README
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results("conversion.md").splitlines()]
    difference = {row[0]: row[-1] for row in rows if len(row) == 9}  # the last column: with biases
    others = ", ".join(f"{name} {difference[name]}" for name in ("mergekit-moe", "MixtureKit"))
    assert f"| {difference['hf_moe']} | {others} |" in README


def test_it_counts_families_and_strategies():
    assert f"{len(DENSE_FAMILIES)} dense families in; {len(FAMILIES)} families of mixtures" in README
    assert len(UPCYCLERS) == 8 and "eight strategies" in README


def test_the_architectures_rooms_are_folders():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:hf_moe|conversion|training|cli|tests|benchmarks|model_cards)/[\w/.]*)`", page))
    assert len(named) > 40
    assert not [name for name in named if not (ROOT / name).exists()]
    rooms = {path.parent.name for path in (ROOT / "hf_moe").glob("*/__init__.py")}
    assert {f"hf_moe/{room}/" for room in rooms} <= named
