"""Block-FP8 weights, as DeepSeek-V3 is released (arXiv 2412.19437, 3.3.2): read as bfloat16, one tensor at a time.

A weight is float8_e4m3fn. Beside it lies `<name>_scale_inv`, one factor per block (float32, in some releases
bfloat16), by which the block's codes are multiplied.
"""

import math
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint

SCALE = "_scale_inv"
SCALE_DTYPES = (torch.float32, torch.bfloat16)


def block_size(quantization: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block. Raises a ValueError of one line for any other way to quantize."""
    method, said_format = quantization.get("quant_method"), quantization.get("fmt", "e4m3")
    if method != "fp8" or said_format != "e4m3":
        raise ValueError(
            f"The field quantization_config says quant_method={method!r}"
            f"{f', fmt={said_format!r}' if 'fmt' in quantization else ''}; hf_moe reads weights that are not "
            "quantized, fp8 (e4m3) in blocks, or mxfp4."
        )
    block = quantization.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise ValueError(
            f"The field quantization_config says weight_block_size={block!r}; hf_moe reads blocks like [128, 128]."
        )
    return block[0], block[1]


def dequantized(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """codes [M, N] float8 times scales [ceil(M / m), ceil(N / n)], in float32, rounded to bfloat16.

    Strip by strip, so that beside the result only m rows are in memory.
    """
    rows, columns = codes.shape
    result = torch.empty(codes.shape, dtype=torch.bfloat16)
    for strip, factors in zip(range(0, rows, block[0]), scales, strict=True):
        values = codes[strip : strip + block[0]].float()
        result[strip : strip + block[0]] = values * factors.repeat_interleave(block[1])[:columns]
    return result


class BlockFP8Checkpoint(Checkpoint):
    """A checkpoint whose float8 weights show as the bfloat16 tensors they stand for, and whose factors do not show."""

    def __init__(self, folder: Path, block: tuple[int, int]):
        super().__init__(folder)
        self.block, self._stored = block, dict(self.entries)
        for name, entry in self._stored.items():
            if entry.dtype != torch.float8_e4m3fn:
                continue
            if len(entry.shape) != 2:
                raise ValueError(
                    f"{name} is {entry.dtype} of shape {list(entry.shape)}; only matrices can be in blocks."
                )
            scale = self.entries.pop(name + SCALE, None)
            if scale is None:
                raise ValueError(f"The checkpoint lacks {name}{SCALE}, the factors of {name}.")
            grid = tuple(math.ceil(size / step) for size, step in zip(entry.shape, block, strict=True))
            if scale.shape != grid or scale.dtype not in SCALE_DTYPES:
                raise ValueError(
                    f"{name}{SCALE} is {scale.dtype} of shape {list(scale.shape)}; a weight of {list(entry.shape)} "
                    f"in blocks of {list(block)} calls for floats of shape {list(grid)}."
                )
            self.entries[name] = entry._replace(dtype=torch.bfloat16, nbytes=2 * entry.nbytes)

    def computes(self, name: str) -> bool:
        return self.entries[name] != self._stored[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as a view of the mapped file, or what its codes stand for."""
        if not self.computes(name):
            return super().tensor(name)
        return dequantized(self._raw(name), self._raw(name + SCALE), self.block)

    def _raw(self, name: str) -> torch.Tensor:
        return self.view(self._stored[name], self.file_of[name])
