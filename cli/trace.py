"""`hf-moe trace`."""

from pathlib import Path
from typing import Annotated

import typer

from .inspect import TrustRemoteCode
from .output import hide_loading_bars, messages_on_stderr, print_report


def trace(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A saved mixture of experts, or a Hub id.")],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="FILE|DATASET",
            help="A text, rows with a column text or messages, a folder, or a data set on the Hub. Several: a "
            "domain each; NAME=FILE gives a name.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must be new or empty.")],
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="CHECKPOINT", help="Router saturation against this checkpoint; may be given again."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Read at most so many tokens of each domain.")] = 100_000,
    prune_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens to spend on leaving out experts, all together; 0: none.",
            show_default="a quarter of those that are traced",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Look inside a mixture of experts: run text through it and write a report on what its routers do."""
    with messages_on_stderr():
        hide_loading_bars()
        from hf_moe.telemetry import trace

        report = trace(
            model,
            data,
            out,
            compare=compare or (),
            max_tokens=max_tokens,
            prune_tokens=prune_tokens,
            trust_remote_code=trust_remote_code,
        )
    if json:
        print_report(report, as_json=True)
        return
    for finding in report["findings"]:
        print(f"- {finding}")
    print(report["report"])
