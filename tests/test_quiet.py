"""One line of bitsandbytes is left out, wherever it comes from; all others are said."""

import logging
from importlib.metadata import distribution

import pytest

import hf_moe  # noqa: F401 (its import leaves the line out)
from hf_moe.quiet import CPU_KERNELS, MISSING, quieten


def test_one_line_is_left_out(caplog):
    quieten()  # a second time changes nothing
    logger = logging.getLogger(CPU_KERNELS)
    logger.warning(f"{MISSING} from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("Another message")
    assert [record.getMessage() for record in caplog.records] == ["Another message"]
    assert len(logger.filters) == 1


def test_bitsandbytes_still_says_it_there():
    pytest.importorskip("bitsandbytes")
    module = distribution("bitsandbytes").locate_file(CPU_KERNELS.replace(".", "/") + ".py").read_text()
    assert f'"{MISSING}' in module and "getLogger(__name__)" in module
