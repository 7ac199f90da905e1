"""`hf-moe train --list`, `--show` and `--check`: recipes without a run."""

import subprocess
import sys

import pytest
import yaml
from hf_moe.training.recipes.files import shipped_recipes

from tests.recipes import recipes


def test_list_has_a_line_per_recipe(command):
    code, out, _ = command("train", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(shipped_recipes())
    assert all(len(line.split()) > 5 for line in out.splitlines())


def test_show_prints_the_file(command):
    code, out, _ = command("train", "--show", "tiny/sft")
    assert (code, out) == (0, shipped_recipes()["tiny/sft"].read_text(encoding="utf-8"))


def test_help_after_a_recipe_names_its_arguments(command):
    code, out, _ = command("train", "tiny/sft", "--help")
    assert code == 0 and "usage: hf-moe train RECIPE" in out
    assert "--router_bias_update_speed" in out and "router_only" in out and "31.6%, then 10%" in " ".join(out.split())


@pytest.mark.parametrize("name", recipes())
def test_check_of_a_shipped_recipe(command, name):
    code, out, _ = command("train", "--check", name)
    count = len(yaml.safe_load(shipped_recipes()[name].read_text(encoding="utf-8")))
    assert (code, out) == (0, f"{name}: all {count} arguments are valid\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown argument learning_rat; the nearest known one is learning_rate."),
        ("max_steps: many", "argument max_steps: invalid int value: 'many'"),
    ],
)
def test_check_of_a_mistake_is_one_line(command, tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    assert command("train", "--check", path) == (2, "", f"hf-moe: recipe {path}: {message}\n")


@pytest.mark.parametrize(
    "words",
    [("--show", "absent"), ("--check", "absent"), ("absent",), ()],
    ids=" ".join,
)
def test_unknown_or_no_recipe_says_what_lists_the_known_ones(command, words):
    code, out, err = command("train", *words)
    assert (code, out) == (2, "") and "hf-moe train --list" in err and len(err.splitlines()) == 1


def test_listing_imports_nothing_heavy():
    code = "import sys; from hf_moe_cli import main; main(['train', '--list']); sys.exit('trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0
