"""`grow`: a trained mixture with more experts, each one of those that it had, which computes what it computed.

Expert upcycling (https://arxiv.org/abs/2604.19835) duplicates experts and rows of the router. There the larger model
begins near the smaller one, as copies take each other's places among the K best. Here it begins where that was: a
token gets all copies of its experts (K grows with E), or the copies stand in groups of which a token takes one (K
stays). Of a token's only expert, whose weight no other moves, it takes one copy without groups, and there the busiest
experts can have the most copies.

Elsewhere all have as many. Copies have one score at first, so that those of a token's best experts fill its K' places
one expert after another, and all but the last that comes in fill as many as they have copies. The weights keep their
proportions where each of its K experts fills as many places. So all that are ever before another one for some token
have K' / K copies each; and of K = 1 a softmax over all experts stays in proportion only where all have as many.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...model.configuration_hf_moe import HfMoeConfig
from ...staging import check_destination
from ..files.texts import MAX_TOKENS, name_of
from ..options import ConversionOptions, takes
from .model import Expert, Mixture, changed, open_mixture, with_experts, write
from .scores import loads, memory, of_all_layers, windows_of

NORMED = ("topk_softmax",)  # routers whose weights sum to 1 as they are
GROWN = ("softmax_topk", "sigmoid_topk", "reinforce", *NORMED)
NOISE = {torch.float32: 3e-7}  # of a router in this type, unless it is said
ROUNDED = 1e-2  # in others, whose rounding would swallow less
EXACT = 1e-6  # the noise up to which nothing is seen of it


@dataclass(frozen=True, kw_only=True)
class GrowOptions(ConversionOptions):
    """ConversionOptions, and how large.

    experts: of each layer, a multiple of what there are, or any larger number where `apart` lets the numbers of copies
    differ. top_k: experts of a token, as many as now, or as many times more as there are experts; None: as many as
    now. noise: root mean square of what is added to the router's rows, beside that of the rows, so that copies come to
    differ; None: 3e-7 in float32, in others 1e-2, which their rounding does not swallow, and shows. calibration: a
    text as `prune` reads it, of it calibration_tokens tokens, by which the busiest experts get the most copies. seed:
    of the noise.
    """

    experts: int
    top_k: int | None = None
    noise: float | None = None
    calibration: str | Path | None = None
    calibration_tokens: int = MAX_TOKENS
    seed: int = 0


@takes(GrowOptions)
def grow(src: str | Path, dst: str | Path, options: GrowOptions) -> dict[str, Any]:
    """Give each layer copies of its experts, so that the model computes what it computed.

    src: a mixture of experts of any family that hf_moe reads, a folder or a Hub id; the result is of that family.
    dst: a folder that does not exist or is empty. Keywords: the fields of GrowOptions. With m times as many experts a
    token, a token is sent to all m copies of its experts, which share the weight. With as many experts a token, copies
    stand in m groups with one direction of the noise each: a token takes the group whose direction is nearest, and in
    it the experts that it had; experts that stand in groups already cannot. A token's only expert needs no group: the
    noise says which copy it is, and by a calibration text the busiest have more copies than others.

    Returns `convert`'s report, with `copies`, the numbers of the experts that each layer's are copies of, where a text
    decided. Raises a ValueError or OSError of one line; then there is no output.
    """
    check_destination(Path(dst), options.resume)
    mixture = open_mixture(src)
    check_grown(mixture.config, options)
    old = mixture.config
    top_k = old.num_experts_per_tok if options.top_k is None else options.top_k
    times = options.experts // old.num_experts
    alike = top_k == old.num_experts_per_tok
    alone = alike and apart(old)
    grouped = alike and not alone
    fields: dict[str, Any] = {"num_experts": options.experts, "num_experts_per_tok": top_k}
    if grouped:
        fields |= {"n_group": times, "topk_group": 1}
    # Scores that sum to 1 are shared by all copies; sigmoids are each copy's own.
    sums_to_1 = old.router_type != "sigmoid_topk"
    if not alone and grouped == sums_to_1 and old.router_type not in NORMED and not old.norm_topk_prob:
        fields["routed_scaling_factor"] = old.routed_scaling_factor * (times if grouped else 1 / times)
    config = changed(old, f"{options.experts} experts", **fields)
    windows = []
    if options.calibration is not None:
        windows = windows_of(mixture, options.calibration, options.calibration_tokens)
    numbers = list(range(old.num_experts))
    even = numbers * times if grouped else [number for number in numbers for _ in range(times)]
    copies = dict.fromkeys(mixture.layers, even)
    rows = Rows(mixture, grouped, times if sums_to_1 and not alone else 1, options)
    arguments = {"experts": options.experts, "top_k": top_k, "noise": rows.largest_noise, "seed": options.seed}
    provenance, told = {"method": "grow", "arguments": arguments}, {}
    if windows:
        found = {} if options.dry_run else loads(mixture, windows, options.progress)
        tokens = of_all_layers(mixture, found, [0] * old.num_experts)
        copies = {layer: by_load(tokens_E, options.experts) for layer, tokens_E in tokens.items()}
        arguments |= {"calibration": name_of(options.calibration), "tokens": sum(map(len, windows))}
        if not options.dry_run:
            told["copies"] = provenance["copies"] = copies
    experts = {layer: [Expert(mixture, number) for number in copied] for layer, copied in copies.items()}
    outputs = with_experts(mixture, experts, rows.of_copy)
    report = write(mixture, config, outputs, dst, options, provenance, memory=memory(mixture, windows))
    exact = rows.largest_noise <= EXACT
    return report | {"experts": options.experts, "top_k": top_k} | told | {"equal_at_step_0": exact}


def apart(config: HfMoeConfig) -> bool:
    """Whether a token has one expert, whose choice and weight are the same whatever copies of others there are."""
    sigmoid = config.router_type == "sigmoid_topk"
    return (
        config.num_experts_per_tok == 1
        and config.router_type != "reinforce"  # which draws among copies
        and (sigmoid or config.norm_topk_prob or config.router_type in NORMED)
        and (sigmoid or not config.router_args.get("selection_bias"))  # is added to shares of 1
        and config.n_group == 1
        and not config.limits_experts
    )


def by_load(tokens_E: list[int], experts: int) -> list[int]:
    """Which expert each of so many is a copy of: one after the other goes to the expert whose copies have the most
    tokens each, which leaves the busiest copy with as few as can be."""
    copies = [1] * len(tokens_E)
    while sum(copies) < experts:
        busiest = max(range(len(copies)), key=lambda expert: tokens_E[expert] / copies[expert])
        copies[busiest] += 1
    return [expert for expert, count in enumerate(copies) for _ in range(count)]


def check_grown(config: HfMoeConfig, options: GrowOptions) -> None:
    """Raises ValueError where the model would not compute what it did."""
    experts, top_k = config.num_experts, config.num_experts_per_tok
    times, left = divmod(options.experts, experts)
    if options.experts <= experts:
        raise ValueError(f"experts is {options.experts}; it must be more than {experts}, as many as there are.")
    if config.router_type not in GROWN:
        raise ValueError(f"router_type {config.router_type!r} cannot be grown; {', '.join(GROWN)} can.")
    if config.num_hash_layers:
        raise ValueError(
            f"num_hash_layers is {config.num_hash_layers}: a token's id chooses there, and would never choose a copy."
        )
    alone = apart(config) and options.top_k in (None, top_k)
    why = "with more copies of some, a token's best would be other experts, or have other weights."
    if not alone and left:
        raise ValueError(
            f"experts is {options.experts}; it must be a multiple of {experts}, as many as there are: {why}"
        )
    if not alone and options.calibration is not None:
        raise ValueError(f"calibration is given, but here all experts get as many copies: {why}")
    if left and options.calibration is None:
        raise ValueError(
            f"experts is {options.experts}, no multiple of {experts}: give a text that says which are the busiest "
            "(--calibration)."
        )
    if options.top_k not in (None, top_k, top_k * times):
        raise ValueError(
            f"top_k is {options.top_k}; it can be {top_k}, as now, or {top_k * times}, as many times more."
        )
    if options.noise is not None and not 0 <= options.noise < 1:
        raise ValueError(f"noise is {options.noise}; it must be at least 0 and below 1.")
    by_two = config.router_args.get("group_score", "two_best") == "two_best"
    if options.top_k == top_k * times:
        if config.topk_group < config.n_group and by_two:
            raise ValueError(
                f"A token takes {config.topk_group} of {config.n_group} groups by their two best experts, which would "
                "be copies of one: the model would not compute what it does."
            )
        return
    way_out = f"give top_k {top_k * times} (--top-k), so that a token is sent to all copies of its experts."
    if config.n_group > 1:
        raise ValueError(f"The experts stand in {config.n_group} groups already: {way_out}")
    if not alone and (config.router_type == "reinforce" or config.limits_experts):
        raise ValueError(f"Copies cannot stand in groups with this router: {way_out}")


class Rows:
    """What becomes of an expert's rows in a router: noise is added to its weights, one direction for all experts of a
    group, else one for each copy. Of scores that `shared` copies divide among them the selection bias is divided."""

    def __init__(self, mixture: Mixture, grouped: bool, shared: int, options: GrowOptions):
        self.mixture, self.grouped, self.shared, self.options = mixture, grouped, shared, options

    def noise(self, dtype: torch.dtype) -> float:
        return NOISE.get(dtype, ROUNDED) if self.options.noise is None else self.options.noise

    @property
    def largest_noise(self) -> float:
        return max(self.noise(x.dtype) for name, x in self.mixture.outputs.items() if name.endswith(".gate.weight"))

    def of_copy(self, name: str, number: int, row: torch.Tensor) -> torch.Tensor:
        if name.endswith(".e_score_correction_bias"):
            return row / self.shared
        noise = self.noise(row.dtype)
        if not name.endswith(".gate.weight") or noise == 0:
            return row
        copy = number // self.mixture.config.num_experts if self.grouped else number
        seed = hashlib.sha256(f"{self.options.seed} {name} {copy}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:6], "little"))
        direction = torch.randn(row.shape, generator=generator, dtype=torch.float32)
        return (row.float() + noise * self.size(name) * direction).to(row.dtype)

    @cache  # noqa: B019  (as long as the conversion)
    def size(self, name: str) -> float:
        """Root mean square of a router's weights."""
        rows = torch.cat([piece.reshape(-1).float() for piece in self.mixture.outputs[name].pieces()])
        return rows.square().mean().sqrt().item()
