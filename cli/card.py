"""`hf-moe card`."""

from pathlib import Path
from typing import Annotated

import typer


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A saved model, LoRA adapter or ESFT expert rows.")],
    name: Annotated[str | None, typer.Option(help="What it is loaded by; the folder's name by default.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model that it was made from.")] = None,
    license: Annotated[str | None, typer.Option(help="The Hub's name of a licence, such as apache-2.0.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub id of a data set; can be repeated.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="ISO 639 code; can be repeated.")] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE|DIR", help="Results of lm_eval: a file, or its --output_path; can be repeated."),
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="A folder that `hf-moe trace` wrote for this model.")] = None,
) -> None:
    """Write the model card (README.md) of a saved model from what the folder says about it.

    What it cannot say are options; a card that is written again keeps what it was told.
    """
    from hf_moe.hub import write_model_card

    path = write_model_card(
        folder,
        name=name,
        base_model=base_model,
        license=license,
        datasets=dataset or [],
        languages=language or [],
        evaluations=evaluation or [],
        trace=trace,
    )
    print(path)
