"""Tile sizes, warps and pipeline stages of each kernel, as measured by benchmarks/moe_layer.py --sweep."""

import torch

# For 16-bit numbers and many rows an expert, on Hopper.
LARGE = {
    "up": {"COLS": 128, "DEPTH": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3},
    "down": {"COLS": 256, "DEPTH": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3},
    "down_backward": {"COLS": 128, "DEPTH": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3},
    "input_gradient": {"COLS": 256, "DEPTH": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3},
    "weight_gradient": {"ROWS": 128, "COLS": 256, "DEPTH": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3},
}
SMALL = {"COLS": 64, "DEPTH": 64, "GROUP": 8, "num_warps": 4, "num_stages": 3}
FLOAT32 = {"COLS": 64, "DEPTH": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2}
INTERPRETED = {"COLS": 32, "DEPTH": 32, "GROUP": 2, "num_warps": 4, "num_stages": 2}


def row_tile(slots: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of one tile: those that an expert gets on average, rounded up to a power of two, between 16 and 128."""
    if device.type == "cpu":
        return 16
    largest = 64 if dtype == torch.float32 else 128
    return next((rows for rows in (16, 32, 64) if slots <= rows * num_experts and rows < largest), largest)


def tiles(kernel: str, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Launch options of `kernel` for tiles of `rows` rows; a weight's gradient chooses its rows itself."""
    if device.type == "cpu":
        chosen = INTERPRETED
    elif dtype == torch.float32:
        chosen = FLOAT32
    else:
        chosen = SMALL if rows < 128 else LARGE[kernel]
    side = chosen["COLS"] if kernel == "weight_gradient" else rows
    return {"ROWS": side, **chosen}
