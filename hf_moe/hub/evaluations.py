"""Evaluation results as the Hub's model-index, and as a table."""

import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .folder import SavedModel, read_json


def held_out_results(saved: SavedModel, task: str) -> list[EvalResult]:
    """The loss on held-out rows, where the folder says which rows those were."""
    data = (saved.stages[-1] if saved.stages else {}).get("eval_data")
    loss = saved.results.get("eval_loss")
    if not data or loss is None:
        return []
    name = ", ".join(data)
    return [
        EvalResult(
            task_type=task,
            dataset_type=name,
            dataset_name=name,
            metric_type="loss",
            metric_name="Held-out loss",
            metric_value=round(loss, 6),
        )
    ]


def lm_eval_results(path: str | Path, task: str) -> list[EvalResult]:
    """What a results file of EleutherAI's lm-evaluation-harness says, metric by metric; or a folder's newest one.

    Raises FileNotFoundError or a ValueError where it is no such file.
    """
    path = Path(path)
    path = newest_results(path) if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"The results file {path} does not exist.")
    said = read_json(path)
    tasks = said.get("results")
    found = [
        result
        for name, metrics in (tasks.items() if isinstance(tasks, dict) else ())
        if isinstance(metrics, dict)
        for result in task_results(name, metrics, said.get("configs", {}).get(name, {}), said, task)
    ]
    if not found:
        raise ValueError(f"{path} has no results as lm_eval writes them; give its results_*.json.")
    return found


def newest_results(folder: Path) -> Path:
    """The last file that `lm_eval --output_path FOLDER` wrote: MODEL/results_DATE.json, or the same in MODEL itself.

    Raises FileNotFoundError where there is none, and ValueError where there are those of several models.
    """
    found = sorted(folder.rglob("results*.json"), key=lambda path: path.name)  # the date is the name's
    models = sorted({str(path.parent) for path in found})
    if not found:
        raise FileNotFoundError(f"{folder} holds no results_DATE.json of lm_eval, nor does a folder in it.")
    if len(models) > 1:
        raise ValueError(f"{folder} holds results of {len(models)} models: give one of {', '.join(models)}.")
    return found[-1]


def task_results(
    name: str, metrics: dict[str, Any], config: dict[str, Any], said: dict[str, Any], task: str
) -> list[EvalResult]:
    """One result a metric of an lm_eval task; its keys are "acc,none" and "acc_stderr,none"."""
    shots = said.get("n-shot", {}).get(name)
    found = []
    for key, value in metrics.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr"):
            continue
        if not isinstance(value, int | float) or not math.isfinite(value):  # nothing was measured
            continue
        error = metrics.get(f"{metric}_stderr,{filtered}")
        args = {"num_few_shot": shots, "stderr": error if isinstance(error, int | float) else None}
        found.append(
            EvalResult(
                task_type=task,
                dataset_type=config.get("dataset_path") or name,
                dataset_name=metrics.get("alias", name).strip(" -"),
                dataset_config=config.get("dataset_name"),
                dataset_split=config.get("test_split") or config.get("validation_split"),
                metric_type=metric,
                metric_name=metric if filtered == "none" else f"{metric} ({filtered})",
                metric_value=value,
                metric_args={name: value for name, value in args.items() if value is not None} or None,
            )
        )
    return found


def merged(kept: list[EvalResult], found: list[EvalResult]) -> list[EvalResult]:
    """`found`, and of `kept` what measures something else."""
    measured = {key(result) for result in found}
    return [*(result for result in kept if key(result) not in measured), *found]


def key(result: EvalResult) -> tuple:
    return (*result.unique_identifier, result.metric_type, result.metric_name)


def evaluation_rows(results: list[EvalResult]) -> list[list[str]]:
    """Task, metric, number of examples shown, value with its standard error."""
    table = []
    for result in results:
        args = result.metric_args or {}
        error = f" ± {args['stderr']:.2g}" if "stderr" in args else ""
        shots = str(args.get("num_few_shot", ""))
        value = result.metric_value
        shown = f"{value:.4g}" if isinstance(value, int | float) else str(value)
        table.append([result.dataset_name, result.metric_name or result.metric_type, shots, shown + error])
    return table
