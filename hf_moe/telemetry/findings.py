"""The numbers in words, what matters first."""

from collections.abc import Callable
from typing import NamedTuple

ATTENTION, PLAIN, GOOD = "attention", "plain", "good"
UNEVEN = 1.5  # times the fair load, from which on a layer counts as uneven
NEARLY_DEAD = 0.1  # of the fair load
RANDOM = 0.95  # relative routing entropy from which on a router hardly prefers any expert
TOGETHER = 2.0  # times chance, from which on two experts count as a pair
SPECIAL = 0.1  # share of a domain's tokens beyond that of the others


BY_LAYER = ("domains", "coactivation")  # sections that have a figure for each layer that they show


class Finding(NamedTuple):
    """`section` of the report has the numbers, of `layer`, by its label, where the text is about one."""

    tone: str
    text: str
    section: str
    layer: str | None = None
    sample: str = ""  # what was looked at

    @property
    def figure(self) -> str:
        """The name of the figure that shows it."""
        return f"{self.section}-layer-{self.layer}".replace(" ", "-") if self.section in BY_LAYER else self.section

    def __str__(self) -> str:
        return f"{self.text} ({self.sample}; figures/{self.figure}.png)"


def percent(share: float) -> str:
    """Never 100% of what is less, nor 0% of what is more."""
    if 0.99 <= share < 1:
        return f"{share:.2%}" if share < 0.9999 else "over 99.99%"
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share:.1%}" if share >= 5e-4 else "under 0.1%"


def few(items: list[str], most: int = 4) -> str:
    """ "a, b and 3 more"."""
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"


def concentration(numbers: dict) -> list[Finding]:
    """The layer whose load is most uneven: how few experts do most of the work."""
    layer = max(numbers["layers"], key=lambda x: max(x["load"]))
    experts, largest = layer["experts"], max(layer["load"])
    if largest < UNEVEN:
        text = (
            f"The load is even: the busiest expert of any layer, expert {layer['load'].index(largest)} of layer "
            f"{layer['label']}, gets {largest:.2f} times its fair share."
        )
        return [Finding(GOOD, text, "load", layer["label"])]
    # The fewest experts that take more than half of the choices, or of the tokens where few are chosen.
    order = sorted(layer["load"], reverse=True)
    count = next(n for n in range(1, experts + 1) if sum(order[:n]) / experts >= 0.5)
    text = (
        f"Layer {layer['label']} sends {percent(sum(order[:count]) / experts)} of its choices to {count} of {experts} "
        f"experts; with an even load they would get {percent(count / experts)}. The busiest, expert "
        f"{layer['load'].index(largest)}, gets {largest:.1f} times its fair share, the most of any layer."
    )
    return [Finding(ATTENTION, text, "load", layer["label"])]


def dead(numbers: dict) -> list[Finding]:
    total = sum(layer["experts"] for layer in numbers["layers"])
    found = [(layer["label"], expert) for layer in numbers["layers"] for expert in layer["dead"]]
    rest = [
        (layer["label"], expert)
        for layer in numbers["layers"]
        for expert, load in enumerate(layer["load"])
        if 0 < load < NEARLY_DEAD
    ]
    more = f"{len(rest)} more" if found else f"But {len(rest)}"
    gets = "gets" if len(rest) == 1 else "get"
    idle = f" {more} {gets} less than a tenth of the fair load: {few(places(rest))}." if rest else ""
    if found:
        text = f"{len(found)} of {total} experts got not one token: {few(places(found))}.{idle}"
        return [Finding(ATTENTION, text, "load")]
    text = f"No expert is dead: each of the {total} got some of the tokens.{idle}"
    return [Finding(ATTENTION if rest else GOOD, text, "load")]


def places(found: list[tuple[str, int]]) -> list[str]:
    return [f"expert {expert} of layer {label}" for label, expert in found]


