"""What the site needs beside MkDocs' own: files outside docs/, formulas, diagrams, modules as they are installed.

A page links to the repository's files as a repository browser has it; here, they become part of the site. Formulas and
diagrams are drawn while it is built, so that a reader's browser fetches nothing from elsewhere.
"""

import posixpath
import re
import shutil
from html import unescape
from pathlib import Path

import mermaidx
from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
MODULES = ROOT / "build" / "site-modules"  # also in mkdocs.yml
PACKAGES = {"hf_moe": "hf_moe", "hf_moe.conversion": "conversion", "hf_moe.training": "training"}
LINK = re.compile(r"(\]\()([^)#\s:]+)(?=[)#\s])")  # relative: no scheme, and more than an anchor
FENCE = re.compile(r"^```(\w+)[ ]+(\S+)$", re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def diagram(source: str, *_, **__) -> str:
    """A ```mermaid block as SVG."""
    return f'<div class="diagram">{mermaidx.render(source).svg()}</div>'


def as_installed(folder: Path) -> None:
    """Copies the modules of hf_moe to where they are installed, for what reads their docstrings."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, source in PACKAGES.items():
        package = folder.joinpath(*name.split("."))
        for path in (ROOT / source).rglob("*.py"):
            copy = package / path.relative_to(ROOT / source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


@event_priority(100)  # before mkdocstrings looks for them
def on_config(config):
    as_installed(MODULES)
    fence = {"name": "mermaid", "class": "diagram", "format": diagram}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def in_site(path: str) -> str:
    """The place in the site of a file of the repository: what is in docs/ stands at the top, its README.md first."""
    return "about.md" if path == "README.md" else path.removeprefix("docs/")


def linked(path: str) -> dict[str, str]:
    """Relative links of a page of the repository -> the files that they mean."""
    text = (ROOT / path).read_text(encoding="utf-8")
    links = {link for _, link in LINK.findall(text)}
    files = {link: posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in links}
    return {link: file for link, file in files.items() if (ROOT / file).is_file()}


def on_files(files, config):
    """Adds every file that a page links to, and what those that are pages link to."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    while pages:
        for path in linked(pages.pop()).values():
            if files.get_file_from_path(in_site(path)) is None:
                files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
                if path.endswith(".md"):
                    pages.append(path)
    return files


def on_page_markdown(markdown, page, **_):
    """Links by their place in the site; a file that a fence names is its title, its other words are for the tests."""
    here = posixpath.relpath(page.file.abs_src_path, ROOT)
    moved = linked(here)

    def link(found: re.Match) -> str:
        target = moved.get(found[2])
        place = found[2] if target is None else posixpath.relpath(in_site(target), posixpath.dirname(in_site(here)))
        return found[1] + place

    def fence(found: re.Match) -> str:
        return f'```{found[1]} title="{found[2]}"' if "." in found[2] else f"```{found[1]}"

    return FENCE.sub(fence, LINK.sub(link, markdown))


def on_page_content(html, **_):
    """Formulas as MathML, which browsers draw themselves."""
    display = {"span": "inline", "div": "block"}
    return FORMULA.sub(lambda found: convert(unescape(found[2]), display=display[found[1]]), html)
