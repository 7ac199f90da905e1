"""The README's commands, code and tree are those of the repository."""

import re
import subprocess
from pathlib import Path

import typer
from hf_moe_cli import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_the_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("python"):  # in order: later ones use the model of earlier ones
        exec(block, names)
    first = capsys.readouterr().out
    assert first.startswith("Once upon a time there was")
    assert (tmp_path / "my_moe" / "config.json").is_file()
    exec(blocks("python")[0])  # what one tries again
    assert first.startswith(capsys.readouterr().out)


def test_the_table_names_every_command_with_options_that_exist():
    commands = typer.main.get_command(app).commands
    options = {name: {option for p in command.params for option in p.opts} for name, command in commands.items()}
    named = re.findall(r"^\| `hf-moe (\w+)([^`]*)` \|", README, flags=re.MULTILINE)
    assert [name for name, _ in named] == list(commands)
    for name, words in named:
        said = set(re.findall(r"--[\w-]+", words)) - {"--key"}
        assert said <= options[name]


def test_the_tree_is_the_repositorys():
    folder = ROOT
    tree = README.split("## The tree\n\n```\n")[1].split("```")[0]
    for line in tree.splitlines():
        name = line.split()[0]
        parent = folder if line.startswith(" ") else ROOT
        assert (parent / name).exists(), line
        folder = ROOT / name if not line.startswith(" ") else folder
