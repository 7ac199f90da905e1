"""`hf-moe train`."""

from typing import Annotated

import typer


def train(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A YAML file with the arguments of one run, or a name from --list."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the recipes that come along.")] = False,
    show: Annotated[str | None, typer.Option(metavar="RECIPE", help="Print a recipe.")] = None,
    check: Annotated[str | None, typer.Option(metavar="RECIPE", help="Validate a recipe and what follows it.")] = None,
    accelerate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Train on every GPU of this machine, as a launch file of Accelerate says: fsdp2, zero2, zero3, "
            "expert_parallel, pipeline, or a file of yours. Without a recipe, print where the launch file is.",
        ),
    ] = None,
    help_: Annotated[
        bool, typer.Option("--help", "-h", help="Show this message, or after RECIPE its arguments, and exit.")
    ] = False,
) -> None:
    """Train a model as a recipe says. `--key value` replaces the recipe's value of that key."""
    if help_ and recipe is None:
        print(context.get_help())
    elif help_:
        from hf_moe.training.main import parser_of, stage_module

        parser = parser_of(stage_module([recipe, *context.args]))
        parser.take_recipe(recipe)
        parser.print_help()
    elif list_ or show is not None:
        from hf_moe.training.recipes.files import list_recipes, recipe_text

        print(list_recipes() if list_ else recipe_text(show).rstrip("\n"))
    elif check is not None:
        from hf_moe.training.main import check_recipe

        overrides = [*([recipe] if recipe else []), *context.args]  # the first word after --check RECIPE
        print(f"{check}: all {check_recipe(check, *overrides)} arguments are valid")
    elif accelerate is not None:
        from hf_moe.training.launch import find_launch_file, launch

        if recipe is None:
            print(find_launch_file(accelerate))
        else:
            launch(accelerate, [recipe, *context.args])
    else:
        from hf_moe.training.main import main

        main([*([recipe] if recipe else []), *context.args])
