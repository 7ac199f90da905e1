"""No ten lines stand in two files, names, numbers and texts aside. Run as a script, it lists those that do.

Lines that say nothing by themselves do not count: comments, docstrings, imports, brackets, and elements of signatures
and listings, which are a name, a number or a text.
"""

import ast
import collections
import io
import keyword
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("hf_moe", "conversion", "training", "cli")
LINES = 10
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
STANDS_FOR = {tokenize.NAME: "name", tokenize.NUMBER: "number", tokenize.STRING: "text"}
BRACKETS = set("()[]{},:")
ELEMENT = {"name", "number", "text", "=", "|", ".", "*", "**", "None", "True", "False"} | BRACKETS


def unsaid(tree: ast.Module) -> set[int]:
    """Numbers of the lines of docstrings and imports."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def shapes(source: str) -> list[tuple[int, str]]:
    """Number and shape of each line that counts."""
    skipped, lines = unsaid(ast.parse(source)), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        number = token.start[0]
        if token.type not in SKIPPED and number not in skipped:
            kept = keyword.iskeyword(token.string)
            lines.setdefault(number, []).append(token.string if kept else STANDS_FOR.get(token.type, token.string))
    return [(number, " ".join(shape)) for number, shape in lines.items() if not is_element(shape)]


def is_element(shape: list[str]) -> bool:
    """Whether a line is one element of a listing or signature, or brackets alone."""
    return set(shape) <= BRACKETS or (set(shape) <= ELEMENT and shape[-1] == ",")


def copies(sources: dict[str, str]) -> list[list[tuple[str, int]]]:
    """The places, file and line, of each ten lines that stand in more than one file."""
    places = collections.defaultdict(list)
    for name, source in sources.items():
        lines = shapes(source)
        for first in range(len(lines) - LINES + 1):
            window = tuple(shape for _, shape in lines[first : first + LINES])
            places[window].append((name, lines[first][0]))
    return [found for found in places.values() if len({name for name, _ in found}) > 1]


def package() -> dict[str, str]:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def test_no_ten_lines_stand_in_two_files():
    assert copies(package()) == []


def test_a_copy_under_other_names_is_found():
    first = "".join(f"a{i} = f(b{i}) + {i}\n" for i in range(LINES))
    second = "import x\n" + "".join(f"other{i} = g(y) + 7\n" for i in range(LINES))
    assert copies({"first": first, "second": second}) == [[("first", 1), ("second", 2)]]
    assert copies({"first": first, "second": second.replace("+", "-", 1)}) == []


if __name__ == "__main__":
    for found in copies(package()):
        print(*(f"{name}:{line}" for name, line in found))
