"""The scripts in benchmarks/, which find those beside them."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def run(name: str, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> dict:
    """What the script reports, and the code that it exits with."""
    script = load(name, monkeypatch)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", str(out), *arguments])
    with pytest.raises(SystemExit) as ended:
        script.main()
    return json.loads(out.read_text()) | {"exit_code": ended.value.code}
