"""`hf-moe check`."""

import sys
from typing import Annotated

import typer

from .output import hide_loading_bars, messages_on_stderr, print_report


def check(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Try hf_moe on this machine in half a minute: versions, kernels, texts, a saved folder, a training step.

    Exit code 1 if one of them is wrong. What it prints is what a report of a bug should hold.
    """
    with messages_on_stderr():
        hide_loading_bars()
        from hf_moe.self_check import machine, run

        found, results = machine(), []
    if not as_json:
        print_report(found, as_json)
        print()
    with messages_on_stderr():
        for result in run():
            results.append(result)
            if not as_json:
                line = f"{'ok' if result['ok'] else 'FAILED':<6}  {result['check']:<18}  {result['found']}"
                print(line, file=sys.__stdout__, flush=True)
    failed = [result["check"] for result in results if not result["ok"]]
    if as_json:
        print_report({"machine": found, "checks": results, "ok": not failed}, as_json)
    if failed:
        print(f"hf-moe: {len(failed)} of {len(results)} checks failed: {', '.join(failed)}.", file=sys.stderr)
        raise typer.Exit(1)
