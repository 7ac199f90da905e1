"""Experts grafted onto every family of decoders without them: the same text, saved, loaded and trained."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hf_moe.conversion import upcycle
from hf_moe.conversion.files.graft_source import open_graft
from transformers import AutoModelForCausalLM

from hf_moe.model.configuration_hf_moe_graft import HfMoeGraftConfig
from hf_moe.model.modeling_hf_moe_graft import HfMoeGraftForCausalLM
from hf_moe.routers import find_routers
from tests.dense_families import FAMILIES, config_of, tiny

LEAST = 60  # families of Transformers 5.24


def test_there_are_as_many_as_are_promised():
    assert len(FAMILIES) >= LEAST


def padded_ids() -> dict[str, torch.Tensor]:
    """Two rows, the first padded on its left."""
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_copy_writes_what_the_dense_model_writes(model_type, tmp_path):
    dense, inputs = tiny(model_type), padded_ids()
    dense.save_pretrained(tmp_path / "dense")
    report = upcycle(tmp_path / "dense", tmp_path / "moe", experts=3, top_k=2, graft=True, progress=False)
    assert report["equal_at_step_0"] and report["max_abs_diff"] < 1e-5 and report["cached_text_equal"]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    assert isinstance(model, type(dense)) and isinstance(model, HfMoeGraftForCausalLM)
    kept = {name: x for name, x in model.state_dict().items() if name in dense.state_dict()}
    assert kept and all(torch.equal(x, dense.state_dict()[name]) for name, x in kept.items())
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, dense(**inputs).logits, atol=1e-4, rtol=1e-4)
        written = [x.generate(**inputs, max_new_tokens=5, do_sample=False) for x in (dense, model)]
    assert torch.equal(*written)

    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items())

    model.train()
    output = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100))
    aux_loss = output.router_losses["router_aux_loss_coef"]
    alone = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100))
    assert aux_loss.item() >= 1 - 1e-5 and torch.isfinite(alone.loss)
    aux_loss.backward()
    routers = find_routers(model)
    assert routers and all(x.module.weight.grad.any() for x in routers.values())


# Runs where hf_moe cannot be imported; prints the logits of each folder's model.
WITHOUT_HF_MOE = """
import json, sys
class Blocked:
    def find_spec(self, name, *args):
        if name.split(".")[0] == "hf_moe":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 12)[None]
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        print(json.dumps(model(input_ids=ids).logits[0].tolist()), flush=True)
"""


@pytest.mark.parametrize("part", range(4))
def test_loads_where_hf_moe_is_not_installed(part, tmp_path):
    names, expected = FAMILIES[part::4], []
    ids = torch.arange(3, 12)[None]
    for name in names:
        torch.manual_seed(0)
        config = HfMoeGraftConfig(backbone=config_of(name), num_experts=3, num_experts_per_tok=2)
        model = HfMoeGraftForCausalLM(config).eval()
        model.save_pretrained(tmp_path / name.replace(".", "_"))
        with torch.no_grad():
            expected.append(model(input_ids=ids).logits[0])
    folders = [str(tmp_path / name.replace(".", "_")) for name in names]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", WITHOUT_HF_MOE, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(names)
    for name, line, logits in zip(names, lines, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(json.loads(line)), logits, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("model_type", ["hrm_text", "olmo_hybrid"])
def test_what_the_files_hold_in_other_tensors_is_put_together_one_by_one(model_type, tmp_path, monkeypatch):
    dense = tiny(model_type).to(torch.bfloat16)
    dense.save_pretrained(tmp_path)

    def load(*args, **kwargs):
        raise AssertionError("the whole model was read")

    monkeypatch.setattr("hf_moe.conversion.files.file_backed.whole_model", load)
    source, state = open_graft(tmp_path), dense.state_dict()
    computed = [output for output in source.outputs().values() if output.held]
    assert computed and max(output.held for output in computed) < sum(x.nbytes for x in state.values()) / 4
    for name, output in source.outputs().items():
        assert output.shape == tuple(state[name].shape) and output.dtype == torch.bfloat16
        assert all(map(torch.equal, output.pieces(), [state[name]]))
