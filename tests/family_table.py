"""The table of docs/families.md, from what the tests of every family established: `python -m tests.family_table`.

What is not for a family stands in `NOT_FOR` (tests/families.py), which tests/test_families.py, tests/training,
tests/telemetry, tests/hub and tests/kernels hold to what happens.
"""

from pathlib import Path

from hf_moe.conversion.families import FAMILIES as CONVERTED
from hf_moe.training.balance.selection_bias import SelectionBias

from hf_moe.routers import find_routers

from .families import FAMILIES, NOT_FOR, tiny

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"
TITLES = {
    "esft": "ESFT",
    "lora": "LoRA on experts",
    "densemixer": "DenseMixer",
    "replay": "replay",
    "kernels": "kernels",
}
COLUMNS = {
    "bias": lambda name: bool(SelectionBias(find_routers(tiny(name))).biases),
    **{title: lambda name, what=what: name not in NOT_FOR[what] for what, title in TITLES.items()},
    "import, export": lambda name: name in CONVERTED,
}


def row(name: str) -> str:
    marks = ["yes" if has(name) else "" for has in COLUMNS.values()]
    return f"| `{name}` | {' | '.join(marks)} |"


def table() -> str:
    """Markdown, a row a family; and why some lack what others have."""
    head = f"| family | {' | '.join(COLUMNS)} |\n|---|{':---:|' * len(COLUMNS)}\n"
    rows = [row(name) for name in sorted(FAMILIES)]
    lacking = {}
    for what, names in NOT_FOR.items():
        for name, why in names.items():
            lacking.setdefault((name, why), []).append(TITLES[what])
    reasons = [f"- `{name}`: {why} ({', '.join(titles)})" for (name, why), titles in sorted(lacking.items())]
    return "\n".join([head + "\n".join(rows), "", *reasons, ""])


def put(page: Path, start: str, end: str, text: str) -> None:
    """Write the text between two marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def main() -> None:
    put(PAGE, START, END, table())


if __name__ == "__main__":
    main()
