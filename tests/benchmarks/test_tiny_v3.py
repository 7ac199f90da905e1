"""The script runs from stories to table: two steps on a few sentences."""

import importlib.util
import json
import sys
from pathlib import Path

from hf_moe.demo import DEMO_MODEL

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "tiny_v3.py"


def test_from_stories_to_table(tmp_path, monkeypatch):
    story = "Once upon a time a small fox met a big bear, and they told each other stories until the sun went down."
    for name, count in (("train", 9), ("val", 3)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": story}) + "\n") * count)
    spec = importlib.util.spec_from_file_location("tiny_v3", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sizes = {"steps": 2, "batch": 4, "length": 16, "hidden": 32, "layers": 2, "prompts": 2, "prompt": 8}
    words = [f"--{name}={value}" for name, value in sizes.items()]
    folders = ["--stories", str(tmp_path), "--tokenizer", str(DEMO_MODEL), "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["tiny_v3.py", *folders, *words, "--new-tokens=5"])
    script.main()
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["training"]["steps"] == 2
    assert report["speculation"]["identical"] == report["speculation"]["prompts"] == 2
    assert [x["router"] for x in report["routers"]] == ["layers.1", "mtp_layers.0.block"]
    lines = (tmp_path / "out.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| held-out |")]) == 1
