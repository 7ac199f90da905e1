"""Facts as the rows of tables: a title and a value each. What is not known has no row."""

import re
from collections.abc import Iterable
from typing import Any

import torch

from ..model.balancing import expert_load
from ..routers import routed_experts
from .folder import SavedModel

# What is shown of a training run's results (train_results.json and eval_results.json).
RESULTS = {
    "train_samples": "Training examples",
    "epoch": "Epochs",
    "train_loss": "Training loss, mean over the run",
    "eval_loss_before": "Held-out loss before",
    "eval_loss": "Held-out loss after",
}
# What is shown of a comparison by `hf_moe.conversion.verify`.
CHECK = {
    "max_abs_diff": "Largest difference between two logits",
    "mean_abs_diff": "Mean difference",
    "kl": "KL divergence per token, nats",
    "top1_agreement": "Share of tokens with the same likeliest successor",
    "cache_max_abs_diff": "Largest difference between two logits with a cache and without",
    "perplexity_a": "Perplexity of the source",
    "perplexity_b": "Perplexity of this model",
    "tokens": "Tokens compared",
    "text": "Text",
    "warning": "Warning",
}
PROVENANCE = {
    "source": "Source",
    "model_type": "Source's model type",
    "revision": "Revision",
    "remote_code": "Its model's code, which is here, too",
    "method": "Method",
    "strategy": "Strategy",
    "seed": "Seed",
    "to": "Written as",
    "layout": "Layout of the experts",
    "hf_moe_version": "hf_moe version",
}
# Method of `hf_moe.conversion.reshape` -> what it made of the source.
RESHAPED = {
    "prune": "with fewer experts",
    "grow": "with several copies of its experts",
    "experts": "with experts added, taken out or exchanged",
}
WHEN = ("before", "after")  # a layer was pruned
# What is shown of each stage of training, as `hf_moe.training` writes it down.
STAGE = {
    "stage": "Stage",
    "base_model": "Started from",
    "base_revision": "Revision",
    "weights": "Weights",
    "configuration": "By the configuration of",
    "configuration_revision": "Revision",
    "lora_base": "Its weights, frozen, in",
    "train_data": "Training data",
    "eval_data": "Held-out data",
    "seed": "Seed",
    "hf_moe_version": "hf_moe version",
}
ADAPTER = {
    "base_model_name_or_path": "Base model",
    "revision": "Revision",
    "peft_type": "Kind",
    "r": "Rank",
    "lora_alpha": "Alpha",
    "lora_dropout": "Dropout",
    "target_modules": "Modules",
    "target_parameters": "Parameters",
}


def rows(facts: dict[str, Any], titles: dict[str, str]) -> list[tuple[str, str]]:
    """Table rows of the facts that have a title and a value."""
    return [(titles[name], text(facts[name])) for name in titles if facts.get(name) not in (None, [], "")]


