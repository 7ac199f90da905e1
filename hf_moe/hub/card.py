"""Model cards: what a saved folder says about itself, as a README.md for the Hub."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, PackageLoader, StrictUndefined

from . import tables
from .curves import curve_table, draw_curves
from .evaluations import evaluation_rows, held_out_results, lm_eval_results, merged
from .folder import MARKER, card_of, own_metadata, read_folder
from .metadata import metadata, task_of, template_of
from .routing_figures import draw_loads, read_trace

FIGURES = "figures"
CURVES = f"{FIGURES}/training_curves.png"
LOADS = f"{FIGURES}/expert_load.png"


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
    evaluations: results files of lm_eval, or folders of them. trace: a folder that `hf-moe trace` wrote for this
    model.

    What is not known is left out, and what an earlier card was told is kept. Raises FileNotFoundError where there is
    no saved model, ValueError for a damaged one, for a base_model that is no Hub id, or where README.md was written by
    someone else, OSError of one line where the card cannot be written; then the last one stays.
    """
    folder = Path(folder)
    if base_model is not None:
        validate_repo_id(base_model)
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
            load_picture=LOADS if draw_loads(saved.provenance.get("load", {}), aside / LOADS) else None,
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
