"""Every command and every piece of Python in the documentation runs; what can't run here is at least well formed."""

import re
import shutil

import pytest
import torch
import typer
from hf_moe.training.main import stage_module
from hf_moe.training.recipes.files import shipped_recipes
from hf_moe.training.recipes.parser import RecipeParser
from hf_moe_cli import app

from tests.docs.conftest import DOCS, IN_ORDER, PAGES, blocks, commands, run_page
from tests.plugins.conftest import forgotten  # noqa: F401  (a fixture: a page adds routers of its own)

ROOT = DOCS.parent


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in blocks(page))])
def test_its_blocks_run(page, prepared, tmp_path, monkeypatch, forgotten):  # noqa: F811
    if page == "README.md":
        assert (prepared / "moe" / "config.json").is_file()
        return
    folder = shutil.copytree(prepared, tmp_path / "work")
    monkeypatch.chdir(folder)
    torch.set_num_threads(1)
    run_page(page)


def test_all_pages_run_in_order_in_one_folder(prepared, tmp_path, monkeypatch, forgotten):  # noqa: F811
    """As a reader goes through them: no page stumbles over what an earlier one has made."""
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "work"))
    torch.set_num_threads(1)
    for page in IN_ORDER:
        run_page(page)


def options_of(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}


@pytest.mark.parametrize("page", [page for page in PAGES if not all(block.runs for block in blocks(page))])
def test_what_does_not_run_here_is_well_formed(page):
    known = typer.main.get_command(app).commands
    for block in blocks(page):
        if block.runs:
            continue
        if block.language == "python":
            compile(block.text, page, "exec")
            continue
        for words in commands(block):
            name = next((name for name in ("hf_moe_cli", "hf-moe") if name in words), None)
            if name is None:  # another program's
                continue
            command, *words = words[words.index(name) + 1 :]
            given = options_of(words)
            options = {option for parameter in known[command].params for option in parameter.opts}
            if command == "train" and not words[0].startswith("-"):
                recipe = words[0] if words[0] in shipped_recipes() else "tiny/sft"
                parser = RecipeParser(stage_module([recipe, *words[1:]]).ARGUMENTS)
                options = options | {option for action in parser._actions for option in action.option_strings}
                options.add("--stage")
            assert given - {"--plugin"} <= options, (page, command, given - options)  # which any command takes


def test_the_index_names_every_page_and_the_readme_the_index():
    assert set(PAGES) - set(IN_ORDER) == {"README.md"} and len(set(IN_ORDER)) == len(IN_ORDER)
    assert "(docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
