"""`hf-moe train`."""

from typing import Annotated

import typer


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file with the arguments of one run.")],
) -> None:
    """Fine-tune a model as a recipe says. `--key value` replaces the recipe's value of that key."""
    from hf_moe.training.sft import main

    main([recipe, *context.args])
