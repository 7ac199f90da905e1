"""Running the blocks of the documentation's pages, in the order in which they stand."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hf_moe_cli import main

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
INDEX = (DOCS / "README.md").read_text(encoding="utf-8")
IN_ORDER = re.findall(r"\]\(([\w/-]+\.md)\)", INDEX)


class Block(NamedTuple):
    """```language words, and the text."""

    language: str
    words: list[str]
    text: str

    @property
    def runs(self) -> bool:
        return "no-run" not in self.words


def blocks(page: str) -> list[Block]:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)([^\n]*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(language, words.split(), body) for language, words, body in found]


def commands(block: Block) -> list[list[str]]:
    """The words of each command; a backslash joins lines."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def run_page(page: str) -> None:
    """Run a page's Python and commands here, in one process; a block named as a file becomes that file."""
    names: dict = {}
    for block in blocks(page):
        if block.language == "python" and block.runs:
            exec(compile(block.text, page, "exec"), names)
        elif block.language == "bash" and block.runs:
            for words in commands(block):
                assert words[0] == "hf-moe", f"{page}: mark as no-run: {words}"
                assert main(words[1:]) == 0, (page, words)
        elif block.language in ("json", "yaml") and block.words:
            Path(block.words[0]).write_text(block.text, encoding="utf-8")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The folder that the index tells its reader to make."""
    folder = tmp_path_factory.mktemp("docs") / "prepared"
    folder.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_page("README.md")
    torch.set_num_threads(threads)
    return folder