def text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def origin_rows(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Where a converted model came from: a conversion's arguments and, where no revision on the Hub names its
    sources, their digests."""
    found = rows(provenance, PROVENANCE)
    found += [(f"`{name}`", f"`{value}`") for name, value in provenance.get("arguments", {}).items()]
    for origin in [provenance, *provenance.get("siblings", [])]:
        if origin.get("revision") is None:
            where = f" of {origin['source']}" if origin is not provenance else ""
            found += [(f"SHA-256 of {file}{where}", digest) for file, digest in origin.get("sha256", {}).items()]
    return found


def domain_rows(domains: list[dict[str, Any]]) -> list[list[str]]:
    """Each source of a merge beside the model, on the source's own text: a heading and a row each."""
    compared = ("perplexity_a", "perplexity_b", "kl")
    titles = {"source": "Source", "text": CHECK["text"]} | {name: CHECK[name] for name in compared}
    return [list(titles.values()), *([text(domain[name]) for name in titles] for domain in domains)]


def kept_rows(provenance: dict[str, Any]) -> list[list[str]]:
    """What a pruned model's layers kept and, where it was seen, how even the load was: a heading and a row each."""
    load = provenance.get("load", {})
    times = WHEN if load else ()
    found = [["Layer", "Experts", *(f"Busiest {when}" for when in times)]]
    for number, layer in numbered_layers(provenance["kept"]):
        loads = [f"{busiest(load[when][layer]):.3g}" if layer in load[when] else "" for when in times]
        experts = " ".join("+".join(map(str, numbers)) for numbers in provenance["kept"][layer])
        found.append([number, experts, *loads])
    return found


def score_rows(provenance: dict[str, Any]) -> list[list[str]]:
    """What each expert of a pruned model's source was worth, the most first, those that stay or lead bold: a heading
    and a row each."""
    found = [["Layer", "Expert: score"]]
    for number, layer in numbered_layers(provenance["scores"]):
        leads = {numbers[0] for numbers in provenance["kept"][layer]}
        scores = provenance["scores"][layer]
        ranked = sorted(range(len(scores)), key=lambda expert: -scores[expert])
        said = ((f"**{expert}**" if expert in leads else str(expert), scores[expert]) for expert in ranked)
        found.append([number, ", ".join(f"{expert}: {score:.4g}" for expert, score in said)])
    return found


def busiest(tokens: list[int]) -> float:
    """The largest load of an expert, 1 at balance."""
    return expert_load(torch.tensor(tokens).double()).max().item()


def numbered_layers(layers: Iterable[str]) -> list[tuple[str, str]]:
    """Names of layers in their order (a config's JSON has another), each behind what it is called: 3 for
    model.layers.3, MTP 0 for model.mtp_layers.0, a module for multi-token prediction."""
    found = [(*re.search(r"(mtp_)?layers\.(\d+)", layer).groups(""), layer) for layer in layers]
    found.sort(key=lambda x: (x[0], int(x[1])))
    return [(f"MTP {number}" if kind else number, layer) for kind, number, layer in found]


def architecture_rows(saved: SavedModel, total: int, active: int) -> list[tuple[str, str]]:
    """The model's shape, from what its config says."""
    config = saved.config.get_text_config()
    said = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    heads = ", ".join(
        f"{count}{words}" for count, words in zip(said.values(), ("", " for keys and values"), strict=True) if count
    )
    experts, top_k = routed_experts(config)
    per_token = f"{top_k} per token"
    if saved.measured_k:
        mean, spread = saved.measured_k
        per_token = f"{mean:.2f} per token as measured (standard deviation {spread:.2f}), {top_k} slots"
    width = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    layers = getattr(config, "num_hidden_layers", None)
    shared = getattr(config, "n_shared_experts", None)
    shared_width = getattr(config, "shared_expert_intermediate_size", None)
    sparse = experts > 1
    table = {
        "Parameters": f"{total:,}",
        "Active parameters per token": f"{active:,}" if sparse else None,
        "Layers": f"{layers}, {saved.sparse_layers} of them with experts" if sparse and layers else layers,
        "Hidden size": number(getattr(config, "hidden_size", None)),
        "Attention heads": heads or None,
        "Routed experts": f"{experts:,}, {per_token}" if sparse else None,
        "Expert width": number(width) if sparse else None,
        "Shared experts": f"{shared} of width {shared_width:,}" if shared and shared_width else shared or None,
        "Router": f"`{config.router_type}`" if saved.is_hf_moe else None,
        "Vocabulary": number(getattr(config, "vocab_size", None)),
        "Context length": number(getattr(config, "max_position_embeddings", None)),
        "Precision": str(config.dtype).removeprefix("torch.") if getattr(config, "dtype", None) else None,
    }
    return [(title, str(value)) for title, value in table.items() if value is not None]


def number(value: int | list[int] | None) -> str | None:
    """A count; of a list, one for each layer, the least and the most."""
    if isinstance(value, list):
        return f"{min(value):,} to {max(value):,}"
    return None if value is None else f"{value:,}"


def compact(count: int) -> str:
    """1234567 -> 1.23M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
