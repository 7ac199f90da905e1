"""`hf-moe push`."""

from pathlib import Path
from typing import Annotated

import typer

from .output import messages_on_stderr, print_report


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A saved model, LoRA adapter or ESFT expert rows.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="On the Hub: NAME or NAMESPACE/NAME.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and sizes; no network.")] = False,
    public: Annotated[bool, typer.Option("--public", help="For everyone to see; private by default.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; it is made if there is none.")] = None,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="The checkpoint folders, too.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload model",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Upload a saved model to the Hub with its code, card and figures, after checks.

    The token is the one of `hf auth login` or HF_TOKEN. After an interruption, the same command goes on.
    """
    with messages_on_stderr():
        from hf_moe.hub import push

        report = push(
            folder,
            repo_id,
            dry_run=dry_run,
            private=not public,
            revision=revision,
            checkpoints=checkpoints,
            message=message,
        )
    if as_json:
        print_report(report, as_json)
        return
    for name, size in report["files"].items():
        print(f"{size:>15,}  {name}")
    print(f"{report['bytes']:>15,}  in {len(report['files'])} files")
    for name, why in report["left_out"].items():
        print(f"{'left out':>15}  {name} ({why})")
    if not dry_run:
        print(f"{'private' if report['private'] else 'public'}: {report['url']}")
