"""`experts`: one expert of each layer joins a mixture, leaves it, or takes another's place."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...same_tokens import check_same_tokens
from ...staging import check_destination
from ..computation import computation
from ..files.tokenizer import load_tokenizer
from ..options import ConversionOptions, takes
from .model import Expert, Mixture, changed, open_mixture, with_experts, write

OWN = {"num_experts", "num_experts_per_tok"}  # in what siblings may differ


@dataclass(frozen=True, kw_only=True)
class ExchangeOptions(ConversionOptions):
    """ConversionOptions, and what happens, in this order.

    swap: (number, sibling) pairs: the expert of that number is the sibling's from then on. remove: numbers of experts
    that leave. add: siblings whose expert joins, behind the others. A sibling is a folder or a Hub id; of one to be
    added the last expert is taken, of one to be swapped in that of the same number; FOLDER:3 names another.
    """

    swap: Sequence[tuple[int, str | Path]] = ()
    remove: Sequence[int] = ()
    add: Sequence[str | Path] = ()


@takes(ExchangeOptions)
def exchange_experts(src: str | Path, dst: str | Path, options: ExchangeOptions) -> dict[str, Any]:
    """Give a mixture experts of its siblings, or take some away; every other tensor stays as it is, bit for bit.

    FlexOlmo (https://arxiv.org/abs/2507.07024): experts trained apart, each with its row of the router, stand in one
    model. src: a mixture of experts of any family that hf_moe reads, a folder or a Hub id; the result is of that
    family. dst: a folder that does not exist or is empty. Keywords: the fields of ExchangeOptions.

    Returns `convert`'s report. Raises a ValueError or OSError of one line; then there is no output.
    """
    check_destination(Path(dst), options.resume)
    mixture = open_mixture(src)
    count = mixture.config.num_experts
    if not (options.swap or options.remove or options.add):
        raise ValueError("Say what happens: an expert to add, to remove or to swap.")
    for number in (*options.remove, *(number for number, _ in options.swap)):
        if not 0 <= number < count:
            raise ValueError(f"There is no expert {number}: they have the numbers 0 to {count - 1}.")
    swapped = {number: chosen(sibling, mixture, number) for number, sibling in options.swap}
    added = [chosen(sibling, mixture, None) for sibling in options.add]
    numbers = [number for number in range(count) if number not in options.remove]
    new = [*(swapped.get(number, Expert(mixture, number)) for number in numbers), *added]
    if len(new) < mixture.config.num_experts_per_tok:
        raise ValueError(
            f"{len(new)} experts are fewer than the {mixture.config.num_experts_per_tok} that a token is sent to."
        )
    config = changed(mixture.config, f"{len(new)} experts", num_experts=len(new))
    said = {
        "swap": [f"{number}={sibling}" for number, sibling in options.swap],
        "remove": list(options.remove),
        "add": [str(sibling) for sibling in options.add],
    }
    provenance = {"method": "experts", "arguments": {name: value for name, value in said.items() if value}}
    outputs = with_experts(mixture, dict.fromkeys(mixture.layers, new))
    report = write(mixture, config, outputs, dst, options, provenance)
    return report | {"experts": len(new), "equal_at_step_0": False}


def chosen(sibling: str | Path, mixture: Mixture, number: int | None) -> Expert:
    """The sibling's expert that is meant: the one it names, else of that number, else its last.

    Raises ValueError where the sibling is no sibling, or has no such expert.
    """
    place, colon, named = str(sibling).rpartition(":")
    if colon and named.isdigit():
        sibling, number = place, int(named)
    other = open_mixture(sibling)
    own, theirs = (
        {name: value for name, value in computation(x.config).items() if name not in OWN} for x in (mixture, other)
    )
    for name in own.keys() | theirs.keys():
        if own.get(name) != theirs.get(name):
            raise ValueError(
                f"{sibling} has {name}={theirs.get(name)!r}, but {mixture.source.name} has {own.get(name)!r}: they "
                "are no siblings, whose experts stand in one model."
            )
    tokenizers = [load_tokenizer(x.source.checkpoint.folder) for x in (mixture, other)]
    if None not in tokenizers:
        why = "a text is not the same to both, and an expert of one knows nothing of the other's."
        names = (mixture.source.name, other.source.name)
        check_same_tokens(*tokenizers, names, mixture.config.vocab_size, why, roles=False)
    count = other.config.num_experts
    number = count - 1 if number is None else number
    if not 0 <= number < count:
        raise ValueError(f"{sibling} has no expert {number}: they have the numbers 0 to {count - 1}.")
    return Expert(other, number)
