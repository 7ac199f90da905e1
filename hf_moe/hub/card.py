"""Model cards: what a saved folder says about itself, as a README.md for the Hub."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from . import tables
from .curves import curve_table, draw_curves
from .evaluations import evaluation_rows, held_out_results, lm_eval_results, merged
from .folder import INHERITED, MARKER, SavedModel, card_of, own_metadata, read_folder, routed_experts
from .routing_figures import read_trace

FIGURES = "figures"
CURVES = f"{FIGURES}/training_curves.png"
# Auto class -> (the Hub's name of its task, the architectures that it loads: hf_moe's own and Transformers').
AUTO_CLASSES = {
    "AutoModelForCausalLM": ("text-generation", {"HfMoeForCausalLM", *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}),
    "AutoModelForSequenceClassification": (
        "text-classification",
        {"HfMoeForSequenceClassification", *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()},
    ),
    "AutoModelForTokenClassification": (
        "token-classification",
        {"HfMoeForTokenClassification", *MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values()},
    ),
    "AutoModel": ("feature-extraction", {"HfMoeModel"}),
}
# Kind of folder, or method of conversion -> the template of its card.
TEMPLATES = {"adapter": "adapter", "expert_rows": "expert_rows"}
METHODS = {"upcycle": "upcycled", "import": "imported", "export": "exported"}
# The Hub's words for how a model follows from its base; it has none for a change of format.
RELATIONS = {"adapter": "adapter", "expert_rows": "adapter", "fine_tuned": "finetune", "merged": "merge"}
RELATIONS |= {"upcycled": "finetune"}
LIBRARIES = {"model": "transformers", "adapter": "peft", "expert_rows": "hf_moe"}
KIND_TAGS = {"adapter": "lora", "expert_rows": "esft"}


def write_model_card(
    folder: str | Path,
    *,
    name: str | None = None,
    provenance: dict[str, Any] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Iterable[str] = (),
    languages: Iterable[str] = (),
    tags: Iterable[str] = (),
    evaluations: Iterable[str | Path] = (),
    trace: str | Path | None = None,
) -> Path:
    """Write `folder`/README.md and its figures from what the folder says about its model, and return its path.

    folder: a saved model of any family, a LoRA adapter, or the expert rows of ESFT. name: what the model is called,
    and loaded by; the folder's own name by default. provenance: where a converted model came from, if its config has
    no place for it. base_model (a Hub id), license, datasets, languages and tags: what the folder cannot say.
    evaluations: results files of lm_eval. trace: a folder that `hf-moe trace` wrote for this model.

    What is not known is left out, and what an earlier card was told is kept. Raises FileNotFoundError where there is
    no saved model, ValueError for a damaged one, or where README.md was written by someone else, OSError of one line
    where the card cannot be written; then the last one stays.
    """
    folder = Path(folder)
    told = {
        "base_model": base_model,
        "license": license,
        "datasets": list(datasets),
        "language": list(languages),
        "tags": list(tags),
    }
    with tempfile.TemporaryDirectory() as aside:
        render_card(folder, Path(aside), name, provenance, told, list(evaluations), trace)
        install(Path(aside), folder)
    return folder / "README.md"


def render_card(
    folder: Path,
    aside: Path,
    name: str | None = None,
    provenance: dict[str, Any] | None = None,
    told: dict[str, Any] | None = None,
    evaluations: list[str | Path] = (),
    trace: str | Path | None = None,
) -> None:
    """Write the card of `folder` and its figures to `aside`; arguments and errors are those of write_model_card."""
    target = folder / "README.md"
    if target.exists() and MARKER not in target.read_text(encoding="utf-8"):
        raise ValueError(f"{target} was not written by hf-moe; move it away to have a model card written.")
    saved = read_folder(folder, provenance)
    name = name or folder.resolve().name
    template = template_of(saved)
    auto_class, task = task_of(saved)
    earlier = card_of(folder)
    own = own_metadata(folder)
    kept = (earlier.data.eval_results or []) if earlier is not None else []
    found = [*held_out_results(saved, task), *(x for path in evaluations for x in lm_eval_results(path, task))]
    results = merged(kept, found)
    routing = read_trace(saved, Path(trace), aside / FIGURES) if trace is not None else own.get("routing")
    keep = {"routing": routing}
    if provenance is not None and not saved.is_hf_moe:
        keep["provenance"] = provenance
    elif "provenance" in own:
        keep["provenance"] = own["provenance"]
    data = metadata(saved, template, name, task, told or {}, earlier, results, keep)
    titles, curve_rows = curve_table(saved.log_history)
    rendered = (
        environment()
        .get_template(f"{template}.md.jinja")
        .render(
            metadata=data.to_yaml(),
            name=name,
            saved=saved,
            base=data.base_model,
            curves=[titles, *curve_rows] if curve_rows else [],
            curve_picture=CURVES if draw_curves(saved.log_history, aside / CURVES) else None,
            routing=routing,
            evaluations=evaluation_rows(results),
            auto_class=auto_class,
            tables=tables,
            marker=MARKER,
        )
    )
    content = re.sub(r"\n{3,}", "\n\n", rendered).strip() + "\n"
    ModelCard(content)  # huggingface_hub's own check of the metadata, before anything is put in place
    (aside / "README.md").write_text(content, encoding="utf-8")


def install(aside: Path, folder: Path) -> None:
    """Put what lies in `aside` into `folder`, README.md last. Each file is there whole or not at all."""
    files = sorted((path for path in aside.rglob("*") if path.is_file()), key=lambda path: path.name == "README.md")
    for file in files:
        target = folder / file.relative_to(aside)
        partial = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, partial)
            os.replace(partial, target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"{target} could not be written: {error.strerror or error}.") from None


def environment() -> Environment:
    """Templates with blocks that they share. A name that a template misspells is an error, not an empty text."""
    loader = PackageLoader("hf_moe.model_cards", ".")
    return Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def template_of(saved: SavedModel) -> str:
    if saved.kind in TEMPLATES:
        return TEMPLATES[saved.kind]
    if saved.stages or saved.results:
        return "fine_tuned"
    if saved.provenance.get("siblings"):
        return "merged"
    return METHODS.get(saved.provenance.get("method"), "model")


def task_of(saved: SavedModel) -> tuple[str | None, str]:
    """The Auto class that loads the model, None where Transformers has none, and the Hub's name of its task."""
    if saved.kind != "model":
        return "AutoModelForCausalLM", "text-generation"
    architecture = (saved.config.architectures or [None])[0]
    for auto_class, (task, architectures) in AUTO_CLASSES.items():
        if architecture in architectures:
            return auto_class, task
    return None, "text-generation"


