"""Router saturation: how much of a model's routing an other checkpoint has already, or still."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..routers import captured, find_routers
from .texts import Batch


def overlap(index_TK: torch.Tensor, other_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """|E_t ∩ E'_t| / |E_t| of each token, [T] float64: the share of its experts that both choose; 1 without any."""
    chosen_TK = index_TK < experts
    same_TK = (index_TK.unsqueeze(-1) == other_TK.unsqueeze(-2)).any(dim=-1) & chosen_TK
    own_T = chosen_TK.sum(dim=-1).double()
    return torch.where(own_T > 0, same_TK.sum(dim=-1) / own_T.clamp_min(1), 1.0)


@torch.no_grad()
def saturation(
    model: nn.Module, other: nn.Module, top_k: int, batches: Iterable[Batch], progress: Callable[[int], None]
) -> dict[str, float]:
    """Router -> mean over all tokens of `overlap` with `other` on the same text.

    Raises ValueError where the two have not the same routers, or where `other` does not know all tokens.
    """
    pair = [(part, find_routers(part)) for part in (model, other)]
    if pair[0][1].keys() != pair[1][1].keys():
        counts, alone = [len(routers) for _, routers in pair], min(pair[0][1].keys() ^ pair[1][1].keys())
        raise ValueError(
            f"they have not the same routers, but {counts[0]} and {counts[1]}; {alone} is in one of them alone"
        )
    known, needed = (part.config.get_text_config().vocab_size for part in (other, model))
    if known < needed:
        raise ValueError(f"it knows {known} tokens, not {needed}")
    sums, tokens = {}, 0
    for batch in batches:
        chosen = []
        for part, routers in pair:
            with captured(routers, top_k) as routings:
                ids, mask = batch.ids.to(part.device), batch.mask.to(part.device)
                part.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            kept = mask.flatten().nonzero().flatten()
            sizes = {name: (x.index_SK.shape[-1], x.experts) for name, x in routings.items()}
            chosen.append(({name: routing.index_SK[kept] for name, routing in routings.items()}, sizes))
        tokens += int(batch.mask.sum())
        (mine, sizes), (theirs, other_sizes) = chosen
        for name in sizes:
            if sizes[name] != other_sizes[name]:
                (top_k, experts), (other_k, others) = sizes[name], other_sizes[name]
                raise ValueError(f"{name} chooses {top_k} of {experts} experts, the other's {other_k} of {others}")
        for name, index_TK in mine.items():
            sums[name] = sums.get(name, 0.0) + overlap(index_TK, theirs[name], sizes[name][1]).sum().item()
        progress(int(batch.mask.sum()))
    return {name: total / tokens for name, total in sums.items()}
