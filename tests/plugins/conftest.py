"""The routers of this folder, known for one test."""

import sys
from pathlib import Path

import pytest

from hf_moe.model.routing import ROUTERS
from hf_moe.plugins import load_plugin

FOLDER = Path(__file__).parent


def forget() -> None:
    for name in [name for name in sys.modules if name.startswith(("hf_moe_plugin_", "hf_moe.model.plugin_"))]:
        del sys.modules[name]


@pytest.fixture
def forgotten():
    """What a plugin registered is gone afterwards."""
    before = dict(ROUTERS)
    yield
    forget()
    ROUTERS.clear()
    ROUTERS.update(before)


@pytest.fixture(params=["my_top_p", "cosine", "threshold"])
def router_type(request, forgotten):
    load_plugin(FOLDER / f"{request.param}.py")
    return request.param
