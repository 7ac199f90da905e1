"""Writing what was found: numbers.json, figures/*.png, and report.html, which needs nothing else."""

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..staging import staged
from .findings import Finding, findings

DIGITS = 6  # of the numbers in the JSON
FULL = (errno.ENOSPC, errno.EDQUOT)
TINTS = 8  # colours of experts in a passage; the number stands beside


@contextmanager
def writing(out: str | Path) -> Iterator[Callable[[dict], list[str]]]:
    """A function that writes the report, which takes the name `out` when the block ends well, or leaves nothing.

    Raises FileExistsError where `out` is neither new nor empty, OSError where the disk is full.
    """
    import matplotlib  # noqa: F401  (what is missing is to be said before the work, not after it)

    try:
        with staged(Path(out)) as folder:
            yield lambda numbers: write(folder, numbers)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(f"The disk that holds {out} is full; free some space or give another --out.") from error


def write(folder: Path, numbers: dict[str, Any]) -> list[str]:
    """All files into `folder`; returns the findings in words."""
    numbers = public(numbers)
    found = findings(numbers)
    numbers = numbers | {"findings": [str(finding) for finding in found]}
    (folder / "numbers.json").write_text(json.dumps(rounded(numbers), ensure_ascii=False), encoding="utf-8")
    panels = draw_all(folder / "figures", numbers)
    (folder / "report.html").write_text(render(numbers, found, panels), encoding="utf-8")
    return numbers["findings"]


def public(numbers: dict[str, Any]) -> dict[str, Any]:
    """The numbers with the names of files and folders of this machine in place of their paths, to be published."""
    return numbers | {
        "model": without_folders(numbers["model"]),
        "domains": [domain | {"source": without_folders(domain["source"])} for domain in numbers["domains"]],
        "saturation": [
            entry | {"checkpoint": without_folders(entry["checkpoint"])} for entry in numbers["saturation"]
        ],
    }


def without_folders(name: str) -> str:
    """The last part of a path on this machine; anything else, such as a Hub id, as it is."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_absolute() or name.startswith(".") or path.exists() else name


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value


def draw_all(folder: Path, numbers: dict[str, Any]) -> dict[str, list[dict]]:
    """Write every panel as a PNG; returns those of each section, as SVG, for the page."""
    from .figures import FIGURES, draw, png, svg

    folder.mkdir()
    panels = {}
    for name in FIGURES:
        panels[name] = []
        for title, figure in draw(name, numbers):
            file = "-".join([name, *title.split()])
            (folder / f"{file}.png").write_bytes(png(figure))
            wide = figure.get_figwidth() > 5
            panels[name].append({"title": title, "wide": wide, "svg": Markup(svg(figure, file))})
    return panels


def experts_per_token(layers: list[dict[str, Any]]) -> str:
    """How many experts the routers choose for a token, in words."""
    slots = sorted({layer["top_k"] for layer in layers})
    if all(layer["experts_per_token"]["mean"] == layer["top_k"] for layer in layers):
        return " or ".join(map(str, slots))
    mean, spread = (sum(layer["experts_per_token"][x] for layer in layers) / len(layers) for x in ("mean", "spread"))
    return f"{mean:.2f} on average (standard deviation {spread:.2f}, at most {' or '.join(map(str, slots))})"


def render(numbers: dict[str, Any], found: list[Finding], panels: dict[str, list[dict]]) -> str:
    """The page. Everything that comes from data is escaped, but for the figures, which are ours."""
    from .sections import LINE_END, SECTIONS

    sections = []
    for name, section in SECTIONS.items():
        if panels.get(name):
            said = [f"{finding.text} ({finding.sample})" for finding in found if finding.section == name]
            tables = list(section.tables(numbers))
            shown = {"name": name, "said": said, "panels": panels[name], "tables": tables}
            sections.append(section._asdict() | shown)
    middle = len(numbers["layers"]) // 2
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible_ends"] = lambda text: text.replace("\n", LINE_END)
    template = environment.from_string(resources.files(__package__).joinpath("report.html.jinja").read_text("utf-8"))
    return template.render(
        numbers=numbers,
        findings=found,
        sections=sections,
        middle=middle,
        tints=TINTS,
        layer_labels=[layer["label"] for layer in numbers["layers"]],
        experts=[layer["experts"] for layer in numbers["layers"]],
        experts_per_token=experts_per_token(numbers["layers"]),
        passages=numbers["passages"],
    )
