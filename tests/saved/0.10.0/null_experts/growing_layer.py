"""A dynamic cache layer that grows in place: a step writes its own tokens and copies none of the earlier ones."""

import torch
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 1 / 8  # tokens of spare room per token in the cache, when it has to move
MIN_ROOM = 128


def append(cached: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`cached` [B, heads, S, d] and then `new` [B, heads, s, d], in the memory of `cached` where that has room.

    Where it has none, both move into memory with room to spare, of which the result shows its tokens only. The room is
    read off the strides: a copy of the cache (reordering, offloading) has none, a cropped view of it still has.
    """
    if cached.dim() == 1:  # an empty cache
        cached = new[:, :, :0]
    batch, heads, length, size = cached.shape
    needed = length + new.shape[2]
    rows = cached.stride(1) // max(cached.stride(2), 1)
    writable = torch.is_inference_mode_enabled() or not cached.is_inference()
    if length == 0 or needed > rows or not writable:
        rows = needed + max(int(needed * ROOM), MIN_ROOM)
        moved = new.new_empty(batch, heads, rows, size)
        moved[:, :, :length] = cached
    else:
        moved = cached.as_strided((batch, heads, rows, size), cached.stride())
    moved[:, :, length:needed] = new
    return moved[:, :, :needed]


class HfMoeGrowingLayer(DynamicLayer):
    """Transformers' DynamicLayer, which copies the whole cache at every step, with room for the steps to come."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        pairs = [(self.keys, key_states), (self.values, value_states)]
        differentiable = any(tensor.requires_grad for pair in pairs for tensor in pair)
        if differentiable or torch.compiler.is_compiling():  # neither bears writing into a tensor that was read
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = (append(cached, new) for cached, new in pairs)
        return self.keys, self.values


def grow_in_place(cache: Cache, layer_idx: int) -> None:
    """Give `cache` a growing layer where Transformers put an empty DynamicLayer. Any other layer stays as it is."""
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = HfMoeGrowingLayer
    if layer_idx < len(cache.layers):
        layer = cache.layers[layer_idx]
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[layer_idx] = HfMoeGrowingLayer()
