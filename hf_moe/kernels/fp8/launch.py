"""Launch options of the FP8 kernels that multiply, and their grids. Tiles are 128 x 128: what shares a scale."""

import torch
import triton

from ..launch import FUSED
from ..tiles import EVERY_TILE, processors
from .format import BLOCK

PASS_ROWS = 16  # of one program of a pass over memory, 128 columns wide
LARGE = {
    "up": {"GROUP": 8, "FLATTEN": True, "per_processor": 1, "num_warps": 8, "num_stages": 4},
    # Beside a low-rank part four stages have no room.
    "up_low_rank": {"GROUP": 8, "FLATTEN": False, "per_processor": EVERY_TILE, "num_warps": 8, "num_stages": 3},
    "product": {"GROUP": 8, "FLATTEN": True, "per_processor": 1, "num_warps": 8, "num_stages": 4},
}


def launch(kernel: str, row_tiles: int, columns: int, device: torch.device) -> tuple[tuple[int], dict]:
    """Grid and options of `kernel` for so many tiles of rows, and columns."""
    options = LARGE[kernel] | FUSED
    programs = row_tiles * triton.cdiv(columns, BLOCK)
    return (min(programs, options.pop("per_processor") * processors(device)),), options
