"""`hf-moe inspect` and `hf-moe presets`."""

import runpy
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .output import messages_on_stderr, print_report

if TYPE_CHECKING:
    from hf_moe import HfMoeConfig, HfMoeGraftConfig

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]

Quantize = Annotated[
    Literal["fp8", "int4"] | None,
    typer.Option(help="Read the model's matrices in 8 bits (float8 in blocks, as DeepSeek-V3 is released) or in 4."),
]


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="PATH_OR_PRESET", help="A saved model, here or on the Hub, or a preset.")
    ],
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens attended to, for the FLOPs; unless given 4096, or all that a model with fewer takes."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Say how large a model is and what it costs to run, from its config alone."""
    with messages_on_stderr():
        from hf_moe.conversion.known_config import find_config

        from hf_moe.hub.folder import measured_k, read_log
        from hf_moe.sizes.counts import cache_alternatives, sizes

        config, about = find_config(model, trust_remote_code)
        measured = None if config.fills_slots else measured_k(read_log(Path(model).expanduser()))
        grafted = config.model_type == "hf_moe_graft"
        report = {"model": model, **about, **(graft_summary if grafted else summary)(config), **sizes(config, context)}
        if not grafted:
            report["kv_cache_alternatives"] = cache_alternatives(config)
        if measured:
            report["measured_experts_per_tok"], report["measured_experts_per_tok_spread"] = measured
            report["measured_active_params"] = sizes(config, context, measured[0])["active_params"]
    if json:
        print_report(report, as_json=True)
    else:
        print_columns(list(graft_table(report) if grafted else table(report)))


def presets(json: Json = False) -> None:
    """List the published architectures that inspect and HfMoeConfig.from_preset know."""
    # The file alone: importing hf_moe brings torch and Transformers, seconds for a list.
    published = runpy.run_path(Path(find_spec("hf_moe").origin).parent / "sizes" / "presets.py")["PRESETS"]
    if json:
        print_report(published, as_json=True)
        return
    rows = [
        (
            name,
            compact(entry["published"]["total"]),
            compact(entry["published"]["active"]),
            f"{entry['fields']['num_experts_per_tok']} of {entry['fields']['num_experts']}",
            entry["title"],
        )
        for name, entry in published.items()
    ]
    print_columns([("preset", "total", "active", "experts", "published as"), *rows])


def summary(config: "HfMoeConfig") -> dict[str, Any]:
    """What the model is: layers, attention, experts, router."""
    sparse = config.mlp_layer_types.count("sparse")
    return {
        "layers": config.num_hidden_layers,
        "sparse_layers": sparse,
        "sliding_layers": config.layer_types.count("sliding_attention"),
        "sliding_window": config.sliding_window,
        "chunked_layers": config.layer_types.count("chunked_attention"),
        "attention_chunk_size": config.attention_chunk_size,
        "attention_type": config.attention_type,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_experts": config.num_experts if sparse else 0,
        "num_experts_per_tok": config.num_experts_per_tok if sparse else 0,
        "moe_intermediate_size": config.moe_intermediate_size,
        "n_shared_experts": config.n_shared_experts if sparse else 0,
        "router_type": config.router_type if sparse else None,
        "router_args": config.router_args if sparse else {},
    }


def graft_summary(config: "HfMoeGraftConfig") -> dict[str, Any]:
    """What a graft is: its host, as far as its config says, and the experts."""
    import torch

    from hf_moe import HfMoeGraftForCausalLM
    from hf_moe.routers import find_routers

    with torch.device("meta"):
        model = HfMoeGraftForCausalLM(config)
    routers = find_routers(model).values()
    widths = {x.layer.experts.intermediate_dim for x in routers}
    text = config.backbone.get_text_config()
    return {
        "host": config.backbone.model_type,
        "host_class": model.host_class.__name__,
        "layers": getattr(text, "num_hidden_layers", None),
        "layer_types": dict(Counter(getattr(text, "layer_types", None) or ())),
        "sparse_layers": len(routers),
        "num_attention_heads": getattr(text, "num_attention_heads", None),
        "num_key_value_heads": getattr(text, "num_key_value_heads", None),
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": max(widths) if len(widths) == 1 else sorted(widths),
        "n_shared_experts": config.n_shared_experts,
        "router_type": config.router_type,
        "router_args": config.router_args,
    }


def graft_table(report: dict[str, Any]):
    """As `table`; what the host's code does not say is unknown, in so many words."""
    yield report["model"], f"experts grafted onto a {report['host']} ({report['host_class']})"
    yield from origin_rows(report)
    yield from parameter_rows(report, {})
    yield "layers", graft_layers(report)
    yield "experts", experts(report)
    if report["flops_per_token"] is None:
        yield "FLOPs per token", "unknown: the data decide about them"
    else:
        yield from flops_rows(report)
    cache = [report[f"kv_cache_bytes_{name}"] for name in ("per_token", "fixed", "at_context")]
    if None in cache:
        yield "KV cache per token", f"unknown: its host, {report['host']}, shows none"
    else:
        states = f", and {cache[1]:,} whatever their number" if cache[1] else ""
        yield "KV cache per token", f"{cache[0]:,} bytes in bfloat16{states}"
        yield "", f"{cache[2]:,} bytes at context {report['context']:,}"
    yield weights_row(report)


def graft_layers(report: dict[str, Any]) -> str:
    kinds = [f"{count} {kind}" for kind, count in report["layer_types"].items()]
    text = f"{report['layers']}{': ' if kinds else ''}{', '.join(kinds)}"
    if report["num_attention_heads"]:
        text += f"; attention of {report['num_attention_heads']} heads"
    if report["num_key_value_heads"]:
        text += f", {report['num_key_value_heads']} for keys and values"
    return text


