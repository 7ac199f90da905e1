"""A trained mixture of experts in another shape: experts dropped, doubled, added or exchanged; the rest as it was."""

from .exchange import exchange_experts
from .grow import grow
from .prune import prune

__all__ = ["exchange_experts", "grow", "prune"]
