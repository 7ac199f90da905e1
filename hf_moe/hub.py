"""Model cards: what a saved folder says about itself, as a README.md for the Hub."""

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from .model.configuration_hf_moe import HfMoeConfig

MARKER = "<!-- Written by `hf-moe card`; without this line the file is yours and stays as it is. -->"

# Architecture -> (the Auto class that loads it, the Hub's name of its task).
TASKS = {
    "HfMoeForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "HfMoeForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "HfMoeForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "HfMoeModel": ("AutoModel", "feature-extraction"),
}


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
    "perplexity_a": "Perplexity of the source",
    "perplexity_b": "Perplexity of this model",
    "tokens": "Tokens compared",
}
PROVENANCE = {
    "source": "Source",
    "model_type": "Source's model type",
    "revision": "Revision",
    "method": "Method",
    "strategy": "Strategy",
    "seed": "Seed",
    "to": "Written as",
    "layout": "Layout of the experts",
    "hf_moe_version": "hf_moe version",
}


def write_model_card(folder: str | Path) -> Path:
    """Write `folder`/README.md from its config, weights and training results, and return its path.

    What is not known is left out. Raises FileNotFoundError where there is no saved model and ValueError where it isn't
    an hf_moe one, or where README.md was written by someone else.
    """
    folder = Path(folder)
    config = _read_config(folder)
    total, active = count_parameters(folder, config)
    auto_class, task = TASKS[config.architectures[0]]
    return write_card(
        folder,
        config,
        name=folder.resolve().name,
        total=total,
        active=active,
        provenance=config.provenance or {},
        auto_class=auto_class,
        task=task,
    )


def write_card(
    folder: Path,
    config: HfMoeConfig,
    *,
    name: str,
    total: int,
    active: int,
    provenance: dict[str, Any],
    auto_class: str | None,
    task: str = "text-generation",
    family: str = HfMoeConfig.model_type,
) -> Path:
    """Write `folder`/README.md for a model that computes what `config` says, stored as one of `family`.

    auto_class: what loads it, None if Transformers has no class for the family.
    """
    target = folder / "README.md"
    if target.exists() and MARKER not in target.read_text(encoding="utf-8"):
        raise ValueError(f"{target} was not written by hf-moe; move it away to have a model card written.")
    template = resources.files("hf_moe.model_cards").joinpath("model.md.jinja").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        _metadata(provenance, task, family),
        template_str=template,
        name=name,
        family=family,
        total=_compact(total),
        active=_compact(active),
        architecture=_architecture(config, total, active),
        provenance=[*_rows(provenance, PROVENANCE), *_details(provenance)],
        check=_rows(provenance.get("check") or {}, CHECK),
        training=_rows(_training_results(folder), RESULTS),
        auto_class=auto_class,
        remote_code=family == HfMoeConfig.model_type,
        marker=MARKER,
    )
    partial = target.with_name(".README.md.partial")
    partial.write_text(str(card).rstrip() + "\n", encoding="utf-8")
    os.replace(partial, target)
    return target


def count_parameters(folder: Path, config: HfMoeConfig) -> tuple[int, int]:
    """Total parameters in the folder's safetensors files, and how many of them one token meets.

    Of a layer's routed experts a token meets `num_experts_per_tok`. Only the files' headers are read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file; a model card needs a saved model.")
    total = routed = 0
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a dict: it has no __iter__)
                size = 1
                for length in weights.get_slice(name).get_shape():
                    size *= length
                total += size
                routed += size if ".mlp.experts." in name else 0
    return total, total - routed + routed * config.num_experts_per_tok // config.num_experts


def _read_config(folder: Path) -> HfMoeConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; a model card needs a saved model.")
    model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    if model_type != HfMoeConfig.model_type:
        raise ValueError(f"{file} says model_type {model_type!r}; model cards are written for 'hf_moe' models.")
    return HfMoeConfig.from_pretrained(folder)


def _metadata(provenance: dict[str, Any], task: str, family: str) -> ModelCardData:
    # A source with a revision came from the Hub, which knows a base model by its id; a local folder is none.
    on_hub = provenance.get("revision") is not None
    return ModelCardData(
        base_model=provenance["source"] if on_hub else None,
        # The Hub's words for the relation have none for a change of format.
        base_model_relation="finetune" if on_hub and provenance["method"] == "upcycle" else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=[family, "mixture-of-experts", *([provenance["method"]] if "method" in provenance else [])],
    )


def _architecture(config: HfMoeConfig, total: int, active: int) -> list[tuple[str, str]]:
    sparse = config.mlp_layer_types.count("sparse")
    rows = [
        ("Parameters", f"{total:,}"),
        ("Active parameters per token", f"{active:,}"),
        ("Layers", f"{config.num_hidden_layers}, {sparse} of them with experts"),
        ("Hidden size", f"{config.hidden_size:,}"),
        ("Attention heads", f"{config.num_attention_heads}, {config.num_key_value_heads} for keys and values"),
        ("Routed experts", f"{config.num_experts}, {config.num_experts_per_tok} per token"),
        ("Expert width", f"{config.moe_intermediate_size:,}"),
        ("Router", f"`{config.router_type}`"),
        ("Vocabulary", f"{config.vocab_size:,}"),
        ("Context length", f"{config.max_position_embeddings:,}"),
    ]
    if config.n_shared_experts:
        shared = f"{config.n_shared_experts} of width {config.shared_expert_intermediate_size:,}"
        rows.insert(7, ("Shared experts", shared))
    if config.dtype is not None:
        rows.append(("Precision", str(config.dtype).removeprefix("torch.")))
    return rows


def _training_results(folder: Path) -> dict[str, Any]:
    results = {}
    for file in (folder / "train_results.json", folder / "eval_results.json"):
        if file.is_file():
            results |= json.loads(file.read_text(encoding="utf-8"))
    return results


def _rows(facts: dict[str, Any], titles: dict[str, str]) -> list[tuple[str, str]]:
    """Table rows of the facts that have a title and a value."""
    known = {name: facts[name] for name in titles if facts.get(name) is not None}
    return [
        (titles[name], f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in known.items()
    ]


def _details(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Table rows of a conversion's arguments and, where no revision on the Hub names its sources, their digests."""
    rows = [(f"`{name}`", f"`{value}`") for name, value in provenance.get("arguments", {}).items()]
    for origin in [provenance, *provenance.get("siblings", [])]:
        if origin.get("revision") is None:
            where = f" of {origin['source']}" if origin is not provenance else ""
            rows += [(f"SHA-256 of {file}{where}", digest) for file, digest in origin.get("sha256", {}).items()]
    return rows


def _compact(count: int) -> str:
    """1234567 -> 1.23M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
