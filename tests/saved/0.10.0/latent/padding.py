"""Which tokens count: read off whatever mask a forward gets, so that padding takes no place at an expert.

Shapes: B batch, S tokens of this forward, N positions that a mask [B, N] knows, S_kv keys, H heads.
"""

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache

Mask = torch.Tensor | BlockMask | None


def check_mask(attention_mask: Mask | dict[str, Mask], implementation: str | None) -> None:
    """Raise ValueError for a mask that attention would take for another one, or that says nothing of padding."""
    masks = attention_mask.values() if isinstance(attention_mask, dict) else (attention_mask,)
    for mask in masks:
        if not isinstance(mask, torch.Tensor):
            continue
        if mask.dim() not in (2, 4):
            raise ValueError(
                f"attention_mask has shape {list(mask.shape)}: give [batch, tokens], 0 on padding, or "
                "[batch, heads or 1, queries, keys]."
            )
        if mask.dim() == 4 and not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise ValueError(
                f"attention_mask {list(mask.shape)} is {mask.dtype}: give a bool one, True where a query sees a key, "
                "or what is added to the scores in floating point."
            )
        if mask.dim() == 4 and "flash" in str(implementation):
            raise ValueError(
                f"attention_mask {list(mask.shape)} does not go with attn_implementation {implementation}, which "
                "knows padding alone: give one of [batch, tokens], or use sdpa, eager or flex_attention."
            )


def as_attention_reads(
    attention_mask: Mask | dict[str, Mask], dtype: torch.dtype, implementation: str | None
) -> Mask | dict[str, Mask]:
    """Masks [B, H, S, S_kv] in what this implementation reads: bool for sdpa alone, else finite numbers of `dtype`."""
    if isinstance(attention_mask, dict):
        return {kind: as_attention_reads(mask, dtype, implementation) for kind, mask in attention_mask.items()}
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4:
        return attention_mask
    lowest = torch.finfo(dtype).min
    if attention_mask.dtype != torch.bool:
        return attention_mask.clamp_min(lowest).to(dtype)
    if implementation == "sdpa":
        return attention_mask
    return torch.zeros_like(attention_mask, dtype=dtype).masked_fill(~attention_mask, lowest)


def valid_tokens(
    attention_mask: Mask | dict[str, Mask],
    batch: int,
    length: int,
    past_key_values: Cache | None = None,
    layer_types: list[str] | None = None,
) -> torch.Tensor | None:
    """[B, S] False on padding, of B = `batch` rows and S = `length` tokens; None where nothing is.

    A mask [B, N] says it of each position. In one of queries and keys, or a dict of them by `layer_types`, padding is
    what does not see itself, or sees all, which fills rows that see nothing, and is not seen by the last query.
    `past_key_values` is the cache before these tokens: it says where they stand.
    """
    layer = 0
    if isinstance(attention_mask, dict):
        kinds = [kind for kind, mask in attention_mask.items() if mask is not None]
        if not kinds:
            return None
        layer = layer_types.index(kinds[0]) if kinds[0] in (layer_types or ()) else 0
        attention_mask = attention_mask[kinds[0]]
    if attention_mask is None:
        return None
    width, paired = attention_mask.shape[-1], len(attention_mask.shape) == 4
    first = width - length if past_key_values is None else past_key_values.get_seq_length(layer)
    if past_key_values is not None and paired:  # a window's mask begins at its first key
        first = first - past_key_values.get_mask_sizes(length, layer)[1]
    block = isinstance(attention_mask, BlockMask)
    queries = torch.arange(length, device=attention_mask.kv_indices.device if block else attention_mask.device)
    own = (queries + first).clamp(max=width - 1)
    if not paired:
        return attention_mask[:, own].bool()
    if block:
        rows = torch.arange(attention_mask.shape[0], device=queries.device)[:, None]
        return attention_mask.mask_mod(rows, torch.zeros_like(rows), queries[None], own[None]).expand(batch, length)
    pairs = attention_mask.expand(batch, -1, length, -1)
    itself, everything, by_last = (
        x if x.dtype == torch.bool else x.float().exp() > 0  # as a softmax in float32 has it
        for x in (pairs[:, :, queries, own], pairs.amin(dim=-1), pairs[:, :, -1, own])  # [B, H, S]
    )
    return (itself & (by_last | ~everything)).any(dim=1)
