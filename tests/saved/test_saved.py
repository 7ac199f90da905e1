"""Folders that earlier releases wrote still load and compute what they did, with hf_moe installed and without."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_moe_cli import main
from transformers import AutoModelForCausalLM

import hf_moe
from hf_moe.hub import renew
from hf_moe.hub.checks import check_folder
from hf_moe.hub.renew import code_version, todays_code
from hf_moe.model.host import CACHE
from tests.saved.make import VARIANTS, make

FOLDERS = sorted(path.parent for path in Path(__file__).parent.glob("*/*/config.json"))

# Prints for each folder the logits, and the text with a cache and, where there are modules for it, drafted; or what
# went wrong.
WITHOUT_HF_MOE = """
import json, sys, traceback
class NoHfMoe:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_moe":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoHfMoe())
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
@torch.no_grad()
def read(folder):
    said = json.loads(Path(folder, "expected.json").read_text())
    ids = torch.tensor(said["ids"])
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    options["max_new_tokens"] = len(said["text"][0]) - ids.shape[1]
    texts = [model.generate(ids, **options)] + ([model.generate(ids, use_mtp=True, **options)] if said["mtp"] else [])
    return {"logits": model(ids).logits.tolist(), "texts": [text.tolist() for text in texts]}
found = {}
for folder in sys.argv[1:]:
    try:
        found[Path(folder).name] = read(folder)
    except Exception:
        found[Path(folder).name] = traceback.format_exc()
print(json.dumps(found))
"""


def name_of(folder: Path) -> str:
    return "-".join(folder.parts[-2:])


named = pytest.mark.parametrize("folder", FOLDERS, ids=name_of)


@pytest.fixture(scope="module")
def without_hf_moe(tmp_path_factory) -> dict[str, dict | str]:
    """What a process finds that cannot import hf_moe, of each folder."""
    cache = tmp_path_factory.mktemp("modules")
    folders = [cache / name_of(folder) for folder in FOLDERS]
    for folder, source in zip(folders, FOLDERS, strict=True):
        shutil.copytree(source, folder)
        if code_version(folder) == "0.1.0" and CACHE != "past_key_values":  # it decodes without its cache there
            renew(folder)
    env = {**os.environ, "HF_MODULES_CACHE": str(cache / "modules"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", WITHOUT_HF_MOE, *map(str, folders)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=cache)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def check(said: dict, folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    # Written on another machine: kernels add up in other orders.
    torch.testing.assert_close(torch.tensor(said["logits"]), torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-4)
    for text in said["texts"]:
        assert text == expected["text"]


@named
@pytest.mark.parametrize("trust_remote_code", [False, True])
@torch.no_grad()
def test_with_hf_moe(folder, trust_remote_code):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code).eval()
    assert type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    assert type(model).__module__.startswith("hf_moe.")
    expected = json.loads((folder / "expected.json").read_text())
    ids = torch.tensor(expected["ids"])
    options = {"do_sample": False, "max_new_tokens": len(expected["text"][0]) - ids.shape[1]}
    options["attention_mask"] = torch.ones_like(ids)
    texts = [model.generate(ids, **options)]
    if expected["mtp"]:
        texts.append(model.generate(ids, use_mtp=True, **options))
    check({"logits": model(ids).logits.tolist(), "texts": [text.tolist() for text in texts]}, folder)


@named
def test_without_hf_moe_as_it_is_or_renewed(folder, without_hf_moe):
    said = without_hf_moe[name_of(folder)]
    assert isinstance(said, dict), said
    check(said, folder)


def test_renewing_changes_the_code_alone(tmp_path, capsys):
    folder = shutil.copytree(FOLDERS[0], tmp_path / "model")
    (folder / "mine.py").write_text("# the user's own\n")
    (folder / "long_rope.py").unlink()  # as after an interruption
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".py"}
    with pytest.raises(ValueError, match=r"model code of hf_moe 0\.1\.0, older than this .*: hf-moe renew"):
        check_folder(folder)
    assert main(["renew", str(folder)]) == 0
    assert f"0.1.0 -> {hf_moe.__version__}" in capsys.readouterr().out
    code = todays_code()
    assert {path.name for path in folder.glob("*.py")} == {*code, "mine.py"}
    assert all((folder / name).read_bytes() == text for name, text in code.items())
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".py"} == kept
    check_folder(folder)
    assert renew(folder)["written"] == []
    assert main(["renew", str(folder)]) == 0
    assert "has today's code" in capsys.readouterr().out


def test_what_is_not_hf_moes_is_not_renewed(tmp_path, capsys):
    assert main(["renew", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert main(["renew", str(tmp_path)]) == 2
    assert "'llama', whose code is not hf_moe's" in capsys.readouterr().err


def test_this_release_has_its_folders_and_code_says_its_release(tmp_path):
    assert [path.name for path in FOLDERS if path.parent.name == hf_moe.__version__] == sorted(VARIANTS)
    make(tmp_path / "latent", VARIANTS["latent"])
    assert code_version(tmp_path / "latent") == hf_moe.__version__
