"""The routers of a model, Transformers' own too: where they are, what they compute, what they did in a forward."""

from .find import Router, Routing, as_list, captured, find_routers, routed_experts, token_mask
from .probe import BIASES

__all__ = ["BIASES", "Router", "Routing", "as_list", "captured", "find_routers", "routed_experts", "token_mask"]