def duplicate(numbers: dict) -> list[Finding]:
    groups = [(layer, group) for layer in numbers["layers"] for group in layer["duplicates"]]
    if not groups:
        known = [x for x in numbers["layers"] if x["weight_similarity"] or x["output_similarity"]]
        return [Finding(GOOD, "No two experts of a layer are copies of each other.", "similarity")] if known else []
    whole = sum(len(group) == layer["experts"] for layer, group in groups)
    if whole == len(numbers["layers"]):
        text = "In every layer all experts are copies of one another: the model has not learned to use them yet."
    else:
        where = few([f"{', '.join(map(str, group))} of layer {layer['label']}" for layer, group in groups], 3)
        text = f"{sum(len(group) for _, group in groups)} experts have a near copy in their layer: {where}."
    return [Finding(ATTENTION, text, "similarity")]


def certainty(numbers: dict) -> list[Finding]:
    layers = [layer for layer in numbers["layers"] if layer["experts"] > 1]  # one expert alone leaves no choice
    if not layers:
        return []
    mean = sum(x["routing_entropy"] for x in layers) / len(layers)
    low, high = (choose(layers, key=lambda x: x["routing_entropy"]) for choose in (min, max))
    if mean >= RANDOM:
        text = (
            f"The routers hardly prefer any expert: their probabilities have {percent(mean)} of the entropy of equal "
            f"ones, in the surest layer, {low['label']}, {percent(low['routing_entropy'])}. The choice is close to a "
            "toss."
        )
        return [Finding(ATTENTION, text, "entropy")]
    text = f"The routers' probabilities have {percent(mean)} of the entropy of equal ones"
    text += (
        f"; the surest is layer {low['label']} ({percent(low['routing_entropy'])}), the least sure layer "
        f"{high['label']} ({percent(high['routing_entropy'])})."
        if percent(low["routing_entropy"]) != percent(high["routing_entropy"])
        else "."
    )
    return [Finding(PLAIN, text, "entropy")]


def domains(numbers: dict) -> list[Finding]:
    names = [domain["name"] for domain in numbers["domains"]]
    if len(names) < 2:
        return []
    gaps = [
        (column[best] - other, best, expert, layer, column[best], other)
        for layer in numbers["layers"]
        for expert, column in enumerate(zip(*layer["domain_specialization"], strict=True))
        for best in [column.index(max(column))]
        for other in [(sum(column) - column[best]) / (len(column) - 1)]
    ]
    gap, best, expert, layer, own, other = max(gaps, key=lambda x: x[0])
    if gap < SPECIAL:
        text = (
            f"No expert belongs to a domain: the largest difference between domains is {percent(gap)} of the tokens, "
            f"of expert {expert} of layer {layer['label']}."
        )
        return [Finding(PLAIN, text, "domains", layer["label"])]
    text = (
        f"Expert {expert} of layer {layer['label']} gets {percent(own)} of the tokens of {names[best]}, "
        f"{percent(other)} of the others'; chance is {percent(layer['experts_per_token']['mean'] / layer['experts'])}."
    )
    return [Finding(PLAIN, text, "domains", layer["label"])]


def vocabulary(numbers: dict) -> list[Finding]:
    layers = [x for x in numbers["layers"] if x["vocabulary_specialization"]["read"] is not None]
    if not layers:
        return []
    layer = max(layers, key=lambda x: x["vocabulary_specialization"]["read"])
    shares = layer["vocabulary_specialization"]
    text = (
        f"Layer {layer['label']} looks most at the word itself: a token id goes to its favourite expert "
        f"{percent(shares['read'])} of the time, against {percent(shares['chance'])} if ids did not matter."
    )
    return [Finding(PLAIN, text, "vocabulary", layer["label"])]


