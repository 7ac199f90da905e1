"""`hf-moe renew`."""

from pathlib import Path
from typing import Annotated

import typer

from .output import messages_on_stderr, print_report


def renew(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of saved hf_moe models.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Give saved models the model code of this hf_moe, so that they load on today's Transformers; weights stay."""
    with messages_on_stderr():
        from hf_moe.hub import renew

        reports = [renew(folder) for folder in folders]
    if as_json:
        print_report({"renewed": reports}, as_json)
        return
    for report in reports:
        files = len(report["written"]) + len(report["removed"])
        what = f"{report['before']} -> {report['now']}, {files} files changed" if files else "has today's code"
        print(f"{report['folder']}: {what}")
