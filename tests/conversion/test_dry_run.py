"""What a plan foretells: parameters, arithmetic, disk, and the memory that the conversion is then seen to take."""

import json
import subprocess
import sys

import pytest
import torch
from hf_moe.conversion import export_checkpoint, import_checkpoint, upcycle
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_moe.sizes.counts import sizes

MEASURE = """
import json, sys, threading, time
from pathlib import Path
from hf_moe.conversion import upcycle

arguments = json.loads(sys.argv[1])
if arguments["verify"]:  # what the libraries need the first time is none of the models'
    upcycle(**arguments | {"src": arguments["src"] + "-tiny", "dst": arguments["dst"] + "-tiny"}, progress=False)
plan = upcycle(**arguments, dry_run=True)
peak, running = 0, True

def watch():
    global peak
    while running:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
upcycle(**arguments, progress=False)
running = False
thread.join()
print(json.dumps({"plan": plan, "peak": peak}))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Matrices of 8 MB, and beside them a model with none."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    for name, width in [("dense", 8192), ("dense-tiny", 64)]:
        config = LlamaConfig(
            vocab_size=300,
            hidden_size=512,
            intermediate_size=width,
            num_hidden_layers=2,
            num_attention_heads=8,
            max_position_embeddings=64,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
    return folder


CASES = {
    "copy": ({"strategy": "copy", "verify": False}, "peak_memory_bytes"),
    "drop": ({"strategy": "drop", "verify": False}, "peak_memory_bytes"),
    "verify": ({"strategy": "copy", "verify": True}, "verify_memory_bytes"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("options", "foretold"), CASES.values(), ids=CASES)
def test_memory_is_what_was_foretold(options, foretold, wide, tmp_path):
    arguments = {"src": str(wide / "dense"), "dst": str(tmp_path / "moe"), "experts": 4, "top_k": 2, **options}
    run = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout.splitlines()[-1])
    print(said["plan"][foretold] / 1e6, said["peak"] / 1e6)
    assert said["peak"] == pytest.approx(said["plan"][foretold], rel=0.2)
    assert options["verify"] or said["plan"][foretold] < 5.5e8  # most of it torch, whose CUDA builds are larger


@pytest.mark.parametrize("function", ["upcycle", "import", "export"])
def test_every_conversion_foretells_its_costs(function, checkpoint, tmp_path):
    moe = tmp_path / "moe"
    if function == "upcycle":
        convert, arguments = upcycle, {"src": checkpoint("llama"), "experts": 5, "top_k": 2}
    elif function == "import":
        convert, arguments = import_checkpoint, {"src": checkpoint("qwen2_moe")}
    else:
        upcycle(checkpoint("llama"), moe, experts=5, top_k=2, verify=False, progress=False)
        convert, arguments = export_checkpoint, {"src": moe, "to": "mixtral"}
    plan = convert(**arguments, dst=tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    report = convert(**arguments, dst=tmp_path / "out", verify=False, progress=False)
    json.dumps(plan)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert plan["disk_bytes"] == report["disk_bytes"] == written
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plan["total_params"] == model.num_parameters()
    said = sizes(AutoModelForCausalLM.from_pretrained(moe if function == "export" else tmp_path / "out").config)
    for name in ("total_params", "active_params", "flops_per_token", "context"):
        assert plan[name] == report[name] == said[name]


def test_a_comparison_that_does_not_fit_the_memory_is_refused_before_anything_is_written(
    checkpoint, tmp_path, monkeypatch
):
    import psutil

    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    options = {"experts": 2, "top_k": 1, "progress": False}
    with pytest.raises(ValueError, match=r"takes 0\.00 GB of memory, 0\.00 GB are free.*--no-verify"):
        upcycle(checkpoint("llama"), tmp_path / "moe", **options)
    assert list(tmp_path.iterdir()) == []
    upcycle(checkpoint("llama"), tmp_path / "moe", verify=False, **options)
