"""What it costs to prune an expert: the loss when the router cannot choose it, against the loss with all of them.

Shapes: B batch, S sequence, T tokens, V vocabulary, E experts.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..routers import Router
from .texts import Batch

TOKENS = 128  # the fewest that a cost is measured on
MOST_TOKENS = 2048
ROWS = 256  # tokens whose losses are computed at a time, in float32


class Cost(NamedTuple):
    """Change of the mean loss of the next token, in nats, and its standard error over tokens."""

    mean: float
    error: float


class _Closed(TorchFunctionMode):
    """Sets the logits of one expert, which a linear map to E numbers makes, to the lowest number."""

    def __init__(self, expert: int, experts: int):
        super().__init__()
        self.expert, self.experts, self.closed = expert, experts, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is nn.functional.linear and output.shape[-1] == self.experts:
            output = output.clone()
            output[..., self.expert] = torch.finfo(output.dtype).min
            self.closed = True
        return output


@contextmanager
def without_expert(router: Router, expert: int, experts: int) -> Iterator[Callable[[], bool]]:
    """Inside, the router runs as it is but cannot choose `expert`; the value tells whether it had logits to close."""
    module, closed = router.module, []
    name = "logits" if hasattr(module, "assigned") and not router.own.hashed else "forward"  # of hf_moe's, or another
    own, method = vars(module).get(name), getattr(module, name)

    def shut(*args, **kwargs):
        output = method(*args, **kwargs).clone()
        output[..., expert] = torch.finfo(output.dtype).min
        closed.append(True)
        return output

    def masked(*args, **kwargs):
        with _Closed(expert, experts) as mode:
            output = method(*args, **kwargs)
        closed.append(mode.closed)
        return output

    bias = None if router.bias is None else router.bias.view(-1)  # Ernie 4.5 has [1, E]
    before = None if bias is None else bias[expert].clone()
    setattr(module, name, shut if name == "logits" else masked)
    if bias is not None:  # it moves the choice, and a score of 0 with the largest bias might win
        bias[expert] = bias.min() - 1
    try:
        yield lambda: bool(closed) and all(closed)
    finally:
        if bias is not None:
            bias[expert] = before
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)


@torch.no_grad()
def token_losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """-log p of each next token that is not padding, [T] float32, from logits [B, S, V]."""
    ids, mask = batch.ids.to(logits.device), batch.mask.to(logits.device)
    rows = logits[:, :-1][mask[:, 1:].bool()]
    following = ids[:, 1:][mask[:, 1:].bool()]
    parts = zip(rows.split(ROWS), following.split(ROWS), strict=True)
    losses = [nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in parts]
    return torch.cat(losses) if losses else rows.new_zeros(0, dtype=torch.float32)


def plan(budget: int, chosen: dict[str, torch.Tensor]) -> tuple[int, list[tuple[str, int]]]:
    """Tokens for each trial and which experts are tried, as (router, expert), so that all fit into `budget` tokens.

    `chosen` holds how often each router's experts were chosen, [E]. Where not all experts fit, every layer has as many
    tried, those with the least load first: they are the ones somebody would prune.
    """
    experts = sum(map(len, chosen.values()))
    tokens = min(max(budget // experts, TOKENS), MOST_TOKENS)
    order = {name: counts.argsort(stable=True).tolist() for name, counts in chosen.items()}
    ranks = range(max(map(len, order.values())))
    tried = [(name, ranked[rank]) for rank in ranks for name, ranked in order.items() if rank < len(ranked)]
    return tokens, tried[: budget // tokens]


@torch.no_grad()
def prune(
    model: nn.Module,
    routers: dict[str, Router],
    experts: dict[str, int],
    tried: list[tuple[str, int]],
    batches: list[Batch],
    progress: Callable[[int], None],
) -> dict[tuple[str, int], Cost]:
    """The cost of each expert in `tried` on the same tokens; none where a router has no logits (hash routers)."""

    def losses() -> torch.Tensor:
        found = []
        for batch in batches:
            ids, mask = (x.to(model.device) for x in batch)
            found.append(token_losses(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, batch))
        return torch.cat(found).double()

    tokens, whole, costs = sum(int(batch.mask.sum()) for batch in batches), losses(), {}
    for name, expert in tried:
        with without_expert(routers[name], expert, experts[name]) as closed:
            change = losses() - whole
        if closed():
            costs[name, expert] = Cost(change.mean().item(), change.std().item() / math.sqrt(len(change)))
        progress(tokens)
    return costs
