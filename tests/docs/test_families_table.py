"""The table of families says what their tests hold."""

import pytest
import transformers

from hf_moe.model.host import TESTED
from tests.docs.conftest import DOCS
from tests.families import FAMILIES, NOT_FOR
from tests.family_table import row, table

PAGE = (DOCS / "families.md").read_text(encoding="utf-8")


NEWEST = tuple(int(x) for x in transformers.__version__.split(".")[:2]) == TESTED[1]


def test_every_family_has_its_row():
    """An older host has fewer families, a newer one more."""
    assert table() in PAGE if NEWEST else all(row(name) in PAGE for name in FAMILIES if f"| `{name}`" in PAGE)


@pytest.mark.skipif(not NEWEST, reason="an older host has fewer families")
def test_those_that_lack_something_are_families():
    assert {name for names in NOT_FOR.values() for name in names} <= set(FAMILIES)
