"""E4M3 codes beside scales in float32: tiles of 1 x 128 of activations and gradients, blocks of 128 x 128 of weights.

DeepSeek-V3, https://arxiv.org/abs/2412.19437, 3.3.2: x is codes * scale with scale = amax / 448, found as the numbers
come. Scales of tiles are rounded up to a power of two, with which a second quantisation, along the other axis, adds
next to no error (V3 does so where tiles are turned; here all of them are). It costs no precision: codes are floats.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from ...stored_weights import blocks_of as split
from ...stored_weights import spread, whole_of

CODE = torch.float8_e4m3fn
LARGEST = 448.0  # of E4M3
SMALLEST = 1e-30  # an amax at least: zeros have a scale, too
BLOCK = 128


class Tiles(NamedTuple):
    """A matrix [R, N] in tiles of 1 x 128 along N: codes [R, N], scales [ceil(N / 128), R].

    R is a multiple of 128: zeros fill it up. The scales that a product needs at once lie side by side.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def values(self) -> torch.Tensor:
        return self.codes.float() * self.scales.repeat_interleave(BLOCK, 0)[: self.codes.shape[1]].T


class Blocks(NamedTuple):
    """Matrices [E, M, N] in blocks of 128 x 128: codes [E, M, N], scales [E, ceil(M / 128), ceil(N / 128)]."""

    codes: torch.Tensor
    scales: torch.Tensor

    def values(self) -> torch.Tensor:
        return self.codes.float() * spread(self.scales, (BLOCK, BLOCK), self.codes.shape)


def up_to_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def scale_of(amax: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """amax / 448, or the next power of two from there on."""
    scale = amax.clamp(min=SMALLEST) / LARGEST
    if power_of_two:  # by the bits: a mantissa that is not 0 carries into the exponent, and is cut off
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scale


def tiles_of(x: torch.Tensor) -> Tiles:
    """A matrix in tiles along its last axis."""
    rows, columns = x.shape
    x = F.pad(x.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = x.unflatten(1, (-1, BLOCK))
    scales = scale_of(tiles.abs().amax(2), power_of_two=True)
    codes = (tiles / scales.unsqueeze(2)).flatten(1)[:, :columns].to(CODE)
    return Tiles(codes.contiguous(), scales.T.contiguous())


def blocks_of(weight: torch.Tensor) -> Blocks:
    """Matrices [E, M, N], or one [M, N], in blocks, as releases of DeepSeek-V3 store them."""
    weight = weight.view(-1, *weight.shape[-2:])
    blocks = split(weight, (BLOCK, BLOCK))  # [E, rows, 128, columns, 128]
    scales = scale_of(blocks.abs().amax((2, 4)), power_of_two=False)
    return Blocks(whole_of((blocks / scales[:, :, None, :, None]).to(CODE), weight.shape), scales)
