"""`hf-moe upcycle`, `hf-moe import`, `hf-moe export` and `hf-moe verify`."""

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from .inspect import Quantize, TrustRemoteCode
from .output import hide_loading_bars, messages_on_stderr, print_report

# The largest difference between two logits, in float32, at which two models count as equal.
TOLERANCE = 1e-4
# Experts add up a network in another order, and the activations of large models reach thousands.
UPCYCLE_TOLERANCE = 1e-3
MODELS = ("the source", "the result")

Source = Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint folder, or a model id on the Hub.")]
Output = Annotated[Path, typer.Argument(metavar="DST", help="The folder to write; it must be new or empty.")]
ShardSize = Annotated[str, typer.Option(help="Split the weights into files of at most this size.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run has written.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not compare the logits with the source's.")]
DropMtp = Annotated[bool, typer.Option("--drop-mtp", help="Leave out the layers for multi-token prediction.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def upcycle(
    src: Annotated[
        list[str],
        typer.Argument(metavar="SRC...", help="A checkpoint folder, or a model id on the Hub; merge: several."),
    ],
    dst: Output,
    experts: Annotated[
        int, typer.Option(help="Experts per layer: whole MLPs; split, carve: pieces of the dense one.")
    ],
    top_k: Annotated[int, typer.Option(help="Experts that each token is sent to.")],
    strategy: Annotated[
        str, typer.Option(help="How experts are made: copy, noise, drop, granular, split, carve, shared or merge.")
    ] = "copy",
    granularity: Annotated[
        int, typer.Option(help="Cut each MLP into this many experts, chosen together at first.")
    ] = 1,
    shared: Annotated[
        int | None, typer.Option(help="Shared experts, which every token meets (carve, shared).", show_default="1")
    ] = None,
    carved: Annotated[
        bool, typer.Option("--carved", help="Shared experts are pieces of the dense MLP, not added to it (shared).")
    ] = False,
    noise_scale: Annotated[
        float | None, typer.Option(help="Noise, in standard deviations of each tensor (noise).", show_default="0.05")
    ] = None,
    drop_ratio: Annotated[
        float | None, typer.Option(help="Share of the neurons that are drawn anew (drop).", show_default="0.5")
    ] = None,
    rest: Annotated[
        str | None,
        typer.Option(help="Other tensors: average, or the number of a SRC, from 0 (merge).", show_default="average"),
    ] = None,
    domain_text: Annotated[
        list[str] | None, typer.Option(help="A text for each SRC, in order, to report perplexities on (merge).")
    ] = None,
    layers: Annotated[
        str,
        typer.Option(help="Which layers become sparse: all, all/2 (every second), 2-5,8 or 0-3=copy,4-7=drop."),
    ] = "all",
    graft: Annotated[
        bool,
        typer.Option(
            "--graft",
            help="Keep the model's own architecture, with experts in it, where hf_moe's own could hold it, too.",
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    router_init: Annotated[
        str | None,
        typer.Option(
            help="How routers start: normal, zero, hidden, cheap_embed (of --prompts), centroids (of --calibration).",
            show_default="as the strategy calls for",
        ),
    ] = None,
    router_std: Annotated[
        float | None, typer.Option(help="Root mean square of the routers' weights.", show_default="0.02")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="A YAML or JSON list: a text, or several, for each expert.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="A file or a folder of text or rows, or a data set's name on the Hub, on which neurons or tokens are "
            "grouped (split, carve, shared --carved, centroids). Its first 4096 tokens; the dense model reads them in "
            "memory, in float32.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
    resume: Resume = False,
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Turn a dense checkpoint into a mixture of experts.

    An option that the strategy does not read is refused. Strategies that keep the function fail, with exit code 1, if
    the logits differ from the dense model's; for the others the difference is reported.
    """
    with messages_on_stderr():
        hide_loading_bars()
        from hf_moe.conversion import upcycle

        report = upcycle(
            src,
            dst,
            experts=experts,
            top_k=top_k,
            strategy=strategy,
            granularity=granularity,
            shared=shared,
            carved=carved,
            noise_scale=noise_scale,
            drop_ratio=drop_ratio,
            rest=rest,
            domain_texts=domain_text or None,
            layers=layers,
            graft=graft,
            trust_remote_code=trust_remote_code,
            router_init=router_init,
            router_std=router_std,
            prompts=prompts,
            calibration=calibration,
            seed=seed,
            max_shard_size=max_shard_size,
            dry_run=dry_run,
            resume=resume,
            verify=not no_verify,
        )
    finish(report, json, UPCYCLE_TOLERANCE)


def import_(
    src: Source,
    dst: Output,
    drop_mtp: DropMtp = False,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
    resume: Resume = False,
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Rewrite a released mixture-of-experts checkpoint as an hf_moe one."""
    with messages_on_stderr():
        hide_loading_bars()
        from hf_moe.conversion import import_checkpoint

        report = import_checkpoint(
            src,
            dst,
            drop_mtp=drop_mtp,
            max_shard_size=max_shard_size,
            dry_run=dry_run,
            resume=resume,
            verify=not no_verify,
        )
    finish(report, json)


def export(
    src: Source,
    dst: Annotated[
        Path | None, typer.Argument(metavar="DST", help="The folder to write; not needed with --nearest.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="FAMILY", help="The family to write, such as mixtral or deepseek_v3.")
    ] = None,
    nearest: Annotated[
        bool, typer.Option("--nearest", help="Only list the families that can hold the model; write nothing.")
    ] = False,
    layout: Annotated[
        str | None,
        typer.Option(help="How experts are stored: per-expert or fused; default: as released."),
    ] = None,
    drop_mtp: DropMtp = False,
    exported_base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The exported base of an adapter, for its config to name; adapters only."),
    ] = None,
    max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False,
    resume: Resume = False,
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Rewrite an hf_moe checkpoint as one of a released family, for every program that reads that."""
    with messages_on_stderr():
        hide_loading_bars()
        from hf_moe.conversion import export_checkpoint, nearest_families

        if nearest:
            report = nearest_families(src, drop_mtp=drop_mtp)
        elif dst is None or to is None:
            raise ValueError(
                f"{'DST' if dst is None else '--to'} is missing: say hf-moe export SRC DST --to FAMILY, or see with "
                "hf-moe export SRC --nearest which families can hold the model."
            )
        else:
            report = export_checkpoint(
                src,
                dst,
                to=to,
                layout=layout,
                drop_mtp=drop_mtp,
                exported_base=exported_base,
                max_shard_size=max_shard_size,
                dry_run=dry_run,
                resume=resume,
                verify=not no_verify,
            )
    if nearest and not json:
        for fit in report["nearest"]:
            print(fit["reason"] or f"{fit['family']} can hold this model.")
        return
    finish(report, json)


def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint folder, or a model id on the Hub.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The checkpoint to compare with it.")],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="What to compare on: a file or a folder of text or rows, or a data set's name on the Hub.",
        ),
    ] = None,
    quantize: Quantize = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0, help=f"Largest difference between two logits that passes: {TOLERANCE:g}; any with --quantize."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Compare two checkpoints' logits; exit code 1 if they differ by more than the tolerance.

    Also what B writes with a cache and without; with --quantize, what B's matrices in fewer bits lose.
    """
    with messages_on_stderr():
        hide_loading_bars()
        from hf_moe.conversion import verify

        report = verify(a, b, data=data, quantize=quantize, trust_remote_code=trust_remote_code)
    tolerance = (math.inf if quantize else TOLERANCE) if tolerance is None else tolerance
    finish(report, json, tolerance, (a, f"{b} in {quantize}" if quantize else b))


def finish(report: dict, as_json: bool, tolerance: float = TOLERANCE, models: tuple[str, str] = MODELS) -> None:
    """Print the report, the models by these names; exit code 1 where logits that should be equal differ beyond the
    tolerance, or a cache does."""
    titles = {f"perplexity_{which}": f"perplexity of {name}" for which, name in zip("ab", models, strict=True)}
    print_report(report if as_json else report | {"warning": None}, as_json, titles)  # which comes last
    expected = report.get("equal_at_step_0", True)
    # Written so that a NaN fails.
    if expected and "max_abs_diff" in report and not report["max_abs_diff"] <= tolerance:
        print(
            f"hf-moe: the logits differ by up to {report['max_abs_diff']:.3g}, more than {tolerance:g}.",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    if report.get("cached_text_equal") is False:
        print(
            f"hf-moe: the text with a cache is not the text without: its logits differ by up to "
            f"{report['cache_max_abs_diff']:.3g}; run hf-moe check.",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    if report.get("warning"):
        print(f"hf-moe: {report['warning']}", file=sys.stderr)
