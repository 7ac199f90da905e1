"""A saved folder as a user has it: the demo's dense model as a mixture of experts."""

import pytest
from hf_moe.conversion import upcycle

from hf_moe.demo import DEMO_MODEL


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving") / "moe"
    upcycle(DEMO_MODEL, folder, experts=3, top_k=2, verify=False, progress=False)
    return folder