def pairs(numbers: dict) -> list[Finding]:
    """The two experts that travel together most, beyond what their loads alone make likely."""
    best = (0.0, 0.0, None)
    for layer in numbers["layers"]:
        mean = layer["experts_per_token"]["mean"]
        idle = NEARLY_DEAD * mean / layer["experts"]  # chance alone makes pairs of those
        share = [count / max(sum(layer["tokens"]) / (mean or 1), 1) for count in layer["tokens"]]
        for i, row in enumerate(layer["coactivation"]):
            for j, value in enumerate(row):
                # of the tokens of the busier one, so that a pair needs both
                both = min(value, layer["coactivation"][j][i])
                if share[j] > idle and both / share[j] > best[0]:
                    best = (both / share[j], both, (i, j, layer["label"], share[j]))
    ratio, both, pair = best
    if pair is None or ratio < TOGETHER:
        return []
    i, j, label, alone = pair
    text = (
        f"Experts {i} and {j} of layer {label} travel together: at least {percent(both)} of the tokens of each go to "
        f"the other, too; by its load alone expert {j} would get {percent(alone)}."
    )
    return [Finding(PLAIN, text, "coactivation", label)]


def pruned(numbers: dict) -> list[Finding]:
    costs = [
        (cost["loss_change"], cost["standard_error"], cost["expert"], layer["label"])
        for layer in numbers["layers"]
        for cost in layer["pruning"]
    ]
    if not costs:
        return []
    low, high = min(costs), max(costs)
    free = sum(change < 2 * error + 1e-4 for change, error, *_ in costs)
    total = sum(layer["experts"] for layer in numbers["layers"])
    tried = f"all {total} experts" if len(costs) == total else f"the {len(costs)} of {total} experts that were tried"
    if len(costs) < total:
        tried += ", those with the least load of each layer" if len(costs) > 1 else ", of those with the least load"
    if free == len(costs):
        text = f"Nothing was lost without any one of {tried}."
        return [Finding(PLAIN, text, "pruning")]
    text = (
        f"Of {tried}, {free} can each go without a loss that these tokens would show. Losing expert {high[2]} of "
        f"layer {high[3]} costs most: {high[0]:+.3f} nats of loss; the cheapest is expert {low[2]} of layer {low[3]} "
        f"({low[0]:+.3f})."
    )
    return [Finding(PLAIN, text, "pruning", high[3])]


def saturated(numbers: dict) -> list[Finding]:
    return [
        Finding(PLAIN, _saturated(entry, [layer["label"] for layer in numbers["layers"]]), "saturation")
        for entry in numbers["saturation"]
    ]


def _saturated(entry: dict, labels: list[str]) -> str:
    shares = entry["layers"]
    low = shares.index(min(shares))
    name = entry["checkpoint"].rstrip("/").split("/")[-1]
    return (
        f"{percent(sum(shares) / len(shares))} of the routing is that of {name}; layer {labels[low]} "
        f"differs most ({percent(shares[low])} the same)."
    )


FINDINGS: dict[str, Callable[[dict], list[Finding]]] = {
    "load": concentration,
    "dead": dead,
    "similarity": duplicate,
    "entropy": certainty,
    "saturation": saturated,
    "domains": domains,
    "vocabulary": vocabulary,
    "coactivation": pairs,
    "pruning": pruned,
}
TONES = (ATTENTION, PLAIN, GOOD)


# What a finding rests on, where it is not all tokens that were read.
SAMPLES = {
    "similarity": "all weights, and answers to some of the {tokens:,} tokens",
    "pruning": "{pruning_tokens:,} tokens",
}


def cited(section: str, numbers: dict) -> set[int]:
    """Places of the layers that the findings of a section are about, which its figures have to show."""
    labels = [layer["label"] for layer in numbers["layers"]]
    return {labels.index(finding.layer) for finding in FINDINGS[section](numbers) if finding.layer is not None}


def findings(numbers: dict) -> list[Finding]:
    """All that there is to say; what needs attention first, otherwise in the order above."""
    found = [finding for find in FINDINGS.values() for finding in find(numbers)]
    found = [
        finding._replace(sample=SAMPLES.get(finding.section, "{tokens:,} tokens").format_map(numbers))
        for finding in found
    ]
    return sorted(found, key=lambda finding: TONES.index(finding.tone))
