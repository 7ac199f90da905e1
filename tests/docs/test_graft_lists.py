"""docs/models.md lists what experts can be grafted onto, as tests/graft holds it."""

import pytest
import transformers

from hf_moe.model.host import TESTED
from tests.docs.conftest import DOCS
from tests.graft_table import LISTS, lists

NEWEST = tuple(int(x) for x in transformers.__version__.split(".")[:2]) == TESTED[1]


@pytest.mark.skipif(not NEWEST, reason="an older host has fewer families")
@pytest.mark.parametrize("mark", LISTS)
def test_the_lists_are_written_by_their_script(mark):
    assert lists(mark) in (DOCS / "models.md").read_text(encoding="utf-8")
