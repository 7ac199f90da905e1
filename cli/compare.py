"""`hf-moe compare`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .output import messages_on_stderr


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that `hf-moe train` wrote.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the table (.csv, .md) and its picture there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Compare runs: losses, loads of the experts, and the settings in which they differ."""
    with messages_on_stderr():
        from hf_moe.hub.compare import as_text
        from hf_moe.hub.compare import compare as compared

        rows = compared(runs, out)
    print(json.dumps({"runs": rows}) if as_json else as_text(rows))
