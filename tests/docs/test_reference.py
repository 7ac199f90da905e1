"""The reference names what the documentation uses, and each of its lines has a docstring."""

import ast
import inspect
import re
from importlib import import_module

import pytest

import hf_moe
from tests.docs.conftest import DOCS, PAGES

PAGE = (DOCS / "reference.md").read_text(encoding="utf-8")
NAMES = re.findall(r"^::: (\S+)$", PAGE, flags=re.MULTILINE)


def found(name: str):
    """What a dotted name means."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_where_the_line_says_and_has_a_docstring(name):
    value = found(name)
    assert value.__doc__ and value.__module__ == name.rpartition(f".{value.__qualname__}")[0]
    assert "::" not in inspect.getdoc(value) and "`" * 3 not in inspect.getdoc(value), "docstrings here are prose"


def imports() -> set[tuple[str, str]]:
    """(module, name) of each `from hf_moe... import` in the pages and the README."""
    pairs = set()
    for path in (DOCS.parent / "README.md", *(DOCS / page for page in PAGES)):
        for block in re.findall(r"^```python[^\n]*\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.M):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("hf_moe"):
                    pairs |= {(node.module, alias.name) for alias in node.names}
    return pairs


def test_it_names_whatever_the_pages_import():
    documented = [found(name) for name in NAMES]
    for module, name in imports() | {("hf_moe", name) for name in (*hf_moe.__all__, *hf_moe.TRAINING)}:
        value = getattr(import_module(module), name)
        if callable(value):
            assert any(value is one for one in documented), (module, name)
        else:
            assert name == "__version__" or f"`{name}`" in PAGE or f"import {name}`" in PAGE, (module, name)
