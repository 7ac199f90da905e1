"""What conversions call of Transformers takes the arguments that it was written against."""

import inspect

import pytest
from hf_moe.conversion.files.host import CALLED


@pytest.mark.parametrize("function", CALLED, ids=lambda x: x.__name__)
def test_the_host_takes_the_arguments_that_are_written_down(function):
    assert ", ".join(inspect.signature(function).parameters) == CALLED[function]