def origin_rows(report: dict[str, Any]):
    """Where a converted model came from."""
    said = report.get("provenance")
    if said:
        strategies = said.get("strategy", [])
        how = " ".join([said["method"], *([strategies] if isinstance(strategies, str) else strategies)])
        yield "made by", f"{how} of {said['source']}, a {said['model_type']}"


def table(report: dict[str, Any]):
    """The report as rows of a name and what there is to say."""
    published = report.get("published", {})
    yield report["model"], report.get("title", "")
    for number, source in enumerate(report.get("source", [])):
        yield "" if number else "source", source
    if report.get("differs"):
        yield "differs", report["differs"]
    yield from origin_rows(report)
    yield from parameter_rows(report, published)
    yield "layers", layers(report)
    yield "experts", experts(report)
    yield from flops_rows(report)
    yield from cache_rows(report, published.get("cache"))
    yield weights_row(report)


def parameter_rows(report: dict[str, Any], published: dict[str, Any]):
    total, active = report["total_params"], report["active_params"]
    yield "total parameters", f"{total:,} ({compact(total)})"
    yield from published_rows(published, report, "total")
    yield "active per token", f"{active:,} ({compact(active)}), {active / total:.1%}"
    if "measured_experts_per_tok" in report:
        mean, spread = report["measured_experts_per_tok"], report["measured_experts_per_tok_spread"]
        measured = report["measured_active_params"]
        yield (
            "as measured",
            f"{measured:,} ({compact(measured)}): {mean:.2f} experts a token, standard deviation {spread:.2f}",
        )
    yield from published_rows(published, report, "active")


def flops_rows(report: dict[str, Any]):
    flops, training = report["flops_per_token"], report["training_flops_per_token"]
    yield "FLOPs per token", f"{compact(flops)} forward, {compact(training)} training, context {report['context']:,}"


def weights_row(report: dict[str, Any]) -> tuple[str, str]:
    sizes = report["weight_bytes"].items()
    return "weights", ", ".join(f"{readable_bytes(size)} in {dtype}" for dtype, size in sizes)


def layers(report: dict[str, Any]) -> str:
    text = f"{report['layers']}, {report['attention_type']} attention of {report['num_attention_heads']} heads"
    if report["attention_type"] != "mla":
        text += f", {report['num_key_value_heads']} for keys and values"
    if report["sliding_layers"]:
        text += f", {report['sliding_layers']} layers within a window of {report['sliding_window']:,}"
    if report["chunked_layers"]:
        text += f", {report['chunked_layers']} layers within chunks of {report['attention_chunk_size']:,}"
    return text


def experts(report: dict[str, Any]) -> str:
    if not report["sparse_layers"]:
        return "none: a dense model"
    text = f"{report['num_experts_per_tok']} of {report['num_experts']}, each {report['moe_intermediate_size']} wide"
    if report["n_shared_experts"]:
        text += f", and {report['n_shared_experts']} shared"
    details = "".join(f", {name} {value}" for name, value in report["router_args"].items())
    return f"{text}, in {report['sparse_layers']} layers; router {report['router_type']}{details}"


def cache_rows(report: dict[str, Any], published: dict[str, Any] | None):
    size = report["kv_cache_bytes_per_token"]
    by_dtype = report["kv_cache_bytes_per_token_by_dtype"]
    yield "KV cache per token", ", ".join(f"{each:,} bytes in {dtype}" for dtype, each in by_dtype.items())
    if report["sliding_layers"] or report["chunked_layers"]:
        beyond = report["kv_cache_bytes_per_token_beyond_window"]
        what = "the window" if report["sliding_layers"] else "a chunk"
        yield "", f"{beyond:,} bytes in bfloat16 for each token beyond {what}"
    for name, other in report["kv_cache_alternatives"].items():
        yield "", f"{other:,} bytes in bfloat16 as {name}: {change(size, other)}"
    if published:
        other = 2 * published["elements_per_token"]
        yield "", f"{other:,} bytes in bfloat16 in {published['against']}: {change(size, other)}"
        reduced = 1 - size / other * published["bits"] / 16
        bits, saved = published["bits"], float(published["saved"])
        yield "", f"published: {saved:.1%} less, with this model's cache at {bits} bits; computed: {reduced:.1%}"


def change(size: int, other: int) -> str:
    if size == other:
        return "the same"
    return f"this is {1 - size / other:.1%} less" if size < other else f"this is {size / other:.3g} times as much"


def published_rows(published: dict[str, Any], report: dict[str, Any], figure: str):
    """What was published, this model counted by the same convention where that is another, and why they differ."""
    from hf_moe.sizes.presets import as_published

    if not published.get(figure):
        return
    text = f"published: {compact(published[figure])}"
    same = as_published(published, report, figure)
    if same != report[f"{figure}_params"]:
        counts = published["counts"] if figure == "active" else published.get("total_counts", "all")
        ways = [counts] if counts != "all" else []
        ways += ["with what is left out here"] if published.get("absent", {}).get(figure) else []
        text += f"; counted that way ({', '.join(ways)}) this is {compact(same)}"
    yield "", text
    if figure in published.get("mismatch", {}):
        yield "", published["mismatch"][figure]


def compact(number: float | str | None) -> str:
    """Three digits and a unit: 46.7B."""
    if number is None:
        return "-"
    number = float(number)
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def readable_bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def print_columns(rows: list[tuple[str, ...]]) -> None:
    """Columns as wide as their widest entry; the last takes what it needs."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]).rstrip())
