"""What every launch of a layer shares: sizes, formula, tiles."""

from dataclasses import dataclass

import torch
import triton

from .activations import ACTIVATIONS
from .routing_metadata import Routing
from .tile_loads import described, operand
from .tiles import row_tile, tiles


@dataclass(frozen=True)
class Experts:
    """E feed-forward networks; weights are [E, out, in], or [E, in, out] if transposed."""

    num_experts: int
    inner: int
    top_k: int
    activation: str
    gated: bool
    transposed: bool
    rows: int  # of one tile

    @classmethod
    def of(cls, index: torch.Tensor, down: torch.Tensor, activation: str, gated: bool, transposed: bool) -> "Experts":
        rows = row_tile(index.numel(), len(down), down.dtype, down.device)
        return cls(len(down), down.shape[1 if transposed else 2], index.shape[1], activation, gated, transposed, rows)

    @property
    def width(self) -> int:
        return self.inner * (2 if self.gated else 1)

    @property
    def formula(self) -> dict:
        return {"TOP_K": self.top_k, "ACTIVATION": ACTIVATIONS[self.activation], "GATED": self.gated}

    def product(self, name: str, w: torch.Tensor, last: bool, columns: int, routing: Routing):
        """Grid, weight and options of the grouped product `name` with `w`, summed over w's last axis if `last`."""
        chosen = tiles(name, self.rows, w.dtype, w.device)
        block = [1, chosen["COLS"], chosen["DEPTH"]] if last else [1, chosen["DEPTH"], chosen["COLS"]]
        row_tiles = routing.slot_of_row.numel() // self.rows + self.num_experts
        options = {
            "row_tiles": row_tiles,
            "num_experts": self.num_experts,
            "W_LAST": last,
            "W_TMA": described(w, block),
            "EVEN": w.shape[2 if last else 1] % chosen["DEPTH"] == 0,
            "PRECISION": precision(w.dtype),
            **chosen,
        }
        return (row_tiles * triton.cdiv(columns, chosen["COLS"]),), operand(w, block), options


def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as torch.set_float32_matmul_precision says."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"
