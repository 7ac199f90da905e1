"""Which parameters a run trains: named groups, made of parts that hold every parameter of a model exactly once.

The groups are those that ST-MoE compares (https://arxiv.org/abs/2202.08906, 4.2): all, non-MoE, MoE, attention, FFN.
"""

import re
from typing import NamedTuple

from torch import nn

# Part -> what the names of its parameters hold. Shared experts serve every token, as a dense layer does.
PARTS = {
    "embeddings": r"(^|\.)(embed_tokens|lm_head|score)\.",
    "norms": r"(^|\.)[a-z_]*norm\.(weight|bias)$",
    "attention": r"\.self_attn\.(?!gate\.|[qo]_experts$|[a-z_]*norm\.)",
    "dense_mlp": r"\.mlp\.(gate|up|down|gate_up)_proj\.",
    "shared_experts": r"\.mlp\.shared_expert(s|_gate)?\.",
    "routed_experts": r"\.mlp\.experts\.|\.self_attn\.[qo]_experts$",
    "router": r"\.(mlp|self_attn)\.(gate|router)\.",
    "multi_token": r"\.mtp_layers\.\d+\.eh_proj\.",
}

MOE = ("routed_experts", "router")

# Group -> the parts that train; the others keep requires_grad=False: no gradient, no optimizer state.
GROUPS = {
    "all": tuple(PARTS),
    "dense_only": tuple(part for part in PARTS if part not in MOE),
    "attention_only": ("attention",),
    "ffn_only": ("dense_mlp", "shared_experts"),
    "moe_only": MOE,
    "router_only": ("router",),
    "router_frozen": tuple(part for part in PARTS if part != "router"),
}


class Size(NamedTuple):
    """How many tensors, and how many numbers in them."""

    tensors: int = 0
    parameters: int = 0


def part_of(name: str) -> str:
    """The part that a parameter belongs to. Raises ValueError for a name that belongs to none."""
    found = [part for part, pattern in PARTS.items() if re.search(pattern, name)]
    if not found:
        raise ValueError(f"Parameter {name} belongs to none of {', '.join(PARTS)}: this model cannot train in groups.")
    assert len(found) == 1, (name, found)
    return found[0]


def part_sizes(model: nn.Module) -> dict[str, Size]:
    """Part -> its size, of the parts that the model has. Weights that are tied count once."""
    sizes = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        tensors, parameters = sizes.get(part, Size())
        sizes[part] = Size(tensors + 1, parameters + parameter.numel())
    return {part: sizes[part] for part in PARTS if part in sizes}


def train_group(model: nn.Module, group: str) -> str:
    """Freeze all but `group`, a key of GROUPS; returns what trains, in words. To be called before a trainer is made.

    Raises ValueError for an unknown group, one without a parameter in this model, or a parameter in no part.
    """
    if group not in GROUPS:
        raise ValueError(f"trainable is {group!r}; it can be {', '.join(GROUPS)}.")
    sizes = part_sizes(model)
    chosen = {part: size for part, size in sizes.items() if part in GROUPS[group]}
    if not chosen:
        raise ValueError(
            f"trainable {group} has no parameter in this model: it takes {', '.join(GROUPS[group])}, and the model "
            f"has {', '.join(sizes)}."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in chosen)
    return description(group, chosen, sizes)


def description(group: str, chosen: dict[str, Size], sizes: dict[str, Size]) -> str:
    tensors, parameters = (sum(counts) for counts in zip(*chosen.values(), strict=True))
    all_tensors, all_parameters = (sum(counts) for counts in zip(*sizes.values(), strict=True))
    parts = ", ".join(f"{part} {size.parameters:,}" for part, size in chosen.items())
    frozen = ", ".join(part for part in sizes if part not in chosen) or "nothing"
    return (
        f"trainable {group}: {tensors} of {all_tensors} tensors, {parameters:,} of {all_parameters:,} parameters "
        f"({parameters / all_parameters:.2%}): {parts}; frozen: {frozen}"
    )
