"""Families whose tensors or fields differ further from ours: the same logits, and back again bit for bit."""

from pathlib import Path

import pytest
import torch
from hf_moe.conversion import export_checkpoint, import_checkpoint
from hf_moe.conversion.computation import computation
from hf_moe.conversion.families import FAMILIES
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe import HfMoeConfig
from tests.conftest import tokens
from tests.conversion.conftest import OTHER_CASES

SAVED = {"as released": {}, "as in memory": {"save_original_format": False}}
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("case", OTHER_CASES)
def test_there_and_back(case, saved, checkpoint, tmp_path):
    """Logits and greedy text of Transformers' class; the same tensors, and a config that is read as before."""
    family = OTHER_CASES[case][0]
    source = checkpoint(case, **SAVED[saved])
    report = import_checkpoint(source, tmp_path / "moe", max_shard_size="9KB", verify=False, progress=False)
    theirs, ours = load(source), load(tmp_path / "moe")
    ids = tokens(length=23, vocab_size=61)
    with torch.inference_mode():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(ours.generate(ids, **GREEDY), theirs.generate(ids, **GREEDY))
    assert report["total_params"] == ours.num_parameters() == theirs.num_parameters()

    layouts = list(FAMILIES[family].layouts)
    layout = layouts[0 if saved == "as released" else -1]
    export = export_checkpoint(
        tmp_path / "moe", tmp_path / "back", to=family, layout=layout, max_shard_size="9KB", progress=False
    )
    assert export["max_abs_diff"] <= 1e-5
    assert export["training_fields"] == {}
    written, read = weights_of(tmp_path / "back"), weights_of(source)
    assert written.keys() == read.keys()
    for name, weight in written.items():
        assert torch.equal(weight, read[name]), name
    first, second = (
        computation(HfMoeConfig(**FAMILIES[family].hf_moe_fields(AutoConfig.from_pretrained(folder))))
        for folder in (source, tmp_path / "back")
    )
    assert first == second
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "back")(ids).logits, expected)
