"""The cache layer that grows in place against Transformers' DynamicLayer, through everything generation does to it."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from hf_moe.model.growing_layer import MIN_ROOM, HfMoeGrowingLayer, grow_in_place
from tests.conftest import tiny_config

SIZES = (5, 3)  # of a key and a value


def new_tokens(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(batch, 2, length, size) for size in SIZES)


OPERATIONS = {
    "crop": lambda layer: layer.crop(-3),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
    "select-slice": lambda layer: layer.batch_select_indices(slice(1, None)),
    "reset": lambda layer: layer.reset(),
    "offload": lambda layer: (layer.offload(), layer.prefetch()),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_equals_a_dynamic_layer(operation):
    ours, theirs = HfMoeGrowingLayer(), DynamicLayer()
    for lengths in ([7, 1, 1, 4], [1, 2 * MIN_ROOM, 1, 1]):  # the second time it outgrows its room
        for length in lengths:
            batch = 3 if not ours.is_initialized else ours.keys.shape[0]
            keys, values = new_tokens(batch, length)
            results = ours.update(keys, values), theirs.update(keys, values)
            for mine, other in zip(*results, strict=True):
                assert torch.equal(mine, other)
        for layer in (ours, theirs):
            OPERATIONS[operation](layer)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_step_stays_in_the_same_memory_until_the_room_is_used():
    layer = HfMoeGrowingLayer()
    layer.update(*new_tokens(2, 9))
    moves = 0
    for _ in range(3 * MIN_ROOM):
        before = layer.keys.data_ptr()
        layer.update(*new_tokens(2, 1))
        moves += layer.keys.data_ptr() != before
    assert moves == 2
    layer.crop(-20)
    before = layer.keys.data_ptr()
    layer.update(*new_tokens(2, 20))
    assert layer.keys.data_ptr() == before


def test_a_deep_copy_is_independent():
    layer = HfMoeGrowingLayer()
    layer.update(*new_tokens(2, 9))
    other = copy.deepcopy(layer)
    layer.update(*new_tokens(2, 1))
    kept = layer.keys.clone()
    other.update(*new_tokens(2, 1))
    assert torch.equal(layer.keys, kept) and not torch.equal(layer.keys, other.keys)


def test_gradients_reach_what_was_cached():
    layer = HfMoeGrowingLayer()
    first, second = ([x.requires_grad_() for x in new_tokens(2, length)] for length in (4, 1))
    loss = layer.update(*first)[0].square().sum()
    loss = loss + layer.update(*second)[0].square().sum()
    loss.backward()
    torch.testing.assert_close(first[0].grad, 4 * first[0])
    torch.testing.assert_close(second[0].grad, 2 * second[0])


def test_a_cache_from_inference_mode_goes_on_outside():
    layer = HfMoeGrowingLayer()
    with torch.inference_mode():
        first = new_tokens(2, 4)
        layer.update(*first)
    second = new_tokens(2, 1)
    assert torch.equal(layer.update(*second)[0], torch.cat((first[0], second[0]), dim=2))


def test_only_empty_dynamic_layers_are_replaced():
    cache = DynamicCache(
        config=tiny_config(layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=4)
    )
    cache.layers[2].update(*new_tokens(1, 2))
    cache.layers.append(StaticLayer(max_cache_len=4))
    before = list(cache.layers)
    for layer_idx in range(4):
        grow_in_place(cache, layer_idx)
    assert type(cache.layers[0]) is HfMoeGrowingLayer and cache.layers[1:] == before[1:]


def test_a_cache_that_adds_its_layers_later_grows_in_place():
    cache = DynamicCache()
    grow_in_place(cache, 0)
    cache.update(*new_tokens(1, 2), 0)
    assert type(cache.layers[0]) is HfMoeGrowingLayer
