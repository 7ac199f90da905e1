"""`hf-moe plan`."""

from typing import Annotated, Any

import typer

from .inspect import Json, TrustRemoteCode, compact, print_columns, readable_bytes
from .output import messages_on_stderr, print_report


def plan(
    model: Annotated[
        str | None, typer.Argument(metavar="PATH_OR_PRESET", help="A saved model, here or on the Hub, or a preset.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="A recipe as train takes it; the options replace its values.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the run.")] = 1,
    sharding: Annotated[
        str, typer.Option(help="none, zero1, zero2, zero3 (FSDP2) or expert_parallel: what is cut up for each GPU.")
    ] = "none",
    pipeline: Annotated[
        int | None, typer.Option(help="Processes of a pipeline: how long they wait under each schedule.")
    ] = None,
    trainable: Annotated[str | None, typer.Option(help="Parameter group, as in recipes.")] = None,
    lora_parts: Annotated[list[str] | None, typer.Option(help="A part that gets an adapter; may be repeated.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the weights: auto, float32, bfloat16, float16.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Rows of a forward pass on one GPU; else the recipe's, or 1.")
    ] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of a row; else the recipe's, or 4096.")] = None,
    accumulation: Annotated[
        int | None, typer.Option(min=1, help="Forward passes of an optimizer step; else the recipe's, or 1.")
    ] = None,
    experts: Annotated[
        str | None, typer.Option(help="experts_implementation: grouped_mm, hf_moe or sonicmoe.")
    ] = None,
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing/--no-checkpointing", help="Activation checkpointing.")
    ] = None,
    selective: Annotated[
        bool, typer.Option("--selective-checkpointing", help="The same, of what is between products and attention.")
    ] = False,
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on, for the time.")] = None,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s of a GPU that you have measured.")] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Model FLOPs utilisation of an H100 (989 TFLOP/s), in place of --tflops.")
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="A compute budget: the best model, data, batch and learning rate for it.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Say what a training run takes: memory by part, and time; or what a compute budget is best spent on."""
    with messages_on_stderr():
        rate = chosen_rate(tflops, mfu)
        given = {
            "pipeline": pipeline,
            "trainable": trainable,
            "lora_parts": lora_parts,
            "dtype": dtype,
            "per_device_train_batch_size": micro_batch,
            "max_length": length,
            "gradient_checkpointing": "selective" if selective else checkpointing,
            "gradient_accumulation_steps": accumulation,
            "experts_implementation": experts,
            "train_tokens": tokens,
        }
        if selective and checkpointing is not None:
            raise ValueError("--selective-checkpointing is a kind of checkpointing of its own: give it alone.")
        chosen = {name: value for name, value in given.items() if value is not None}
        if flops is None:
            report = run_plan(model, recipe, rate, trust_remote_code, gpus=gpus, sharding=sharding, **chosen)
        elif model or recipe or chosen or sharding != "none":
            raise ValueError("--flops plans without a model: only --gpus, --tflops or --mfu, and --json go with it.")
        else:
            report = spend(flops, gpus, rate)
    if json:
        print_report(report, as_json=True)
    else:
        print_columns(list(budget_table(report) if flops is not None else run_table(report)))


def chosen_rate(tflops: float | None, mfu: float | None):
    """None where neither is given. Raises ValueError where both are, or one is not above 0, or is more than can be."""
    from hf_moe.sizes.plan import H100_PEAK, Rate

    if tflops is not None and mfu is not None:
        raise ValueError("--tflops and --mfu both say how fast a GPU is: give one.")
    for name, value in (("--tflops", tflops), ("--mfu", mfu)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value:g}; it must be above 0.")
    if mfu is not None and mfu > 1:
        raise ValueError(f"--mfu is {mfu:g}; it is a share of the card's peak, at most 1.")
    if tflops is not None:
        return Rate(tflops * 1e12, "--tflops")
    if mfu is not None:
        return Rate(mfu * H100_PEAK, f"--mfu {mfu:g} of an H100's 989 TFLOP/s", counts_recomputation=False)
    return None


