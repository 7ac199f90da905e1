"""The shipped recipes as parameters of tests; those whose optimizer needs a package that is not here are skipped."""

from importlib.util import find_spec

import pytest
from hf_moe.training.recipes.files import read_recipe, shipped_recipes

NEED_TORCHAO = ("adamw_torch_8bit", "adamw_torch_4bit")


def recipes() -> list:
    without = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
    return [
        pytest.param(name, marks=without if read_recipe(name).get("optim") in NEED_TORCHAO else ())
        for name in shipped_recipes()
    ]
