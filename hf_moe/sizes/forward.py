"""What one forward of any model computes and leaves in its cache, counted on fake tensors: its own code says it.

Nothing is allocated or computed.
"""

from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .activations import fake_grouped_mm, make_fake

START = 8  # tokens; longer than the convolutions of state spaces


class Forward(NamedTuple):
    """flops: of its matrix products. cached: bytes in the cache after it, None where the output has no cache."""

    flops: int
    cached: int | None


class Cached(NamedTuple):
    """Bytes in the cache: for each token at first, whatever their number, and after `context` tokens."""

    per_token: int
    fixed: int
    at_context: int


@torch.no_grad()
def counted(model: PreTrainedModel, context: int) -> tuple[int, Cached | None] | None:
    """FLOPs of a forward of `context` tokens and what it leaves in the cache; None where the data decide about sizes.

    `model` is on the meta device and made fake. Attention is eager, so that each token meets all others.
    """
    model.eval()
    if model.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")
    model.config._experts_implementation = "grouped_mm"
    try:
        with FakeTensorMode(), fake_grouped_mm():
            make_fake(model)
            first, second, last = (forward(model, length) for length in (START, START + 1, context))
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None
    if None in (first.cached, second.cached, last.cached):
        return last.flops, None
    per_token = second.cached - first.cached
    return last.flops, Cached(per_token, first.cached - START * per_token, last.cached)


def forward(model: PreTrainedModel, length: int) -> Forward:
    with FlopCounterMode(display=False) as counter:
        outputs = model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=True)
    cache = next((x for x in outputs.values() if isinstance(x, Cache)), None)
    found: dict[int, torch.Tensor] = {}
    keep_tensors(cache, found)
    held = sum(x.nbytes for x in found.values() if x.is_floating_point())
    return Forward(counter.get_total_flops(), None if cache is None else held)


def keep_tensors(value, found: dict[int, torch.Tensor]) -> None:
    """Add to `found` the tensors in a cache, which has layers of several kinds."""
    if isinstance(value, torch.Tensor):
        found[id(value)] = value
    elif isinstance(value, (list, tuple)):
        for x in value:
            keep_tensors(x, found)
    elif isinstance(value, dict) or hasattr(value, "__dict__"):
        for x in (value if isinstance(value, dict) else vars(value)).values():
            keep_tensors(x, found)
