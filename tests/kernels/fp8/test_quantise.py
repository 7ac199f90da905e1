"""Quantisation: its definition against float64, the kernels against the definition, bit for bit."""

import pytest
import torch

from hf_moe.kernels.fp8 import quantise
from hf_moe.kernels.fp8.format import blocks_of, tiles_of

SIZES = [(1, 128), (5, 48), (130, 272), (256, 128)]


def numbers(*shape) -> torch.Tensor:
    """Of many magnitudes, and a row of zeros."""
    x = torch.randn(shape) * torch.exp(4 * torch.randn(*shape[:-1], 1))
    x[..., 0, :] = 0
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_are_as_near_as_three_bits_tell(size, dtype):
    x = numbers(*size).to(dtype)
    tiles = tiles_of(x)
    assert tiles.codes.dtype == torch.float8_e4m3fn and len(tiles.codes) % 128 == 0
    mantissa, _ = torch.frexp(tiles.scales)
    assert (mantissa == 0.5).all()
    for row in range(size[0]):
        for first in range(0, size[1], 128):
            part = x[row, first : first + 128].double()
            scale = tiles.scales[first // 128, row].item()
            if part.any():  # the least power of two with which the largest number fits
                assert scale / 2 < part.abs().max().item() / 448 <= scale
            error = (tiles.values()[row, first : first + 128].double() - part).abs()
            assert (error <= (part.abs() / 16).clamp(min=scale * 2.0**-10)).all()
    assert not tiles.values()[size[0] :].any()


@pytest.mark.parametrize("size", [(2, 128, 256), (1, 48, 144), (3, 272, 130)], ids=str)
def test_blocks_are_those_of_releases(size):
    from hf_moe.stored_weights import Fp8Weight

    weight = numbers(*size)
    blocks, stored = blocks_of(weight), Fp8Weight.quantize(weight)
    assert torch.equal(blocks.codes.float(), stored.packed.float())
    torch.testing.assert_close(blocks.values(), stored.values())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(bad):
    x = torch.randn(3, 128)
    x[1, 5] = bad
    assert tiles_of(x).values().isnan().any(1)[:3].tolist() == [False, True, False]
    assert blocks_of(x.unsqueeze(0)).values().isnan().any()


def equal(ours: tuple, expected: tuple) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert torch.equal(one.cpu().float(), other.float())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel_of_tiles(device, size):
    x = numbers(*size)
    equal(quantise.tiles_of(x.to(device)), tiles_of(x))


@pytest.mark.parametrize("size", [(2, 128, 256), (1, 48, 144), (3, 272, 130)], ids=str)
def test_kernel_of_blocks(device, size):
    weight = numbers(*size)
    blocks, turned = quantise.blocks_of(weight.to(device))
    expected = blocks_of(weight)
    equal(blocks, expected)
    equal(turned, (expected.codes.mT, expected.scales.mT))
