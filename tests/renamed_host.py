"""A copy of the installed Transformers in which one keyword has another name, as a later release might give it.

    python tests/renamed_host.py FOLDER OLD NEW [VERSION]

FOLDER then goes first on PYTHONPATH. Files that don't change are links to the installed ones.
"""

import importlib.metadata
import io
import os
import shutil
import sys
import tokenize
from importlib.util import find_spec
from pathlib import Path

# Where generate(), forward and the layers between them hand a keyword on.
FILES = (
    "generation/utils.py",
    "generation/candidate_generator.py",
    "generation/continuous_batching/*.py",
    "integrations/*_paged.py",
    "masking_utils.py",
    "modeling_layers.py",
    "modeling_outputs.py",
    "utils/generic.py",
)


def renamed(text: str, old: str, new: str) -> str:
    """Python source with the name `old` called `new`: as an argument, variable, attribute and as a whole string."""
    lines = text.splitlines(keepends=True)
    modules = ("from ", "import ")  # whose names are files
    found = [
        (token.start, token.string)
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if (token.type == tokenize.NAME and token.string == old and not token.line.lstrip().startswith(modules))
        or (token.type == tokenize.STRING and token.string.strip("\"'") == old)
    ]
    for (row, column), said in reversed(found):
        line = lines[row - 1]
        lines[row - 1] = line[:column] + said.replace(old, new) + line[column + len(said) :]
    return "".join(lines)


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def copy_renamed(folder: Path, old: str, new: str, version: str | None = None) -> None:
    source = Path(find_spec("transformers").submodule_search_locations[0])
    package = folder / "transformers"
    shutil.copytree(source, package, copy_function=link_or_copy)  # with the bytecode of what does not change
    info = Path(importlib.metadata.distribution("transformers").locate_file("")) / (
        f"transformers-{importlib.metadata.version('transformers')}.dist-info"
    )
    shutil.copytree(info, folder / info.name)
    paths = [path for pattern in FILES for path in sorted(package.glob(pattern))]
    assert paths
    for path in paths:
        rewrite(path, renamed(path.read_text(encoding="utf-8"), old, new))
    if version is not None:
        init = package / "__init__.py"
        now = f'__version__ = "{importlib.metadata.version("transformers")}"'
        assert now in init.read_text(encoding="utf-8")
        rewrite(init, init.read_text(encoding="utf-8").replace(now, f'__version__ = "{version}"'))


def rewrite(path: Path, text: str) -> None:
    """Into a new file: the old one is linked with the installed host's."""
    aside = path.with_suffix(".new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


if __name__ == "__main__":
    copy_renamed(Path(sys.argv[1]), *sys.argv[2:])
