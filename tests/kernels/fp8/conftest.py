"""Triton's interpreter rounds to E4M3 wrongly where a mantissa carries: here PyTorch does it."""

import numpy as np
import pytest
import torch
from triton.language import float8e4nv as fp8e4nv
from triton.runtime import interpreter

CODE = torch.float8_e4m3fn
convert = interpreter._convert_float


def convert_by_torch(values, source, target, rounding):
    if source == fp8e4nv:
        numbers = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8)).view(CODE).float().numpy()
        kinds = {16: np.float16, 32: np.float32}
        bits = {16: np.uint16, 32: np.uint32}
        width = target.primitive_bitwidth
        return numbers.astype(kinds[width]).view(bits[width])
    if target == fp8e4nv:
        assert source.primitive_bitwidth == 32
        numbers = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return numbers.to(CODE).view(torch.uint8).numpy()
    return convert(values, source, target, rounding)


@pytest.fixture(autouse=True)
def rounded_by_torch(monkeypatch):
    monkeypatch.setattr(interpreter, "_convert_float", convert_by_torch)


@pytest.fixture(autouse=True)
def a_card_that_multiplies_in_fp8(device):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
