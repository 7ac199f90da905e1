"""What the report says beside each figure: a title, how to read it, where it comes from, and the numbers as tables."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from .findings import cited, percent

MIXTRAL, OLMOE = "Mixtral, arXiv 2401.04088", "OLMoE, arXiv 2409.02060"


LINE_END = "⏎"


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]


class Section(NamedTuple):
    title: str
    read: str  # how to read the figure, one or two sentences
    source: str
    tables: Callable[[dict], Iterator[Table]]


def chosen_layers(numbers: dict, section: str) -> list[int]:
    """Places of the first, the middle and the last layer, and of those that the section's findings are about."""
    last = len(numbers["layers"]) - 1
    return sorted({0, (last + 1) // 2, last} | cited(section, numbers))


def off_diagonal(matrix: list[list[float]]) -> list[float]:
    return [value for i, row in enumerate(matrix) for value in row[:i]]


def per_expert(numbers: dict, title: str, value: Callable[[dict, int], str]) -> Table:
    experts = max(layer["experts"] for layer in numbers["layers"])
    rows = [
        [layer["label"], *(value(layer, i) if i < layer["experts"] else "" for i in range(experts))]
        for layer in numbers["layers"]
    ]
    return Table(title, ["layer", *map(str, range(experts))], rows)


def load(numbers: dict) -> Iterator[Table]:
    yield per_expert(numbers, "Load by layer and expert", lambda layer, i: f"{layer['load'][i]:.2f}")


def entropy(numbers: dict) -> Iterator[Table]:
    rows = [
        [x["label"], f"{x['routing_entropy']:.3f}", f"{x['load_entropy']:.3f}", f"{max(x['load']):.2f}", few_dead(x)]
        for x in numbers["layers"]
    ]
    header = ["layer", "entropy of a token's probabilities", "entropy of the load", "busiest expert", "dead experts"]
    yield Table("Entropy, divided by the largest possible, and load", header, rows)


def few_dead(layer: dict) -> str:
    return ", ".join(map(str, layer["dead"])) or "none"


def similarity(numbers: dict) -> Iterator[Table]:
    def extremes(matrix: list[list[float]] | None) -> list[str]:
        pairs = off_diagonal(matrix) if matrix else []
        return [f"{max(pairs):.3f}", f"{sum(pairs) / len(pairs):.3f}"] if pairs else ["not known", "not known"]

    rows = [
        [
            layer["label"],
            *extremes(layer["weight_similarity"]),
            *extremes(layer["output_similarity"]),
            "; ".join(", ".join(map(str, group)) for group in layer["duplicates"]) or "none",
        ]
        for layer in numbers["layers"]
    ]
    header = ["layer", "weights, most alike", "weights, mean", "outputs, most alike", "outputs, mean", "near copies"]
    yield Table("Cosine similarity of the experts of a layer", header, rows)


def domains(numbers: dict) -> Iterator[Table]:
    for place in chosen_layers(numbers, "domains"):
        layer = numbers["layers"][place]
        header = ["domain", *map(str, range(layer["experts"]))]
        rows = [
            [domain["name"], *map(percent, shares)]
            for domain, shares in zip(numbers["domains"], layer["domain_specialization"], strict=True)
        ]
        yield Table(f"Layer {layer['label']}: share of each domain's tokens by expert", header, rows)


def vocabulary(numbers: dict) -> Iterator[Table]:
    known = [layer for layer in numbers["layers"] if layer["vocabulary_specialization"]["read"]]
    if known:
        layer = max(known, key=lambda x: x["vocabulary_specialization"]["read"])
        rows = [
            [str(expert), ", ".join(f"{visible(text)} {percent(share)}" for text, share, _ in favourites) or "none"]
            for expert, favourites in enumerate(layer["favourite_tokens"])
        ]
        title = f"Layer {layer['label']}: tokens that go to an expert before all others, and how often they do"
        yield Table(title, ["expert", "tokens"], rows)
    found = [(layer["label"], layer["vocabulary_specialization"]) for layer in numbers["layers"]]
    rows = [[label, *(show(entry[key]) for key in ("read", "predicted", "chance"))] for label, entry in found]
    yield Table("Mean over token ids", ["layer", "token read", "token predicted", "chance"], rows)


def show(share: float | None) -> str:
    return "not known" if share is None else percent(share)


def visible(text: str) -> str:
    """A token's text with its blanks to be seen."""
    return text.replace(" ", "␣").replace("\n", LINE_END).replace("\t", "⇥") or "∅"


def coactivation(numbers: dict) -> Iterator[Table]:
    rows = []
    for layer in numbers["layers"]:
        cells = [(value, i, j) for i, row in enumerate(layer["coactivation"]) for j, value in enumerate(row)]
        best = sorted(cells, reverse=True)[:3]
        chance = max(layer["experts_per_token"]["mean"] - 1, 0) / max(layer["experts"] - 1, 1)
        pairs = ", ".join(f"{i} with {j}: {percent(value)}" for value, i, j in best if value) or "none"
        rows.append([layer["label"], percent(chance), pairs])
    yield Table(
        "The three strongest pairs of each layer", ["layer", "chance", "share of the first one's tokens"], rows
    )


def saturation(numbers: dict) -> Iterator[Table]:
    header = ["layer", *(entry["checkpoint"] for entry in numbers["saturation"]), "chance"]
    rows = [
        [
            layer["label"],
            *(percent(entry["layers"][place]) for entry in numbers["saturation"]),
            percent(layer["experts_per_token"]["mean"] / layer["experts"]),
        ]
        for place, layer in enumerate(numbers["layers"])
    ]
    yield Table("Experts in common with each checkpoint", header, rows)


def pruning(numbers: dict) -> Iterator[Table]:
    costs = sorted(
        (cost["loss_change"], cost["standard_error"], layer["label"], cost["expert"])
        for layer in numbers["layers"]
        for cost in layer["pruning"]
    )
    rows = [[label, str(expert), f"{change:+.4f}", f"{error:.4f}"] for change, error, label, expert in costs]
    yield Table(
        "Every expert tried, the cheapest first", ["layer", "expert", "change of loss", "standard error"], rows
    )


# Name, as in figures.FIGURES, in the order of the report.
SECTIONS = {
    "load": Section(
        "Load",
        "Each cell is an expert: 1 is its fair share of the layer's choices, blue is less, orange more. An even "
        "picture means that all experts are used; a dead one has 0.",
        "DeepSeekMoE, arXiv 2401.06066",
        load,
    ),
    "entropy": Section(
        "Certainty of the routers",
        "Low entropy of a token's probabilities: the router is sure of its choice. High entropy of the load: over "
        "all tokens the experts are used alike. A trained router is low in the first and high in the second.",
        "ST-MoE, arXiv 2202.08906",
        entropy,
    ),
    "domains": Section(
        "Domains",
        "The share of a domain's tokens for which an expert is chosen. Grey is chance; orange in one row alone is an "
        "expert of that domain.",
        f"{OLMOE}, section 5; {MIXTRAL}, figure 7",
        domains,
    ),
    "vocabulary": Section(
        "Words",
        "How often a token id goes first to its favourite expert, averaged over the frequent ids: near the dashed "
        "line the layer does not look at the word, near 100% it looks at nothing else.",
        f"{OLMOE}, section 5",
        vocabulary,
    ),
    "coactivation": Section(
        "Experts that work together",
        "Of the tokens of the row's expert, the share that the column's expert gets, too. A bright cell is a pair "
        "that could as well be one expert; at most the 16 experts with the strongest pairs are shown.",
        f"{OLMOE}, section 5",
        coactivation,
    ),
    "similarity": Section(
        "Copies",
        "Cosine of all weights of two experts, and of their answers to the same tokens: 1 is a copy. Weights are "
        "compared neuron by neuron, so experts that were never one are near 0 whatever they compute.",
        "Sparse Upcycling, arXiv 2212.05055; Drop-Upcycling, arXiv 2502.19261",
        similarity,
    ),
    "saturation": Section(
        "Router saturation",
        "The share of a token's experts that a checkpoint chooses, too, by layer. Near 100%: the routing was settled "
        "by then; the dashed line is what two strangers would have in common.",
        f"{OLMOE}, section 5",
        saturation,
    ),
    "pruning": Section(
        "What losing an expert costs",
        "The change of the loss of the next token when the router cannot choose that expert and takes the next best. "
        "Grey can go at no cost, orange is needed; empty cells were not tried.",
        "Not All Experts are Equal, arXiv 2402.14800",
        pruning,
    ),
}
