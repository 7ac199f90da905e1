"""An experiment's page and pictures, from its results."""

from pathlib import Path
from typing import Any

from hf_moe.staging import written_aside

from .verdicts import Runs, differ, mean, mean_losses, spread

COLUMNS = {  # name in a run -> title, digits; what else was measured is shown by its name
    "loss_at_start": ("loss at the start", 4),
    "held_out_loss": ("held-out loss", 4),
    "dead_experts": ("dead experts", 2),
    "max_violation": ("max violation", 2),
    "load_entropy": ("load entropy", 3),
    "experts_per_token": ("experts a token", 2),
    "router_logits": ("squared logsumexp of the logits", 2),
}
NO_COLUMN = ("arm", "seed", "step_ms", "losses", "shares", "versions")
SIZES = {  # name of a size -> title; those that differ between the arms are shown
    "total_params": "parameters",
    "active_params": "active",
    "kv_cache_bytes_per_token": "bytes a token in the cache",
    "training_flops": "FLOPs of the training",
}


def measured(result: dict[str, Any], runs: Runs) -> list[str]:
    """What of the measures has a column: what some arm has, and not all have alike."""
    begun = any("begin" in arm for arm in result["arms"].values())
    names = dict.fromkeys(name for found in runs.values() for name in found[0] if name not in NO_COLUMN)
    shown = [name for name in [*COLUMNS, *names] if name in names and (name != "loss_at_start" or begun)]
    return [name for name in dict.fromkeys(shown) if len({cell(found, name) for found in runs.values()}) > 1]


def cell(found: list[dict[str, Any]], name: str) -> str:
    digits = COLUMNS.get(name, ("", 3))[1]
    return f"{mean(found, name):.{digits}f}" if all(name in run for run in found) else ""


def table(result: dict[str, Any], runs: Runs) -> list[list[str]]:
    """A header, and a row an arm; step times beside the first arm's."""
    first = mean(next(iter(runs.values())), "step_ms")
    names = measured(result, runs)
    sizes = [name for name in SIZES if differ(size[name] for size in result["sizes"].values())]
    titles = [COLUMNS[name][0] if name in COLUMNS else name.replace("_", " ") for name in names]
    header = ["arm", *titles, "spread of the loss", "step time", *(SIZES[name] for name in sizes)]
    rows = [
        [
            arm,
            *(cell(found, name) for name in names),
            f"{spread(found, 'held_out_loss'):.4f}",
            f"{mean(found, 'step_ms') / first:.2f}x",
            *(f"{result['sizes'][arm][name]:,}" for name in sizes),
        ]
        for arm, found in runs.items()
    ]
    return [header, *rows]


def page(result: dict[str, Any], runs: Runs) -> str:
    """Markdown."""
    budget = result["budget"]
    header, *rows = table(result, runs)
    tokens = budget["length"] * budget["rows"] * budget["steps"]
    experts = ["", "![share of each expert over training](experts.png)"] if has_shares(result, runs) else []
    steps = [arm["arguments"].get("max_steps", budget["steps"]) for arm in result["arms"].values()]
    fewer = ", some in fewer, as their FLOPs say" if min(steps) < budget["steps"] else ""
    lines = [
        f"# {result['experiment']}",
        "",
        f"{result['claim']} ({result['source']})",
        "",
        f"**Verdict: {result['verdict']}.** The source: {result['paper']}",
        "",
        *result["says"],
        *([""] if result["says"] else []),
        "| " + " | ".join(header) + " |",
        "|---|" + "---:|" * (len(header) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "![held-out loss of each arm](picture.png)",
        *experts,
        "",
        f"Each arm: {tokens:,} tokens of {result['data']} in {budget['steps']} steps{fewer}; {budget['seeds']} seeds, "
        f"the same rows in the same order for all; learning rate {budget['learning_rate']:g}. "
        f"{'; '.join(versions(runs))}.",
    ]
    return "\n".join(lines) + "\n"


def versions(runs: Runs) -> list[str]:
    """What the runs were made with."""
    made = [run["versions"] for found in runs.values() for run in found]
    said = (", ".join(x if name == "device" else f"{name} {x}" for name, x in one.items()) for one in made)
    return list(dict.fromkeys(said))


def picture(runs: Runs, path: Path) -> None:
    """Losses with their spread, the lowest first, and how the training loss came down."""
    from matplotlib.figure import Figure

    order = sorted(runs, key=lambda arm: mean(runs[arm], "held_out_loss"))
    figure = Figure(figsize=(10, 1.2 + 0.35 * max(4, len(order))), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses, errors = ([f(runs[arm], "held_out_loss") for arm in order] for f in (mean, spread))
    left.errorbar(losses, range(len(order)), xerr=errors, fmt="o")
    left.set_yticks(range(len(order)), order)
    left.invert_yaxis()
    left.set_xlabel("held-out loss, with its standard deviation over seeds")
    for arm in order:
        right.plot(mean_losses(runs[arm]), label=arm, linewidth=1)
    right.set_xlabel("step")
    right.set_ylabel("training loss")
    if len(order) <= 8:
        right.legend(fontsize="small")
    save(figure, path)


def has_shares(result: dict[str, Any], runs: Runs) -> bool:
    return result["draws_experts"] and all(found[0].get("shares") for found in runs.values())


def experts_picture(runs: Runs, path: Path) -> None:
    """Each expert's share of the last layer's tokens over training, as OLMoE's figure 10; the first seed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (arm, found) in zip(figure.subplots(1, len(runs), sharey=True), runs.items(), strict=True):
        steps, *shares = zip(*found[0]["shares"], strict=True)
        axes.stackplot(steps, *shares, colors=colormaps["turbo"].resampled(len(shares))(range(len(shares))))
        axes.set_title(arm)
        axes.set_xlabel("step")
        axes.margins(0)
    figure.axes[0].set_ylabel("share of the tokens, a colour an expert")
    save(figure, path)


def save(figure, path: Path) -> None:
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=140)


def write(result: dict[str, Any], runs: Runs, out: Path) -> list[Path]:
    """The page and the pictures, to `out`."""
    picture(runs, out / "picture.png")
    files = [out / "page.md", out / "picture.png"]
    if has_shares(result, runs):
        experts_picture(runs, out / "experts.png")
        files.append(out / "experts.png")
    with written_aside(out / "page.md") as aside:
        aside.write_text(page(result, runs), encoding="utf-8")
    return files
