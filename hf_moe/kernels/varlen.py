"""The attention implementation "varlen": of documents packed into one row, at the cost of the documents alone.

torch's flash attention over sequences of several lengths, where a batch says where its documents end, as TRL's and
Transformers' padding-free collators do (`cu_seq_lens_q`). Nothing of the row's square is made, not even a mask. What
has no documents, as evaluation on padded rows or a step of decoding, is "sdpa" with its own mask.
Shapes: B batch, S sequence, H heads, d head size, T tokens of the row, N documents.
"""

from functools import cache, cached_property
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .precision import computed_in

LARGEST_HEAD = 256
DTYPES = (torch.bfloat16, torch.float16)


class LateMask:
    """The mask that sdpa would be given, made when it is asked for: packed documents need none."""

    def __init__(self, **arguments: Any):
        self.arguments = arguments

    @cached_property
    def mask(self) -> torch.Tensor | None:
        return sdpa_mask(**self.arguments)


def varlen_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LateMask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q k^T * scaling + mask) v within each document: [B, S, H, d_v] from query [B, H, S, d].

    `cu_seq_lens_q` [N + 1] are the documents' ends in the row, from 0; `max_length_q` is at least the longest. Raises
    ValueError for sinks and soft-caps, which it does not have, and for documents that see their future.
    """
    for name in ("s_aux", "softcap"):
        if kwargs.get(name) is not None:
            raise ValueError(f'The attention implementation "varlen" has no {name}: take flex_attention.')
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if cu_seq_lens_q is not None and not causal:
        raise ValueError('The attention implementation "varlen" is causal: take flash_attention_2 or flex_attention.')
    dtype = computed_in(query, query.dtype)
    if cu_seq_lens_q is None or dropout or unusable(query.device, dtype, max(query.shape[-1], value.shape[-1])):
        mask = attention_mask.mask if isinstance(attention_mask, LateMask) else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    ends, longest = cu_seq_lens_q, max_length_q
    if (chunk := chunk_of(module)) is not None:
        ends, longest = chunks(ends, query.shape[2] * query.shape[0], chunk), min(longest, chunk)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    rows = [x.to(dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # [T, heads, d]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = attended(*rows, ends, longest, scaling, window)
    return output.view(query.shape[0], query.shape[2], *output.shape[1:]), None


def attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scaling: float,
    window: tuple[int, int],
) -> torch.Tensor:
    """[T, H, d_v] from query [T, H, d], key and value [T, H_kv, d or d_v]."""
    from torch.nn.attention.varlen import varlen_attn

    size = value.shape[-1]
    # The kernel has one size for all, a multiple of 8; a latent attention's values are smaller than its keys.
    wide = -(-max(query.shape[-1], size) // 8) * 8
    query, key, value = (filled_up(x, wide) for x in (query, key, value))
    options = {}
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    output = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling, window_size=window, **options)
    return output[..., :size]


def filled_up(x: torch.Tensor, size: int) -> torch.Tensor:
    """[T, H, size] of [T, H, d]; `pad` would copy what has that size."""
    return x if x.shape[-1] == size else nn.functional.pad(x, (0, size - x.shape[-1]))


@cache
def unusable(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why the kernel cannot run, or None."""
    if device.type != "cuda" or (torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0)):
        return "needs an NVIDIA card of the Ampere generation or newer"
    if dtype not in DTYPES:
        return f"computes in bfloat16 and float16, not in {dtype}"
    return f"has heads of up to {LARGEST_HEAD}" if head_size > LARGEST_HEAD else None


def chunk_of(module: nn.Module) -> int | None:
    """The length that a chunked layer's attention stays within, None of another layer."""
    kinds, layer = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    chunked = kinds is not None and layer is not None and kinds[layer] == "chunked_attention"
    return module.config.attention_chunk_size if chunked else None


def chunks(ends: torch.Tensor, tokens: int, size: int) -> torch.Tensor:
    """The ends of documents cut into chunks of up to `size`, from each one's own beginning.

    As many as there may be, so that nobody asks the device how many there are: those at the end are empty.
    """
    place = torch.arange(tokens, device=ends.device)
    first = ends[torch.searchsorted(ends, place, right=True) - 1]
    starts = torch.where((place - first) % size == 0, place, tokens).sort().values
    most = min(tokens, len(ends) - 1 + tokens // size)
    return nn.functional.pad(starts[:most], (0, 1), value=tokens).to(ends.dtype)
