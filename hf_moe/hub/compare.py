"""Several runs side by side: their losses, the loads of their experts, and the arguments in which they differ."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .curves import draw_runs
from .folder import METRICS, RUN_FILE, STATE, read_json, read_log

# Title -> name in the log, and which of its values: the first or the last.
NUMBERS = {
    "steps": ("step", -1),
    "training loss": ("loss", -1),
    "held-out loss before": ("eval_loss", 0),
    "held-out loss": ("eval_loss", -1),
    "held-out reward": ("eval_reward", -1),
    "busiest expert, 1 at balance": ("router_load_max", -1),
    "busiest expert, held out": ("eval_router_load_max", -1),
    "idle experts": ("router_dead_experts", -1),
    "entropy of the load": ("router_load_entropy", -1),
}
# Where a run is and how it is watched tells nothing of what it did.
PLACES = ("output_dir", "run_name", "resume_from_checkpoint", "logging_dir", "report_to", "disable_tqdm")


def compare(runs: Sequence[str | Path], out: str | Path | None = None) -> list[dict[str, Any]]:
    """A row for each folder of `hf-moe train`: its name, numbers from its log, and the arguments that differ.

    out: a folder for `compare.csv`, `compare.md` and, with matplotlib, `compare.png`. Raises FileNotFoundError or a
    ValueError for a folder that holds no run, and for fewer than two.
    """
    folders = [Path(run) for run in runs]
    if len(folders) < 2:
        raise ValueError("Give the folders of two runs at least.")
    logs = [log_of(folder) for folder in folders]
    said = [arguments_of(folder) for folder in folders]
    differing = [
        name
        for name in dict.fromkeys(name for arguments in said for name in arguments)
        if name not in PLACES and any(arguments.get(name) != said[0].get(name) for arguments in said)
    ]
    rows = []
    for name, log, arguments in zip(names_of(folders), logs, said, strict=True):
        values = {title: [entry[key] for entry in log if key in entry] for title, (key, _) in NUMBERS.items()}
        if not any("eval_loss" in entry and entry.get("step") == 0 for entry in log):
            values["held-out loss before"] = []
        numbers = {title: found[NUMBERS[title][1]] for title, found in values.items() if found}
        rows.append({"run": name, **numbers, **{key: arguments.get(key) for key in differing}})
    titles = ["run", *(title for title in NUMBERS if any(title in row for row in rows)), *differing]
    rows = [{title: row.get(title) for title in titles} for row in rows]
    if out is not None:
        write(rows, dict(zip(names_of(folders), logs, strict=True)), Path(out))
    return rows


def names_of(folders: list[Path]) -> list[str]:
    """Each folder's own name, or where two are alike the paths as given."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def log_of(folder: Path) -> list[dict[str, Any]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    under_way = folder / METRICS
    if under_way.is_file() and not (folder / STATE).is_file():
        try:
            *whole, _ = under_way.read_text(encoding="utf-8").split("\n")  # the last may be half written
            log = [dict(json.loads(line)) for line in whole]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{under_way} is no log of a run: {error}.") from error
    else:
        log = read_log(folder)
    if not log:
        raise ValueError(f"{folder} holds no log of a run: give the output_dir of hf-moe train, or a checkpoint.")
    return log


def arguments_of(folder: Path) -> dict[str, Any]:
    """What the run was told, and what its rows were: of the folder, or of a checkpoint in it."""
    places = (folder / RUN_FILE, *sorted(folder.glob(f"checkpoint-*/{RUN_FILE}")))
    facts = read_json(next((place for place in places if place.is_file()), folder / RUN_FILE))
    rows = {f"rows of {name}": f"{x['rows']:,} ({x['digest'][:8]})" for name, x in facts.get("rows", {}).items()}
    return facts.get("arguments", {}) | facts.get("step", {}) | rows


def text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each title, a column for each run."""
    return [[title, *(text(row[title]) for row in rows)] for title in rows[0]]


def as_text(rows: list[dict[str, Any]]) -> str:
    lines = table(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def write(rows: list[dict[str, Any]], logs: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """The table as CSV and Markdown, and the picture, to `out`, each written aside."""
    out.mkdir(parents=True, exist_ok=True)
    head, *body = table(rows)
    markdown = ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)]
    with (out / ".compare.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *body])
    (out / ".compare.md").write_text("\n".join(markdown) + "\n", encoding="utf-8")
    for name in ("compare.csv", "compare.md"):
        os.replace(out / f".{name}", out / name)
    draw_runs(logs, out / "compare.png")