def spend(flops: float, gpus: int, rate) -> dict[str, Any]:
    """The scaling laws' plan of a compute budget, and how long it takes."""
    from hf_moe.sizes.plan import MEASURED
    from hf_moe.sizes.scaling_laws import planned

    report, rate = planned(flops), rate or MEASURED
    gpu_days = flops / rate.flops / 86400
    speed = {"flops_per_second": rate.flops, "flops_per_second_from": rate.source}
    return {**report, "gpus": gpus, "gpu_days": gpu_days, "days": gpu_days / gpus, **speed}


def run_plan(model: str | None, recipe: str | None, rate, trust_remote_code: bool, **given) -> dict[str, Any]:
    """Raises ValueError where no model is named."""
    from hf_moe.conversion.known_config import find_config

    from hf_moe.sizes.plan import Run, plan, run_of_recipe

    arguments = {}
    if recipe is not None:
        from hf_moe.training.main import arguments_of

        arguments = arguments_of(recipe)
    model = model or arguments.get("model_name_or_path")
    if model is None:
        raise ValueError(
            "Name a model: the folder of a saved one, or a preset from `hf-moe presets`; or give --flops."
        )
    run = run_of_recipe(arguments, **given) if recipe else Run(**given)
    config, _ = find_config(model, trust_remote_code)
    return {"model": model, "recipe": recipe, **plan(config, run, rate)}


def run_table(report: dict[str, Any]):
    """The report as rows of a name and what there is to say."""
    total, trained = report["total_params"], report["trained_params"]
    yield report["model"], report["recipe"] or ""
    yield "parameters", f"{compact(total)}, {compact(trained)} of them trained ({trained / total:.1%})"
    yield "rows", f"{report['rows']:,} of {report['length']:,} tokens in a forward pass on one GPU"
    each = f"of each of {report['gpus']} GPUs, {report['sharding']} sharded" if report["gpus"] > 1 else "of one GPU"
    yield "memory", each
    for name, size in report["memory_per_gpu"].items():
        yield f"  {name.replace('_', ' ')}", "decided by the data" if size is None else readable_bytes(size)
    yield "  sum", readable_bytes(report["memory_per_gpu_total"])
    if report["not_counted"]:
        yield "  not counted", report["not_counted"]
    if report["cpu_memory_ema"]:
        yield "  on the CPU", f"{readable_bytes(report['cpu_memory_ema'])} for the average of the weights"
    yield from time_rows(report)
    if report.get("pipeline_bubbles"):
        yield "pipeline", f"of {report['pipeline']} processes: the share of a step that each waits"
        for name, share in report["pipeline_bubbles"].items():
            yield f"  {name}", f"{share:.1%}"


def time_rows(report: dict[str, Any]):
    if "time_unknown" in report:
        yield "time", f"unknown: {report['time_unknown']}"
        return
    if "tokens_per_second" in report:
        yield "tokens a second", f"{report['tokens_per_second']:,.0f}, padding included"
    if "tokens_per_second_range" in report:
        low, high = report["tokens_per_second_range"]
        yield "", f"{low:,.0f} to {high:,.0f}: as far off were measured runs that the others predicted"
        sends = "; GPUs send each other as much a second as two of one host did" if report["gpus"] > 1 else ""
        yield "a step", f"{report['seconds_per_step']:,.3g} seconds{sends}"
    if "days" in report:
        tokens = f"{compact(report['train_tokens'])} tokens: {report['days']:,.3g} days"
        yield "time", f"{tokens}, {report['gpu_days']:,.3g} GPU-days"
    yield "at", f"{report['flops_per_second'] / 1e12:,.4g} TFLOP/s a GPU, {report['flops_per_second_from']}"


def budget_table(report: dict[str, Any]):
    yield "compute", f"{report['flops']:.3g} FLOPs"
    yield "model", f"{report['model_flops_per_token']:.3g} non-embedding FLOPs a training token"
    yield "data", f"{compact(report['train_tokens'])} tokens"
    yield "learning rate", f"{report['learning_rate']:.3g}"
    yield "batch", f"{compact(report['batch_tokens'])} tokens"
    yield from time_rows(report)
    yield "laws", "DeepSeek LLM (https://arxiv.org/abs/2401.02954, 3), fitted on dense models"
