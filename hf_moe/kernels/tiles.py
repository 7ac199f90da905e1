"""Tile sizes, warps and pipeline stages of each kernel.

Chosen among some ten each by the time of both layers of benchmarks/moe_layer.py on an H100 (Triton 3.6, bfloat16).
Hopper's warp specialization (tl.range) hung in these kernels.
"""

import torch

from .launch import FUSED

SHARED_MEMORY = 227 * 1024  # bytes that the largest tiles take: what an H100 gives a block

# For 16-bit numbers and many rows an expert, on Hopper. With one program a processor and the loop over tiles flattened
# a tile's first loads overlap the stores of the one before; in the up-projection this costs registers that it lacks.
EVERY_TILE = 1 << 20  # programs a processor: as many as there are tiles
LARGE = {
    "up": {"COLS": 128, "GROUP": 8, "FLATTEN": False, "per_processor": EVERY_TILE},
    "product": {"COLS": 256, "GROUP": 8, "FLATTEN": True, "per_processor": 1, "PARTS": 2},
    "narrow": {"COLS": 16, "GROUP": 8, "FLATTEN": False, "per_processor": EVERY_TILE, "PARTS": 1},
    "weight_gradient": {"ROWS": 128, "COLS": 256, "GROUP": 16, "FLATTEN": True, "per_processor": 1},
}
LARGE = {name: chosen | {"DEPTH": 64, "num_warps": 8, "num_stages": 3} | FUSED for name, chosen in LARGE.items()}
SMALL = {"COLS": 64, "num_warps": 4, "num_stages": 3, "FLATTEN": False, "per_processor": EVERY_TILE}
FLOAT32 = SMALL | {"DEPTH": 32, "num_stages": 2}
INTERPRETED = {"COLS": 32, "DEPTH": 32, "GROUP": 2}


def row_tile(slots: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of one tile: those that an expert gets on average, rounded up to a power of two, between 16 and 128."""
    if device.type == "cpu":
        return 16
    largest = 64 if dtype == torch.float32 else 128
    return next((rows for rows in (16, 32, 64) if slots <= rows * num_experts and rows < largest), largest)


def tiles(kernel: str, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Launch options of `kernel` for tiles of `rows` rows; a weight's gradient has tiles of its own.

    The large ones only where their pipeline fits, in the shared memory of an H100.
    """
    chosen = dict(LARGE[kernel])
    if device.type == "cpu":
        chosen |= INTERPRETED
    elif dtype == torch.float32:
        chosen |= FLOAT32
    elif kernel == "narrow":
        chosen |= {"num_warps": 4}
    elif rows < 128 or shared_memory(device) < SHARED_MEMORY:
        chosen |= SMALL
    if "ROWS" in chosen and chosen["COLS"] < 128:
        chosen["ROWS"] = chosen["COLS"]
    return chosen


def pass_rows(device: torch.device) -> int:
    """Rows that one program of a pass over memory takes: few, so that many programs have loads under way."""
    return 16 if device.type == "cpu" else 1


def shared_memory(device: torch.device) -> int:
    """Bytes that a block may have on this card; 0 of makers that do not say."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
