"""The lists of docs/models.md, of what experts can be grafted onto: `python -m tests.graft_table`.

tests/graft/test_families.py holds the families to what is promised of them, tests/graft/test_refused.py the others.
"""

from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .dense_families import FAMILIES, why_not
from .family_table import put

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
START, END = "<!-- grafts -->\n", "<!-- end of grafts -->\n"


def refused() -> dict[str, list[str]]:
    """Why not -> the families; those that have experts already are in docs/families.md."""
    reasons: dict[str, list[str]] = {}
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        why = why_not(name)
        if why is not None and why != "it has experts already":
            reasons.setdefault(why, []).append(f"`{name}`")
    return reasons


def lists() -> str:
    """Markdown: the families, then those that are none, by the reason."""
    lines = [f"{len(FAMILIES)} families: {', '.join(f'`{name}`' for name in sorted(FAMILIES))}.", ""]
    lines += [f"- {why}: {', '.join(names)}" for why, names in sorted(refused().items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    put(PAGE, START, END, lists())


if __name__ == "__main__":
    main()
