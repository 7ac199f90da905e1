"""Kernels run on the GPU where there is one, else on the CPU in Triton's interpreter; fresh memory is NaN."""

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items):
    if DEVICE.type == "cpu" and not knobs.runtime.interpret:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, or TRITON_INTERPRET=1 before torch"))


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned():
    """What a kernel forgets to write shows: uninitialised memory holds NaN, or the largest integer."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
