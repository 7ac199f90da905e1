"""The figures of the report, drawn by matplotlib from the numbers. Each is one panel, as wide as a telephone.

Colours are told apart with any colour vision; the SVG takes its ink from the page, so that it works on dark paper.
"""

import io
import re
from collections.abc import Iterator

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from .sections import chosen_layers, off_diagonal

INK, GRID, SOFT = "#1f2430", "#d3d7de", "#59627a"
# Okabe and Ito's, darkened where white paper needs it; the page has its own for dark paper.
SERIES = ("#0067a5", "#c4500b", "#00795a", "#a8417f", "#6b6b00", "#3f3f9f")
AROUND = LinearSegmentedColormap.from_list("around", ["#1b5fa8", "#b9bec8", "#c2570c"])  # below, at, above
UPWARD = "viridis"
MARKERS = "os^Dv*"
STYLE = {
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}
NARROW, WIDE, MOST_NARROW = 3.5, 8.0, 20  # inches; columns that fit the narrow one
VECTOR = 600  # cells up to which a map is drawn as shapes
CHANCE = "chance"


def heat_map(
    values: np.ndarray,
    x: list[str],
    y: list[str],
    x_label: str,
    y_label: str,
    bar: str,
    norm: Normalize,
    cmap=UPWARD,
    ticks: str = "{x:g}",
) -> Figure:
    """A cell for each value; what is NaN stays empty."""
    rows, columns = values.shape
    width = NARROW if columns <= MOST_NARROW else WIDE
    row = min((width - 1.2) / columns, max(4.2 / rows, 0.12))
    figure = Figure(figsize=(width, min(max(1.9, 1.1 + rows * row), 9)))
    axes = figure.add_subplot()
    raster = values.size > VECTOR
    image = axes.pcolormesh(
        np.ma.masked_invalid(values),
        cmap=cmap,
        norm=norm,
        rasterized=raster,
        linewidth=0 if raster else 0.4,
        edgecolors="face",
    )
    axes.invert_yaxis()
    for axis, labels, most in ((axes.xaxis, x, 12 if width == NARROW else 32), (axes.yaxis, y, 16)):
        step = -(-len(labels) // most)
        axis.set_ticks(np.arange(0, len(labels), step) + 0.5, labels[::step])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    scale = figure.colorbar(image, label=bar, format=ticks, fraction=0.06, pad=0.02, aspect=30)
    scale.outline.set_visible(False)
    return figure


def lines(x: list[str], series: dict[str, list[float]], y_label: str, percent: bool = True) -> Figure:
    figure = Figure(figsize=(NARROW, 2.7))
    axes = figure.add_subplot()
    for number, (name, values) in enumerate(series.items()):
        look = {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)], "markersize": 3.5}
        if name == CHANCE:
            look = {"color": SOFT, "linestyle": "--"}
        known = [np.nan if value is None else value for value in values]
        axes.plot(range(len(x)), known, label=name, linewidth=1.4, **look)
    step = -(-len(x) // 12)
    axes.set_xticks(range(0, len(x), step), x[::step])
    axes.set_xlabel("layer")
    axes.set_ylabel(y_label)
    axes.set_ylim(0, 1.04)
    if percent:
        axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(axis="y", linewidth=0.6)
    figure.legend(loc="outside upper left", ncols=2, fontsize=8.5, handlelength=1.5, columnspacing=1)
    return figure


def numbered(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def by_layer(numbers: dict, value) -> np.ndarray:
    """[layers, experts], NaN where a layer has fewer experts or no value."""
    experts = max(layer["experts"] for layer in numbers["layers"])
    rows = [
        [value(layer, i) if i < layer["experts"] else np.nan for i in range(experts)] for layer in numbers["layers"]
    ]
    return np.array(rows, dtype=float)


def labels(numbers: dict) -> list[str]:
    return [layer["label"] for layer in numbers["layers"]]


def load(numbers: dict) -> Iterator[tuple[str, Figure]]:
    values = by_layer(numbers, lambda layer, i: layer["load"][i])
    norm = TwoSlopeNorm(1, 0, max(2.0, np.nanmax(values)))
    x = numbered(values.shape[1])
    yield "", heat_map(values, x, labels(numbers), "expert", "layer", "load, 1 is fair", norm, AROUND)


def entropy(numbers: dict) -> Iterator[tuple[str, Figure]]:
    series = {
        name: [layer[key] for layer in numbers["layers"]]
        for name, key in (("of the probabilities", "routing_entropy"), ("of the load", "load_entropy"))
    }
    yield "", lines(labels(numbers), series, "entropy, of the largest")


def fair_share(layer: dict) -> float:
    """The share of a layer's tokens that each expert would have at balance."""
    return layer["experts_per_token"]["mean"] / layer["experts"]


def coactivation(numbers: dict) -> Iterator[tuple[str, Figure]]:
    """The experts that are most often together, as OLMoE shows them: at most 16."""
    for place in chosen_layers(numbers, "coactivation"):
        layer = numbers["layers"][place]
        values = np.array(layer["coactivation"])
        if layer["top_k"] < 2:
            continue
        best = np.sort(np.argsort(-values.max(axis=1), kind="stable")[:16])
        values = values[np.ix_(best, best)]
        np.fill_diagonal(values, np.nan)
        x = [str(i) for i in best]
        norm = Normalize(0, max(np.nanmax(values), 1e-9)) if values.size > 1 else Normalize(0, 1)
        figure = heat_map(values, x, x, "and this one", "tokens of expert", "share", norm, ticks="{x:.0%}")
        yield f"layer {layer['label']}", figure


def domains(numbers: dict) -> Iterator[tuple[str, Figure]]:
    names = [domain["name"] for domain in numbers["domains"]]
    if len(names) < 2:
        return
    for place in chosen_layers(numbers, "domains"):
        layer = numbers["layers"][place]
        values, fair = np.array(layer["domain_specialization"]), fair_share(layer)
        norm = TwoSlopeNorm(fair, 0, max(2 * fair, values.max(), 1e-9))
        x = numbered(values.shape[1])
        figure = heat_map(values, x, names, "expert", "", "share", norm, AROUND, "{x:.0%}")
        yield f"layer {layer['label']}", figure


def vocabulary(numbers: dict) -> Iterator[tuple[str, Figure]]:
    found = [layer["vocabulary_specialization"] for layer in numbers["layers"]]
    if not any(entry["read"] for entry in found):
        return
    names = {"read": "token read", "predicted": "token predicted", "chance": CHANCE}
    series = {name: [entry[key] for entry in found] for key, name in names.items()}
    yield "", lines(labels(numbers), series, "to the favourite expert")


def saturation(numbers: dict) -> Iterator[tuple[str, Figure]]:
    if not numbers["saturation"]:
        return
    series = {entry["checkpoint"].rstrip("/").split("/")[-1]: entry["layers"] for entry in numbers["saturation"]}
    series[CHANCE] = [fair_share(layer) for layer in numbers["layers"]]
    yield "", lines(labels(numbers), series, "experts in common")


def similarity(numbers: dict) -> Iterator[tuple[str, Figure]]:
    series = {}
    for key, name in (("weight_similarity", "weights"), ("output_similarity", "outputs")):
        pairs = [layer[key] and off_diagonal(layer[key]) for layer in numbers["layers"]]
        if any(pairs):
            series[f"{name}, most alike"] = [pair and max(pair) for pair in pairs]
            series[f"{name}, mean"] = [pair and sum(pair) / len(pair) for pair in pairs]
    if series:
        yield "", lines(labels(numbers), series, "cosine of two experts", percent=False)


def pruning(numbers: dict) -> Iterator[tuple[str, Figure]]:
    costs = [{cost["expert"]: cost["loss_change"] for cost in layer["pruning"]} for layer in numbers["layers"]]
    places = {layer["router"]: place for place, layer in enumerate(numbers["layers"])}
    values = by_layer(numbers, lambda layer, i: costs[places[layer["router"]]].get(i, np.nan))
    if np.isnan(values).all():
        return
    largest = max(np.nanmax(np.abs(values)), 1e-3)
    x = numbered(values.shape[1])
    norm = TwoSlopeNorm(0, -largest, largest)
    yield "", heat_map(values, x, labels(numbers), "expert left out", "layer", "change of loss, nats", norm, AROUND)


# Name of the section and of the PNG files -> the panels, each with its title.
FIGURES = {
    "load": load,
    "entropy": entropy,
    "similarity": similarity,
    "domains": domains,
    "vocabulary": vocabulary,
    "coactivation": coactivation,
    "saturation": saturation,
    "pruning": pruning,
}


def draw(name: str, numbers: dict) -> list[tuple[str, Figure]]:
    with matplotlib.rc_context(STYLE):
        panels = list(FIGURES[name](numbers))
        for _, figure in panels:  # laid out once, for both files
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
    return panels


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """The figure for inside a page: no prologue, ink and series colours from the page, names of its own."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=200, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'(xlink:href=")#', rf"\1#{name}-", text)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()
    opening = f'<svg viewBox="0 0 {width} {height}" xmlns:xlink="http://www.w3.org/1999/xlink" aria-hidden="true">'
    text = re.sub(r"<svg[^>]*>", opening, text, count=1)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--line)").replace(SOFT, "var(--soft)")
    for number, color in enumerate(SERIES, 1):
        text = text.replace(color, f"var(--series-{number})")
    return text
