"""`prune`: a mixture with the experts that are worth most by a calibration text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...staging import check_destination
from ..files.texts import MAX_TOKENS, name_of
from ..options import ConversionOptions, takes
from ..verify import token_ids
from .merge import merged
from .model import Expert, Mixture, changed, open_mixture, with_experts, write
from .scores import SCORES, Seen, memory, of_all_layers, watch, windows_of


@dataclass(frozen=True, kw_only=True)
class PruneOptions(ConversionOptions):
    """ConversionOptions, and what is kept.

    experts: how many of each layer; or ratio: what share of them is dropped. Either is one for all layers: no family's
    config, nor hf_moe's, holds a number of experts for each. by: a key of `SCORES`, whose functions
    say what each measures. merge: experts are not dropped, but made one with the nearest that stays. calibration: a
    file or a folder of text or rows (texts, conversations, or prompts with completions), or a data set's name on the
    Hub, which the model reads; of it calibration_tokens tokens. data: such texts that it is compared on with the
    source, each by itself. seed: of what is drawn (by "random").
    """

    experts: int | None = None
    ratio: float | None = None
    by: str = "reap"
    merge: bool = False
    calibration: str | Path | None = None
    calibration_tokens: int = MAX_TOKENS
    data: Sequence[str | Path] = ()
    seed: int = 0


@takes(PruneOptions)
def prune(src: str | Path, dst: str | Path, options: PruneOptions) -> dict[str, Any]:
    """Drop the experts of each layer that are worth least, and their rows of the router; all else stays as it is.

    src: a mixture of experts of any family that hf_moe reads, a folder or a Hub id; the result is of that family.
    dst: a folder that does not exist or is empty. Keywords: the fields of PruneOptions. Where experts stand in groups,
    each group keeps as many.

    Returns `convert`'s report with `kept`, for each layer the numbers of the experts that each of its new ones is made
    of, `scores`, and, of a model that is compared, `load`: how many tokens of the calibration text went to each expert
    of a layer before and after. Raises a ValueError, an OSError or, without SciPy where experts are merged, an
    ImportError of one line; then there is no output.
    """
    check_destination(Path(dst), options.resume)
    mixture = open_mixture(src)
    keep = how_many(mixture, options)
    config = changed(mixture.config, f"{keep} experts", num_experts=keep)
    if options.by not in SCORES:
        raise ValueError(f"by is {options.by!r}; it can be {', '.join(SCORES)}.")
    windows = read(mixture, options)
    for text in options.data:  # not after all of that was read
        token_ids(mixture.source.checkpoint.folder, text, config.vocab_size)
    seen = {} if options.dry_run else watch(mixture, windows, options.progress)
    before = tokens_of(seen)
    seen = of_all_layers(mixture, seen, Seen.nothing(mixture.config.num_experts))
    generator = torch.Generator().manual_seed(options.seed)
    scores = {layer: SCORES[options.by](x, generator) for layer, x in seen.items()}
    kept = {layer: best(score, keep, config.n_group) for layer, score in scores.items()}
    if options.dry_run:
        kept = {layer: list(range(keep)) for layer in mixture.layers}
    experts = {layer: [Expert(mixture, i) for i in numbers] for layer, numbers in kept.items()}
    if options.merge and not options.dry_run:
        experts = {layer: merged(mixture, layer, seen[layer], scores[layer], leads) for layer, leads in kept.items()}
    tokens = sum(map(len, windows))
    arguments = {"experts": keep, "by": options.by, "merge": options.merge, "seed": options.seed, "tokens": tokens}
    if windows:
        arguments["calibration"] = name_of(options.calibration)
    provenance, told = {"method": "prune", "arguments": arguments}, {}
    if not options.dry_run:
        told["kept"] = provenance["kept"] = {name: [list(x.experts) for x in found] for name, found in experts.items()}
        told["scores"] = {layer: x.tolist() for layer, x in scores.items()}
        provenance["scores"] = {layer: [float(f"{x:.4g}") for x in each] for layer, each in told["scores"].items()}
    domains = [(mixture.source, text) for text in options.data]

    def measure(folder: Path) -> dict[str, Any]:
        after = watch(open_mixture(folder), windows, options.progress)
        return {"load": {"before": before, "after": tokens_of(after)}}

    outputs = with_experts(mixture, experts)
    needed = memory(mixture, windows)
    measured = measure if windows else None
    report = write(mixture, config, outputs, dst, options, provenance, domains, measured, needed)
    return report | {"experts": keep, "by": options.by} | told | {"equal_at_step_0": False}


def how_many(mixture: Mixture, options: PruneOptions) -> int:
    """Raises ValueError for a number that there are not, or that is said twice or not at all."""
    experts = mixture.config.num_experts
    if (options.experts is None) == (options.ratio is None):
        raise ValueError("Say how many experts are kept (experts), or what share of them is dropped (ratio).")
    if options.ratio is not None and not 0 < options.ratio < 1:
        raise ValueError(f"ratio is {options.ratio}; it must be above 0 and below 1.")
    keep = options.experts if options.ratio is None else round(experts * (1 - options.ratio))
    if not 0 < keep < experts:
        raise ValueError(f"{keep} experts are to be kept of {experts}: it can be 1 to {experts - 1}.")
    top_k = mixture.config.num_experts_per_tok
    if keep < top_k:
        raise ValueError(f"{keep} experts are fewer than the {top_k} that a token is sent to: keep at least {top_k}.")
    if keep % mixture.config.n_group:
        raise ValueError(
            f"{keep} experts cannot be kept alike in {mixture.config.n_group} groups: it must be a multiple of that."
        )
    return keep


def read(mixture: Mixture, options: PruneOptions) -> list[torch.Tensor]:
    """The calibration text in windows of token ids; none where it is not read."""
    if options.by == "random" and not options.merge:
        return []
    if options.calibration is None:
        what = "merge" if options.merge else f"by {options.by}"
        raise ValueError(f"{what} needs a text that the model reads: give calibration (--calibration).")
    return windows_of(mixture, options.calibration, options.calibration_tokens)


def tokens_of(seen: dict[str, Seen]) -> dict[str, list[int]]:
    """How many tokens went to each expert of a layer."""
    return {layer: x.tokens.long().tolist() for layer, x in seen.items()}


def best(score_E: torch.Tensor, keep: int, groups: int) -> list[int]:
    """The numbers of the `keep` experts of the largest scores, as many of each group; of equals the first."""
    kept = []
    for group, scores in enumerate(score_E.view(groups, -1)):
        chosen = scores.argsort(descending=True, stable=True)[: keep // groups]
        kept += (chosen + group * len(scores)).tolist()
    return sorted(kept)
