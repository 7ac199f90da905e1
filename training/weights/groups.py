"""Which parameters a run trains: named groups, made of parts that hold every parameter of a model exactly once.

The groups are those that ST-MoE compares (https://arxiv.org/abs/2202.08906, 4.2): all, non-MoE, MoE, attention, FFN.
"""

import re
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from hf_moe.routers import find_routers

# Part -> what the names of its parameters hold; the first that fits counts. Routers and routed experts are those that
# the model's layers call so, if it has any beside a router. Shared experts serve every token, as a dense layer does.
PARTS = {
    "embeddings": r"(^|\.)(embed_tokens|embeddings|wte|lm_head|score)\.",
    "norms": r"(^|\.)[a-z_]*norm[a-z0-9_]*\.(weight|bias)$",
    "attention": r"\.(self_attn|attn|norm_attn_norm|linear_attn|self_attention|attention)\."
    r"(?!gate\.|[qo]_experts$|[a-z_]*norm\.|.*indexer)|\.mixer\.[qkvo]_proj\.",
    "dense_mlp": r"\.(mlp|mlps\.\d+|feed_forward|mixer)\.(gate|up|down|gate_up)_proj\.|\.feed_forward\.w[123]\.",
    "shared_experts": r"\.shared_(expert|mlp)[a-z_]*\.|\.fc[12]_latent_proj\.",
    "routed_experts": r"\.mlp\.experts\.|\.self_attn\.[qo]_experts$",
    "router": r"\.(mlp|self_attn)\.(gate|router)\.",
    "multi_token": r"\.mtp_layers\.\d+\.eh_proj\.",
    "encoders": r"(?!)",  # what reads pictures or sound: by its place, for inside are names as those above
    "other": "",
}

MOE = ("routed_experts", "router")
# Of matrices, which adapters adapt and codes stand for; what else is in them (biases, sinks) stays as it is.
MATRIX_PARTS = ("attention", "dense_mlp", "shared_experts", "routed_experts")

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


def parts_of(model: nn.Module) -> dict[str, str]:
    """Name of each parameter -> the part that it belongs to."""
    names = {part: name for name, part in model.named_modules()}
    places = dict.fromkeys(beside_decoder(model, names), "encoders")
    for name, router in find_routers(model).items():
        places[f"{name}."] = "router"
        if router.layer is not None:
            places[f"{names[router.layer]}.experts."] = "routed_experts"
        else:  # JetMoE's are tensors of the layer
            start = f"{name.rpartition('.')[0]}."
            fused = (key for key, x in model.named_parameters() if x.dim() == 3 and key.startswith(start))
            places |= dict.fromkeys(fused, "routed_experts")
    return {name: part_of(name, places) for name, _ in model.named_parameters()}


def matrices(model: nn.Module) -> dict[str, str]:
    """Name -> part, of each weight matrix in MATRIX_PARTS, fused ones too.

    A matrix with one row or column (the gate of a shared expert) is left out, and one whose layer does something else
    with it than a product (DeepSeek-V4's grouped projection).
    """
    found = {name: part for name, part in parts_of(model).items() if part in MATRIX_PARTS}
    return {name: part for name, part in found.items() if is_matrix(model, name, part)}


def is_matrix(model: nn.Module, name: str, part: str) -> bool:
    parameter, owner = model.get_parameter(name), type(model.get_submodule(name.rpartition(".")[0]))
    if parameter.dim() == 3:
        return part == "routed_experts"
    own_product = issubclass(owner, nn.Linear) and owner.__module__.startswith("transformers.models.")
    return name.endswith(".weight") and parameter.dim() == 2 and min(parameter.shape) > 1 and not own_product


def beside_decoder(model: nn.Module, names: dict[nn.Module, str]) -> Iterator[str]:
    """Names of the parameters within a model of several parts that are not its decoder's: its heads are neither."""
    base = getattr(model, "base_model", model)
    decoder = base.get_decoder() if isinstance(base, PreTrainedModel) else base
    if not isinstance(decoder, PreTrainedModel) or decoder is base or decoder not in names:
        return
    for name, _ in base.named_parameters(prefix=names[base]):
        if not name.startswith(f"{names[decoder]}."):
            yield name


def part_of(name: str, places: dict[str, str] | None = None) -> str:
    """The part of a parameter: by the `places` where routers and experts are, else by its name."""
    placed = (part for start, part in (places or {}).items() if name.startswith(start))
    return next(chain(placed, (part for part, pattern in PARTS.items() if re.search(pattern, name))))


def part_sizes(model: nn.Module, parts: dict[str, str] | None = None) -> dict[str, Size]:
    """Part -> its size, of the parts that the model has. Weights that are tied count once.

    `parts`: what `parts_of` found, where that is known already.
    """
    sizes, parts = {}, parts_of(model) if parts is None else parts
    for name, parameter in model.named_parameters():
        part = parts[name]
        tensors, parameters = sizes.get(part, Size())
        sizes[part] = Size(tensors + 1, parameters + parameter.numel())
    return {part: sizes[part] for part in PARTS if part in sizes}


def train_group(model: nn.Module, group: str) -> str:
    """Freeze all but `group`, a key of GROUPS; returns what trains, in words. To be called before a trainer is made.

    Raises ValueError for an unknown group, or one without a parameter in this model.
    """
    if group not in GROUPS:
        raise ValueError(f"trainable is {group!r}; it can be {', '.join(GROUPS)}.")
    parts = parts_of(model)
    sizes = part_sizes(model, parts)
    chosen = {part: size for part, size in sizes.items() if part in GROUPS[group]}
    if not chosen:
        raise ValueError(
            f"trainable {group} has no parameter in this model: it takes {', '.join(GROUPS[group])}, and the model "
            f"has {', '.join(sizes)}."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts[name] in chosen)
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
