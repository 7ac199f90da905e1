"""Some lines of libraries are left out, wherever they come from; all others are said."""

import logging
import subprocess
import sys
from importlib.metadata import distribution

import pytest

from hf_moe.quiet import LEFT_OUT


@pytest.mark.parametrize("name", LEFT_OUT)
def test_lines_are_left_out(name, caplog):
    logger = logging.getLogger(name)
    logger.warning(f"{LEFT_OUT[name]}, and the rest", *["it"] * LEFT_OUT[name].count("%s"))
    logger.warning("Another message")
    assert [record.getMessage() for record in caplog.records] == ["Another message"]
    assert len(logger.filters) == 1


def test_bitsandbytes_still_says_it_there():
    pytest.importorskip("bitsandbytes")
    name = "bitsandbytes.backends.cpu.ops"
    module = distribution("bitsandbytes").locate_file(name.replace(".", "/") + ".py").read_text()
    assert f'"{LEFT_OUT[name]}' in module and "getLogger(__name__)" in module


def test_importing_says_nothing():
    """With torchao, which Transformers imports wherever it is installed."""
    pytest.importorskip("torchao")
    result = subprocess.run([sys.executable, "-c", "import hf_moe"], capture_output=True, text=True, check=True)
    assert result.stdout == result.stderr == ""
