"""What Transformers' grouped product ("grouped_mm") takes."""

import torch

ROW_BYTES = 16


def takes_rows(size: int, dtype: torch.dtype) -> bool:
    """Whether the grouped product multiplies rows of `size` values: none of 8 bytes, and rows of whole 16 bytes."""
    return dtype.itemsize <= 4 and size * dtype.itemsize % ROW_BYTES == 0
