"""What every launch of a layer shares: sizes, formula, tiles."""

from dataclasses import dataclass

import torch
import triton

from .activations import ACTIVATIONS
from .formula import Formula
from .routing_metadata import Routing
from .tile_loads import described, operand, precision
from .tiles import processors, row_tile, tiles


@dataclass(frozen=True)
class Experts:
    """E feed-forward networks; weights are [E, out, in], or [E, in, out] if transposed."""

    num_experts: int
    inner: int
    top_k: int
    formula: Formula
    tile: int  # rows of one tile

    @classmethod
    def of(cls, index: torch.Tensor, down: torch.Tensor, formula: Formula) -> "Experts":
        tile = row_tile(index.numel(), len(down), down.dtype, down.device)
        return cls(len(down), down.shape[1 if formula.transposed else 2], index.shape[1], formula, tile)

    @property
    def halves(self) -> int:
        return 2 if self.formula.gated else 1

    def row_tiles(self, routing: Routing) -> int:
        """No routing has more tiles than this; how many there are, only the device knows."""
        return routing.row_of_slot.numel() // self.tile + self.num_experts

    def rows(self, routing: Routing, columns: int, like: torch.Tensor) -> torch.Tensor:
        """Uninitialised rows for every tile."""
        return like.new_empty(self.row_tiles(routing) * self.tile, columns)

    def product(self, name: str, w: torch.Tensor, last: bool, columns: int, routing: Routing):
        """Grid, weight operand and options of the grouped product `name`, summed over w's last axis if `last`."""
        chosen = tiles(name, self.tile, w.dtype, w.device)
        block = (chosen["COLS"], chosen["DEPTH"]) if last else (chosen["DEPTH"], chosen["COLS"])
        per_processor = chosen.pop("per_processor")
        programs = self.row_tiles(routing) * triton.cdiv(columns, chosen["COLS"])
        options = {
            "num_experts": self.num_experts,
            "W_LAST": last,
            "W_TMA": described(w, block[-1]),
            "EVEN": w.shape[2 if last else 1] % chosen["DEPTH"] == 0,
            "PRECISION": precision(w.dtype),
            "ROWS": self.tile,
            **chosen,
        }
        return (min(programs, per_processor * processors(w.device)),), operand(w, 1, *block), options

    @property
    def formula_options(self) -> dict:
        """What kernels that compute the activation are told of it."""
        activation, gated, _, interleaved, limit, shift = self.formula
        options = {"ACTIVATION": ACTIVATIONS[activation], "GATED": gated, "INTERLEAVED": interleaved}
        return options | {"LIMIT": limit, "SHIFT": shift}
