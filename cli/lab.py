"""`hf-moe lab`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .inspect import print_columns
from .output import hide_loading_bars, messages_on_stderr


def lab(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Experiments from --list, or board.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the experiments, each with its claim.")] = False,
    data: Annotated[
        str | None,
        typer.Option(metavar="TEXT|DATASET", help="A text, rows with a column text, or a data set; else stories."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds of each arm.", show_default="the budget's")] = None,
    budget: Annotated[
        str, typer.Option(help="tiny (two cores, three minutes) or gpu (a card, ten minutes).")
    ] = "tiny",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where to, of several in folders of their names; what is done there is not done again."
        ),
    ] = None,
) -> None:
    """Run a claim of the lectures as an experiment, or every router on one board: a table, a picture, a verdict."""
    with messages_on_stderr():
        hide_loading_bars()
        from hf_moe.experiments.claims import EXPERIMENTS
        from hf_moe.experiments.experiment import BUDGETS

        if names:
            from hf_moe.experiments import page, runner

            given = checked(names, EXPERIMENTS, budget, BUDGETS, seeds, out)
            folders = {name: out if len(names) == 1 else out / name for name in names}
            begun = [runner.Begun(name, EXPERIMENTS[name], given, data, folders[name]) for name in folders]
            runner.run(begun, data)
            results = [(one.judged(), one.runs, one.out) for one in begun]
            files = [page.write(*one) for one in results]
    if list_ or not names:
        print_columns([(name, experiment.claim) for name, experiment in EXPERIMENTS.items()])
        return
    for (result, runs, _), written in zip(results, files, strict=True):
        print_columns(page.table(result, runs))
        print(f"{result['claim']} {result['verdict'].capitalize()}.")
        print("\n".join([*result["says"], *map(str, written)]))


def checked(names, experiments, budget, budgets, seeds, out):
    """The budget. Raises ValueError for what there is not."""
    for name in names:
        if name not in experiments:
            raise ValueError(f"There is no experiment {name!r}; there are {', '.join(experiments)}.")
    if budget not in budgets:
        raise ValueError(f"There is no budget {budget!r}; there are {', '.join(budgets)}.")
    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds is {seeds}; it must be at least 1.")
    if out is None:
        raise ValueError("--out is missing: name a folder for the results.")
    return budgets[budget] if seeds is None else replace(budgets[budget], seeds=seeds)