def base_models(saved: SavedModel, template: str) -> list[str]:
    """The Hub ids of what the model was made of: of the last stage of training that names one, or its origin's."""
    if saved.adapter.get("base_model_name_or_path") and is_hub_id(saved.adapter["base_model_name_or_path"]):
        return [saved.adapter["base_model_name_or_path"]]
    for stage in reversed(saved.stages):
        if stage.get("base_revision") is not None:
            return [stage["base_model"]]
    # A source with a revision came from the Hub, which knows a base model by its id; a local folder is none.
    origins = [saved.provenance, *saved.provenance.get("siblings", [])]
    return [origin["source"] for origin in origins if origin.get("revision") is not None]


def is_hub_id(name: str) -> bool:
    """Whether `name` can be the Hub's name of a model rather than a folder here."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def metadata(
    saved: SavedModel,
    template: str,
    name: str,
    task: str,
    told: dict[str, Any],
    earlier: ModelCard | None,
    results: list[EvalResult],
    keep: dict[str, Any],
) -> ModelCardData:
    """The card's YAML: what the user tells comes first, then what an earlier card was told, then what the folder says.

    Licence and language are those of the model that this one is made of, if its own card said so; so are the data
    sets, to which training adds its own.
    """
    first = saved.provenance.get("source_card", {})
    known = {name: value for stage in saved.stages for name, value in stage.get("source_card", {}).items()}
    known = first | known
    known["datasets"] = unique(known.get("datasets", []), *(stage.get("datasets", []) for stage in saved.stages))
    base = base_models(saved, template)
    known["base_model"] = base[0] if len(base) == 1 else base
    before = {} if earlier is None else earlier.data.to_dict()
    said = {key: told.get(key) or before.get(key) or known.get(key) or None for key in ("base_model", *INHERITED)}
    if told.get("license"):
        said["license_name"] = said["license_link"] = None  # of another licence
    keep = {key: value for key, value in keep.items() if value}
    family = saved.config.model_type if saved.config is not None else None
    method = saved.provenance.get("method")
    stages = [stage["stage"] for stage in saved.stages if "stage" in stage]
    sparse = saved.config is None or routed_experts(saved.config)[0] > 1
    derived = filter(None, [family, "mixture-of-experts" if sparse else None, method, KIND_TAGS.get(saved.kind)])
    return ModelCardData(
        **said,
        base_model_relation=RELATIONS.get(template) if said["base_model"] else None,
        library_name=LIBRARIES[saved.kind],
        pipeline_tag=task,
        tags=unique(derived, stages, told.get("tags", []), before.get("tags", [])),
        **({"model_name": name, "eval_results": results} if results else {}),
        **({"hf_moe": keep} if keep else {}),
    )


def unique(*lists: Iterable[str]) -> list[str]:
    """All that is in the lists, once each, in order; a bare string counts as a list of one."""
    return list(dict.fromkeys(x for part in lists for x in ([part] if isinstance(part, str) else part)))
