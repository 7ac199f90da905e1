"""`hf-moe card`."""

from pathlib import Path
from typing import Annotated

import typer


def card(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A saved hf_moe model.")]) -> None:
    """Write the model card (README.md) of a saved model from what the folder says about it."""
    from hf_moe.hub import write_model_card

    print(write_model_card(folder))
