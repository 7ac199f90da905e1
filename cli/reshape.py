"""`hf-moe prune`, `hf-moe grow` and `hf-moe experts`: a trained mixture in another shape."""

from typing import Annotated

import typer

from .convert import DryRun, Json, NoVerify, Output, Resume, ShardSize, Source, finish
from .output import hide_loading_bars, messages_on_stderr

EXACT = 1e-4


def share(word: str) -> float:
    """A ratio. What is meant for each layer is refused with the reason."""
    try:
        return float(word)
    except ValueError:
        raise typer.BadParameter(
            f"{word} is no number: it is one for all layers, as no family's config, nor hf_moe's, holds a number of "
            "experts for each."
        ) from None


def prune(
    src: Source,
    dst: Output,
    experts: Annotated[int | None, typer.Option(help="Experts that each layer keeps.")] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            parser=share,
            help="Instead: the share of them that is dropped, one for all layers, as a config holds one number of "
            "experts.",
        ),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            help="What an expert is worth: reap (router weight times norm of its output), frequency, output (the norm "
            "alone) or random."
        ),
    ] = "reap",
    merge: Annotated[
        bool, typer.Option("--merge", help="Drop none: make each one with the nearest that stays. Needs SciPy.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="What the model reads, a layer in memory at a time: a file or a folder of text or rows, or a data "
            "set's name on the Hub.",
        ),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="How many of its tokens.")] = 4096,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Texts to compare the result on with the source, one by one."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn (random).")] = 0,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
    resume: Resume = False,
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Drop the experts of each layer that are worth least by a text; the model stays of its family."""
    with messages_on_stderr():
        hide_loading_bars()
        from hf_moe.conversion import prune

        report = prune(
            src,
            dst,
            experts=experts,
            ratio=ratio,
            by=by,
            merge=merge,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            data=data or (),
            seed=seed,
            max_shard_size=max_shard_size,
            dry_run=dry_run,
            resume=resume,
            verify=not no_verify,
        )
    finish(report if json else without_lists(report), json)


def grow(
    src: Source,
    dst: Output,
    experts: Annotated[
        int,
        typer.Option(
            help="Experts of each layer: a multiple of what there are; any larger number with --calibration, for one "
            "expert a token."
        ),
    ],
    top_k: Annotated[
        int | None,
        typer.Option(help="Experts of a token: as many times more, or as many as now.", show_default="as many as now"),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Added to the router's rows, beside their size, so that copies come to differ.",
            show_default="3e-7 in float32, else 1e-2",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="What says which experts are the busiest, and get the most copies."),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="How many of its tokens.")] = 4096,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
    resume: Resume = False,
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Give each layer several copies of its experts; at first the model computes what it computed."""
    with messages_on_stderr():
        hide_loading_bars()
        from hf_moe.conversion import grow

        report = grow(
            src,
            dst,
            experts=experts,
            top_k=top_k,
            noise=noise,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            seed=seed,
            max_shard_size=max_shard_size,
            dry_run=dry_run,
            resume=resume,
            verify=not no_verify,
        )
    finish(report if json else without_lists(report), json, EXACT)


def experts(
    src: Source,
    dst: Output,
    swap: Annotated[
        list[str] | None,
        typer.Option(metavar="I=SIBLING", help="Expert I is the sibling's from now on; SIBLING:J for another of its."),
    ] = None,
    remove: Annotated[list[int] | None, typer.Option(metavar="I", help="Expert I leaves.")] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(metavar="SIBLING", help="The sibling's last expert joins; SIBLING:J names another."),
    ] = None,
    tune_router: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Then train the routers alone on a text: a file or a folder of text or rows, or a data set's name on "
            "the Hub.",
        ),
    ] = None,
    tune_tokens: Annotated[int, typer.Option(help="How many of its tokens.")] = 100_000,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
    resume: Resume = False,
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Add a sibling's expert to each layer, take one out, or put one in another's place; all else stays as it is."""
    with messages_on_stderr():
        hide_loading_bars()
        given = {
            "swap": [numbered(word) for word in swap or ()],
            "remove": remove or (),
            "add": add or (),
            "max_shard_size": max_shard_size,
            "dry_run": dry_run,
            "resume": resume,
            "verify": not no_verify,
        }
        if tune_router is None:
            from hf_moe.conversion import exchange_experts

            report = exchange_experts(src, dst, **given)
        else:
            from hf_moe.training.router_tuning import exchange_and_tune

            report = exchange_and_tune(src, dst, tune_router, tune_tokens, **given)
    finish(report, json)


def numbered(word: str) -> tuple[int, str]:
    """I=SIBLING as a pair."""
    number, equals, sibling = word.partition("=")
    if not (equals and number.isdigit() and sibling):
        raise ValueError(f"--swap is {word}; write I=SIBLING, the number of an expert and a folder or a Hub id.")
    return int(number), sibling


def without_lists(report: dict) -> dict:
    """For the screen each layer's kept experts, or how many copies each has, on a line, and no scores."""
    from hf_moe.hub.tables import busiest

    kept = {
        f"kept in {layer}": " ".join("+".join(map(str, numbers)) for numbers in experts)
        for layer, experts in report.get("kept", {}).items()
    }
    for layer, copied in report.get("copies", {}).items():
        kept[f"copies in {layer}"] = " ".join(str(copied.count(expert)) for expert in sorted(set(copied)))
    for domain in report.get("domains", ()):
        kept[f"perplexity on {domain['text']}"] = f"{domain['perplexity_a']:.4g}, now {domain['perplexity_b']:.4g}"
    for when, layers in report.get("load", {}).items():
        kept[f"busiest expert {when}, 1 at balance"] = f"{max(map(busiest, layers.values())):.3g}"
    lists = ("kept", "copies", "scores", "domains", "load")
    return {name: value for name, value in report.items() if name not in lists} | kept
