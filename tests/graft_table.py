"""The lists of docs/models.md, of what experts can be grafted onto: `python -m tests.graft_table`.

tests/graft/test_families.py and test_pictures.py hold the families to what is promised of them, test_refused.py the
others.
"""

from pathlib import Path

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from . import dense_families, picture_families
from .family_table import put

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"


# Mark of the page -> the families, the names that Transformers has, and why one of these is none.
LISTS = {
    "grafts": (dense_families.FAMILIES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, dense_families.why_not),
    "grafts with pictures": (
        picture_families.FAMILIES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        picture_families.why_not,
    ),
}


def lists(mark: str) -> str:
    """Markdown: the families, then those that are none, by the reason; docs/families.md has those with experts."""
    families, names, why_not = LISTS[mark]
    reasons: dict[str, list[str]] = {}
    for name in sorted(names):
        why = why_not(name)
        if why is not None and why != picture_families.SPARSE:
            reasons.setdefault(why, []).append(f"`{name}`")
    lines = [f"{len(families)} families: {', '.join(f'`{name}`' for name in sorted(families))}.", ""]
    lines += [f"- {why}: {', '.join(found)}" for why, found in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    for mark in LISTS:
        put(PAGE, f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n", lists(mark))


if __name__ == "__main__":
    main()
