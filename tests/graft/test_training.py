"""Grafts train as hf_moe's own models do: losses, checkpointing, adapters, ESFT, the same numbers as the native."""

import json

import pytest
import torch
from datasets import Dataset
from hf_moe.conversion import upcycle
from hf_moe_cli import main
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_moe
from hf_moe.demo import DEMO_MODEL
from hf_moe.kernels.recomputation import Selective
from hf_moe.model.configuration_hf_moe_graft import HfMoeGraftConfig
from hf_moe.model.modeling_hf_moe_graft import HfMoeGraftForCausalLM
from tests import picture_families
from tests.conftest import tokens
from tests.dense_families import config_of, tiny
from tests.picture_families import PICTURES

LOSSES = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01, "seq_aux_loss_coef": 0.05}


def both(folder, **changes):
    """One Llama with the same experts: hf_moe's own architecture, and a graft."""
    tiny("llama", initializer_range=0.2).save_pretrained(folder / "dense")
    found = []
    for name, graft in (("native", False), ("graft", True)):
        upcycle(folder / "dense", folder / name, experts=4, top_k=2, graft=graft, progress=False, strategy="noise")
        found.append(AutoModelForCausalLM.from_pretrained(folder / name, **changes))
    return found


def batch(rows: int = 2) -> dict[str, torch.Tensor]:
    ids = tokens(rows, 11, 100)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def step(model):
    model.train()
    output = model(**batch())
    output.loss.backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return output, gradients


def test_losses_and_gradients_are_those_of_the_native_model(tmp_path):
    native, graft = both(tmp_path)
    for model in (native, graft):
        for name, value in LOSSES.items():
            setattr(model.config, name, value)
    (expected, theirs), (found, ours) = step(native), step(graft)
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.router_losses.keys() == expected.router_losses.keys() == LOSSES.keys()
    for name, value in expected.router_losses.items():
        torch.testing.assert_close(found.router_losses[name], value)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], value, atol=1e-6, rtol=1e-4) for name, value in theirs.items())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "qwen3_5_text"])
@pytest.mark.parametrize("selective", [False, True], ids=["full", "selective"])
def test_checkpointing_changes_no_gradient(model_type, selective):
    torch.manual_seed(0)
    # Capacity by the tokens that count: the repeated forward must know the same padding.
    config = HfMoeGraftConfig(
        backbone=config_of(model_type), num_experts=3, expert_capacity_factor=0.7, router_type="softmax_topk", **LOSSES
    )
    model = HfMoeGraftForCausalLM(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("dropout", "activation_dropout"):
        for module in model.modules():
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    _, expected = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if selective:
        Selective().begin(model)
    model.train()
    output = model(**batch())
    with torch.no_grad():
        model(input_ids=tokens(1, 5, 100))  # another text between forward and backward
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_reentrant_checkpointing_is_refused():
    model = HfMoeGraftForCausalLM(HfMoeGraftConfig(backbone=config_of("llama")))
    with pytest.raises(ValueError, match="use_reentrant=True would cut router_aux_loss_coef off"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def rows() -> Dataset:
    ids = tokens(8, 11, 100).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def trainer_of(model, folder, **changes) -> hf_moe.MoeTrainer:
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "use_cpu": True}
    arguments |= {"learning_rate": 1e-3, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    args = hf_moe.MoeTrainingArguments(str(folder), logging_steps=1, **arguments | changes)
    return hf_moe.MoeTrainer(model=model, args=args, train_dataset=rows())


def train(model, folder, **changes) -> list[float]:
    trainer = trainer_of(model, folder, **changes)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_gives_the_losses_of_the_native_model(tmp_path):
    native, graft = both(tmp_path)
    expected = train(native, tmp_path / "a", router_aux_loss_coef=0.1)
    found = train(graft, tmp_path / "b", router_aux_loss_coef=0.1)
    assert len(expected) == 4 and expected[-1] < expected[0]
    assert found == pytest.approx(expected, abs=1e-4)


def test_resumed_run_ends_bitwise_where_the_unbroken_one_ends(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 2}
    config = HfMoeGraftConfig(backbone=config_of("qwen3"), num_experts=3)
    torch.manual_seed(0)
    HfMoeGraftForCausalLM(config).save_pretrained(tmp_path / "start")

    def fresh():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "start")

    whole = fresh()
    train(whole, tmp_path / "out", **saves)
    again = fresh()
    trainer = trainer_of(again, tmp_path / "out", **saves)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    state = again.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in whole.state_dict().items())


LORA = ("--lora_parts", "attention", "routed_experts", "--lora_r=4")


@pytest.mark.parametrize("model_type", ["phi3", "gpt_neox", "gemma3_text", "llava", "mistral3"])
def test_stages_of_the_command(model_type, tmp_path, capsys):
    """SFT with an adapter on attention and experts, and ESFT, through `hf-moe train`: of a whole, on text alone."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    make = picture_families.tiny if model_type in PICTURES else tiny
    dense = make(model_type, vocab_size=len(tokenizer), max_position_embeddings=256)
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "preprocessor_config.json").write_text("{}")
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=4, top_k=2, graft=True, progress=False, strategy="noise")
    data = tmp_path / "chats.jsonl"
    with data.open("w", encoding="utf-8") as file:
        for n in range(8):
            turns = [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n} it is"}]
            file.write(json.dumps({"messages": turns}) + "\n")
    given = {"model_name_or_path": tmp_path / "moe", "train_data": data, "max_steps": 2, "save_strategy": "no"}
    words = [f"--{name}={value}" for name, value in given.items()] + ["--disable_tqdm=True"]
    for name, options in {"lora": LORA, "esft": ("--esft_p=0.5",)}.items():
        code = main(["train", "tiny/sft", *words, f"--output_dir={tmp_path / name}", *options])
        assert code == 0, capsys.readouterr().err[-2000:]
        assert (tmp_path / name / "README.md").is_file()
        assert (tmp_path / name / "preprocessor_config.json").is_file() == (model_type in PICTURES)
    adapter = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "moe")
    assert str(tmp_path) not in (tmp_path / "moe" / "config.json").read_text()
    adapted = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    decoder = next(name for name, x in dense.named_modules() if x is dense.get_decoder())
    assert adapted and all(f".{decoder}." in name for name in adapted)
