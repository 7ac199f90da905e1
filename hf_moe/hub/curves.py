"""Training curves: a few rows of what the Trainer logged, and a picture of all of it."""

import sys
from pathlib import Path
from typing import Any

from ..staging import written_aside

# Name in the log -> title of the column.
COLUMNS = {
    "loss": "Training loss",
    "eval_loss": "Held-out loss",
    "learning_rate": "Learning rate",
    "router_load_max": "Busiest expert, 1 at balance",
}
# What each panel of the picture shows: title -> name in the log -> label.
PANELS = {
    "Loss": {"loss": "training", "eval_loss": "held out"},
    "Load of the busiest expert, 1 at balance": {"router_load_max": "training", "eval_router_load_max": "held out"},
    "Learning rate": {"learning_rate": "training"},
}
ROWS = 8


def curve_table(log_history: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles and at most ROWS rows, evenly spaced over the steps that were logged, the first and the last included."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in log_history:
        if "step" in entry and COLUMNS.keys() & entry.keys():
            steps.setdefault(entry["step"], {}).update(entry)
    columns = [name for name in COLUMNS if any(name in entry for entry in steps.values())]
    if len(steps) < 2:
        return [], []
    last = len(steps) - 1
    chosen = sorted({round(place * last / (ROWS - 1)) for place in range(ROWS)})
    names = list(steps)
    table = [
        [str(names[place]), *(f"{entry[name]:.4g}" if name in entry else "" for name in columns)]
        for place in chosen
        for entry in [steps[names[place]]]
    ]
    return ["Step", *(COLUMNS[name] for name in columns)], table


def draw_curves(log_history: list[dict[str, Any]], path: Path) -> bool:
    """Write the picture as a PNG; returns whether there is one. Without matplotlib it says so, and there is none."""
    return draw({"": log_history}, path)


def draw_runs(logs: dict[str, list[dict[str, Any]]], path: Path) -> bool:
    """The same of several runs, name -> log."""
    return draw({f"{name}, ": log for name, log in logs.items()}, path)


def draw(logs: dict[str, list[dict[str, Any]]], path: Path) -> bool:
    panels = []
    for title, names in PANELS.items():
        lines = {
            f"{whose}{label}": [(entry["step"], entry[name]) for entry in log if name in entry and "step" in entry]
            for whose, log in logs.items()
            for name, label in names.items()
        }
        lines = {label: points for label, points in lines.items() if points}
        if any(len(points) > 1 for points in lines.values()):
            panels.append((title, lines))
    if not panels:
        return False
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no picture of the training curves: pip install 'hf_moe[plots]'", file=sys.stderr)
        return False
    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 20 else None)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=150, format="png", metadata={"Software": None})  # the same bytes for the same log
    return True
