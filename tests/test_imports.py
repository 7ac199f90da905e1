"""Who imports whom: rooms stand in one order, arrows run down it, and no modules import each other in a circle.

Imports inside functions count. That a module's packages are imported with it, and what is imported by a name that is
put together (hf_moe's lazy names, a stage of training) or for type checkers alone, do not.
"""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "hf_moe": "hf_moe",
    "hf_moe.conversion": "conversion",
    "hf_moe.training": "training",
    "hf_moe.experiments": "experiments",
    "hf_moe_cli": "cli",
}
# From the top: a room imports its own modules and those of rooms below it. A module is in the longest name that fits.
ORDER = [
    "hf_moe_cli",
    "hf_moe.self_check",
    "hf_moe.experiments",
    "hf_moe.training",  # main, launch, and names of earlier releases
    "hf_moe.training.stages",
    "hf_moe.training.recipes",
    "hf_moe.training.trainers",
    "hf_moe.training.data",
    "hf_moe.training.output",
    "hf_moe.telemetry",
    "hf_moe.loading",
    "hf_moe.conversion",
    "hf_moe.conversion.upcycling",
    "hf_moe.conversion.files",
    "hf_moe.conversion.families",
    "hf_moe.conversion.options",
    "hf_moe",
    "hf_moe.hub",
    "hf_moe.sizes",
    "hf_moe.stored_loading",
    "hf_moe.training.weights",
    "hf_moe.training.balance",
    "hf_moe.training.host_trl",
    "hf_moe.training.host",
    "hf_moe.generation",
    "hf_moe.kernels",
    "hf_moe.stored_weights",
    "hf_moe.demo",
    "hf_moe.routers",
    "hf_moe.answers",
    "hf_moe.texts",
    "hf_moe.chat",
    "hf_moe.generation_settings",
    "hf_moe.same_tokens",
    "hf_moe.reading",
    "hf_moe.staging",
    "hf_moe.quiet",
    "hf_moe.version",
    "hf_moe.model",
]


def modules() -> dict[str, Path]:
    """Name -> file of every module that is installed."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in inside if part != "__init__")])] = path
    return found


MODULES = modules()


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(name: str) -> Iterator[str]:
    """Modules of the project that a module imports, at its top or in a function."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {id(part) for node in ast.walk(tree) if is_for_types(node) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                target = next((x for x in (f"{source}.{alias.name}", source) if x in MODULES), None)
                if target is not None and target != name:
                    yield target


ARROWS = {name: set(imported(name)) for name in MODULES}


def room(name: str) -> str:
    return max((x for x in ORDER if name == x or name.startswith(x + ".")), key=len)


def test_no_modules_import_each_other_in_a_circle():
    try:
        graphlib.TopologicalSorter(ARROWS).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_arrows_run_down_the_order():
    upwards = [
        f"{name} imports {target}"
        for name, targets in ARROWS.items()
        for target in sorted(targets)
        if ORDER.index(room(name)) > ORDER.index(room(target))
    ]
    assert not upwards, "\n".join(upwards)


def test_every_package_is_installed():
    """pyproject.toml names them one by one, since their folders stand beside each other; a checkout works without."""
    tomllib = pytest.importorskip("tomllib")
    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    packages = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in MODULES.items()}
    assert packages - set(named) == set()


def test_every_room_of_the_order_is_there():
    assert set(ORDER) == {room(name) for name in MODULES}
    assert len(ARROWS["hf_moe.training.stages.sft"]) > 5  # imports were read
