"""What `hf-moe trace` found of a model's routing, for its card."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from ..model.balancing import expert_load
from ..routers import routed_experts
from .folder import SavedModel, read_json
from .tables import WHEN, numbered_layers

# The trace's figures that a card shows, by the first word of their file's name -> what they show.
SHOWN = {"load": "Load of each expert", "entropy": "Routing entropy", "domains": "Domain specialisation"}

FIGURE = re.compile(r"; figures/([^/;)]+\.png)(?=\)$)")  # as a finding of the trace ends


def read_trace(saved: SavedModel, trace: Path, figures: Path) -> dict[str, Any]:
    """The rows, findings and figures of a folder that `hf-moe trace` wrote; its PNG files are copied to `figures`.

    Raises FileNotFoundError where there is no trace, ValueError where it is of another model.
    """
    numbers = read_json(trace / "numbers.json")
    if not numbers.get("layers"):
        raise FileNotFoundError(f"{trace} holds no numbers.json with layers; `hf-moe trace` writes one.")
    layers = numbers["layers"]
    if saved.config is not None and {layer["experts"] for layer in layers} != {routed_experts(saved.config)[0]}:
        traced, here = layers[0]["experts"], routed_experts(saved.config)[0]
        raise ValueError(f"{trace} is of another model, with {traced} experts in a layer; this one has {here}.")
    facts = {
        "Text": ", ".join(map(said, numbers["domains"])),
        "Tokens": f"{numbers['tokens']:,}",
        "Busiest expert, times its fair load": f"{max(max(layer['load']) for layer in layers):.3g}",
        "Experts that no token chose": str(sum(len(layer["dead"]) for layer in layers)),
        "Entropy of the load, 1 at balance": f"{mean(layers, 'load_entropy'):.3g}",
        "Entropy of the routing, 1 where it is a toss": f"{mean(layers, 'routing_entropy'):.3g}",
    }
    figures.mkdir(parents=True, exist_ok=True)
    shown = []
    for word, title in SHOWN.items():
        for file in sorted((trace / "figures").glob("*.png")):
            kind, *where = file.stem.split("-")
            if kind == word:
                target = figures / f"routing-{file.name}"
                shutil.copyfile(file, target)
                shown.append(
                    {
                        "title": ", ".join(filter(None, [title, " ".join(where)])),
                        "path": f"{figures.name}/{target.name}",
                    }
                )
    paths = {figure["path"].split("/routing-")[-1]: figure["path"] for figure in shown}
    findings = [FIGURE.sub(lambda found: at(paths.get(found[1])), finding) for finding in numbers["findings"]]
    return {"rows": [list(row) for row in facts.items()], "findings": findings, "figures": shown}


def draw_loads(loads: dict[str, dict[str, list[int]]], path: Path) -> bool:
    """Draw the load of each expert before and after layers were pruned, as a PNG; returns whether there is a picture.

    loads: "before" and "after" -> the name of a layer -> tokens of each expert. Without matplotlib it says so, and
    there is none.
    """
    if not loads:
        return False
    try:
        from matplotlib.colors import TwoSlopeNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError:
        print("no picture of the experts' load: pip install 'hf_moe[plots]'", file=sys.stderr)
        return False
    layers = numbered_layers(loads[WHEN[0]])
    maps = {when: [expert_load(torch.tensor(loads[when][name])).tolist() for _, name in layers] for when in WHEN}
    norm = TwoSlopeNorm(1, 0, max(2.0, *(max(row) for rows in maps.values() for row in rows)))
    figure = Figure(figsize=(9, min(1.6 + 0.2 * len(layers), 9)), layout="constrained")
    axes = figure.subplots(1, len(WHEN), sharey=True)
    for axis, (when, rows) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(rows, cmap="coolwarm", norm=norm, aspect="auto", interpolation="nearest")
        axis.set_title(when, fontsize=10)
        axis.set_xlabel("expert")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("layer")
    axes[0].set_yticks(range(len(layers)), [number for number, _ in layers])
    figure.colorbar(image, ax=axes, label="load, 1 is fair")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})  # the same bytes for the same loads
    return True


def at(path: str | None) -> str:
    """Where a finding's figure lies beside the card; nothing where the card does not show it."""
    return "" if path is None else f"; {path}"


def said(domain: dict[str, Any]) -> str:
    """A text and the model's perplexity on it, which rows of one token have not."""
    perplexity = domain["perplexity"]
    return domain["name"] if perplexity is None else f"{domain['name']} (perplexity {perplexity:.4g})"


def mean(layers: list[dict[str, Any]], name: str) -> float:
    return sum(layer[name] for layer in layers) / len(layers)
