"""An experiment's page and picture, from its results."""

from pathlib import Path
from typing import Any

from hf_moe.staging import written_aside

from .experiment import Runs, mean, spread

COLUMNS = {  # name in a run -> title, digits
    "held_out_loss": ("held-out loss", 4),
    "dead_experts": ("dead experts", 2),
    "max_violation": ("max violation", 2),
    "load_entropy": ("load entropy", 3),
    "experts_per_token": ("experts a token", 2),
}


def table(runs: Runs, sizes: dict[str, dict[str, int]]) -> list[list[str]]:
    """A header, and a row an arm; step times beside the first arm's."""
    first = mean(next(iter(runs.values())), "step_ms")
    shown = [name for name in COLUMNS if all(name in run for found in runs.values() for run in found)]
    header = ["arm", *(COLUMNS[name][0] for name in shown), "spread of the loss", "step time", "parameters", "active"]
    rows = [
        [
            arm,
            *(f"{mean(found, name):.{COLUMNS[name][1]}f}" for name in shown),
            f"{spread(found, 'held_out_loss'):.4f}",
            f"{mean(found, 'step_ms') / first:.2f}x",
            f"{sizes[arm]['total_params']:,}",
            f"{sizes[arm]['active_params']:,}",
        ]
        for arm, found in runs.items()
    ]
    return [header, *rows]


def page(result: dict[str, Any], runs: Runs) -> str:
    """Markdown."""
    budget, versions = result["budget"], result["versions"]
    header, *rows = table(runs, result["sizes"])
    tokens = budget["length"] * budget["rows"] * budget["steps"]
    lines = [
        f"# {result['experiment']}",
        "",
        f"{result['claim']} ({result['source']})",
        "",
        f"**Here: {result['verdict']}.** The source: {result['paper']}",
        "",
        "| " + " | ".join(header) + " |",
        "|---|" + "---:|" * (len(header) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "![held-out loss of each arm](picture.png)",
        "",
        f"Each arm: {tokens:,} tokens of {result['data']}, {budget['steps']} steps, {budget['seeds']} seeds, the same "
        f"rows in the same order for all; learning rate {budget['learning_rate']:g}. hf_moe {versions['hf_moe']}, "
        f"torch {versions['torch']}, Transformers {versions['transformers']}, {versions['device']}.",
    ]
    return "\n".join(lines) + "\n"


def picture(runs: Runs, path: Path) -> None:
    """Losses with their spread, the lowest first, and how the training loss came down."""
    from matplotlib.figure import Figure

    order = sorted(runs, key=lambda arm: mean(runs[arm], "held_out_loss"))
    figure = Figure(figsize=(10, 1.2 + 0.35 * len(order)), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses, errors = ([f(runs[arm], "held_out_loss") for arm in order] for f in (mean, spread))
    left.errorbar(losses, range(len(order)), xerr=errors, fmt="o")
    left.set_yticks(range(len(order)), order)
    left.invert_yaxis()
    left.set_xlabel("held-out loss, with its standard deviation over seeds")
    for arm in order:
        steps = zip(*(run["losses"] for run in runs[arm]), strict=True)
        right.plot([sum(step) / len(step) for step in steps], label=arm, linewidth=1)
    right.set_xlabel("step")
    right.set_ylabel("training loss")
    if len(order) <= 8:
        right.legend(fontsize="small")
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=140)


def write(result: dict[str, Any], runs: Runs, out: Path) -> list[Path]:
    """The page and the picture, to `out`."""
    picture(runs, out / "picture.png")
    with written_aside(out / "page.md") as aside:
        aside.write_text(page(result, runs), encoding="utf-8")
    return [out / "page.md", out / "picture.png"]
