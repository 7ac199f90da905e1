"""Links lead somewhere: each file and heading that a page names is there, and the site has every page."""

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.docs.conftest import DOCS, PAGES

ROOT = DOCS.parent
WITH_LINKS = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
    *(f"docs/{page}" for page in PAGES),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks/results").rglob("*.md")),
]
SITE = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@cache
def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchor(heading: str) -> str:
    """What repository browsers make of a heading: letters, digits and dashes; MkDocs makes the same of ours."""
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def anchors(path: Path) -> list[str]:
    return [anchor(heading) for heading in re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)]


@pytest.mark.parametrize("page", WITH_LINKS)
def test_its_links_lead_to_files_and_headings(page):
    path = ROOT / page
    targets = re.findall(r"\]\(([^)\s]+)", prose(path))
    assert len(targets) == prose(path).count("](")
    for target in targets:
        if re.match(r"https?://", target):
            continue
        file, _, heading = target.partition("#")
        found = path if not file else (path.parent / file).resolve()
        assert found.is_file() and found.is_relative_to(ROOT), (page, target)
        if heading:
            assert heading in anchors(found), (page, target)


@pytest.mark.parametrize("page", WITH_LINKS)
def test_its_headings_have_anchors_of_their_own(page):
    """Where two are alike, repository browsers and MkDocs number them in different ways."""
    found = anchors(ROOT / page)
    assert len(found) == len(set(found))
    assert not [heading for heading in found if "--" in heading], "MkDocs writes one dash"


def pages_of(entry) -> list[str]:
    """The files in a part of mkdocs.yml's nav."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry if isinstance(entry, list) else entry.values()) for page in pages_of(part)]


def test_the_site_has_every_page_once_and_the_readme():
    listed = pages_of(yaml.safe_load(SITE)["nav"])
    assert sorted(listed) == sorted([*PAGES, "about.md"])
    assert '"about.md" if path == "README.md"' in (DOCS / "hooks.py").read_text(encoding="utf-8")


def test_the_site_fetches_nothing_from_elsewhere():
    settings = yaml.safe_load(SITE)
    assert settings["theme"]["font"] is False
    assert "http" not in re.sub(r"#.*", "", SITE)
