"""An adapter's folder is loaded as the model it makes of its base: its experts, its routes, its text."""

import json
import shutil

import pytest
import torch
from hf_moe.training.main import main
from safetensors.torch import load_file

from hf_moe.loading import check_model, load, load_model
from hf_moe.routers import captured, find_routers

from .models import hf_moe_biased
from .policies import BYTES, save_model

BIAS = "e_score_correction_bias"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_folder):
    """The folders of an adapter of attention and experts, beside which selection biases moved, and of its base."""
    folder = tmp_path_factory.mktemp("adapter")
    base = save_model(folder / "base", hf_moe_biased(**BYTES, router_bias_update_speed=0.05))
    given = {"model_name_or_path": base, "train_data": data_folder / "train.jsonl", "output_dir": folder / "out"}
    words = [f"--{key}={value}" for key, value in given.items()]
    words += ["--max_steps=3", "--save_strategy=no", "--disable_tqdm=true", "--learning_rate=1e-2"]
    main(["tiny/sft", *words, "--lora_parts", "attention", "routed_experts", "--lora_merge", "float32"])
    return folder / "out", base


def routes(model, ids) -> list[torch.Tensor]:
    with captured(find_routers(model), 2) as routings, torch.no_grad():
        model(ids)
    return [x.index_SK for x in routings.values()]


def test_it_is_the_merged_model(trained):
    adapter, base = trained
    model, tokenizer = load(adapter)
    merged, plain = load_model(adapter / "merged"), load_model(base)
    ids = torch.arange(3, 60).view(1, -1).to(model.device)
    with torch.no_grad():
        logits, expected, before = (x(ids).logits for x in (model, merged, plain))
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)  # W x + B A x, or (W + B A) x
    assert (expected - before).abs().max() > 0.1
    assert all(map(torch.equal, routes(model, ids), routes(merged, ids)))
    text = [x.generate(ids[:, :9], max_new_tokens=8, do_sample=False).tolist() for x in (model, merged)]
    assert text[0] == text[1] and tokenizer.eos_token == "</s>"


def test_selection_biases_come_along(trained):
    adapter, base = trained
    saved = load_file(adapter / "router_bias.safetensors")
    found = {name: x.cpu() for name, x in load_model(adapter).state_dict().items() if name.endswith(BIAS)}
    before = load_model(base).cpu().state_dict()
    assert found and all(torch.equal(x, saved[name]) and not torch.equal(x, before[name]) for name, x in found.items())


def test_another_library_s_adapter_has_no_biases_and_no_tokenizer(trained, tmp_path):
    """As PEFT itself saves one."""
    adapter, base = trained
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, tmp_path / name)
    model, tokenizer = load(tmp_path)
    plain, state = load_model(base).state_dict(), model.state_dict()
    assert all(torch.equal(state[name], x) for name, x in plain.items() if name.endswith(BIAS))
    assert tokenizer("a").input_ids == load(base)[1]("a").input_ids


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("/no/such/model", "is an adapter, and its base model does not load: /no/such/model is neither a folder nor"),
        (None, "does not say which model it adapts: give base_model_name_or_path"),
    ],
    ids=["absent", "unnamed"],
)
def test_a_base_that_is_not_there(base, message, tmp_path):
    config = {} if base is None else {"base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises((OSError, ValueError), match=message) as error:
        check_model(tmp_path)
    assert "\n" not in str(error.value)
