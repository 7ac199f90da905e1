"""The table of families says what their tests hold."""

import transformers

from hf_moe.model.host import TESTED
from tests.docs.conftest import DOCS
from tests.families import FAMILIES, NOT_FOR
from tests.family_table import row, table

PAGE = (DOCS / "families.md").read_text(encoding="utf-8")


def test_every_family_has_its_row():
    newest = tuple(int(x) for x in transformers.__version__.split(".")[:2]) == TESTED[1]
    assert table() in PAGE if newest else all(row(name) in PAGE for name in FAMILIES if f"| `{name}`" in PAGE)


def test_those_that_lack_something_are_families():
    assert {name for names in NOT_FOR.values() for name in names} <= set(FAMILIES)
