"""`stage: distil` beside the loss and the gradient of one large batch, computed without any trainer."""

import copy

import pytest
import torch
from datasets import Dataset
from hf_moe.conversion import prune
from hf_moe.training.main import main
from hf_moe.training.stages.distil import MoeDistilConfig, MoeDistilTrainer, softened_kl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .balance_worker import Gradient
from .conftest import tiny_hf_moe, tiny_olmoe, tiny_tokenizer

TEXTS = ["red red", "green", "blue blue blue blue", "red green blue", "b", "blue green", "green red green", "red"]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_softened_kl(temperature):
    student, teacher = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    expected = [sum(p[n, i] * (p[n, i] / q[n, i]).log() for i in range(7)) * temperature**2 for n in range(5)]
    torch.testing.assert_close(softened_kl(student, teacher, temperature), torch.stack(expected))


def train(tmp_path, accumulation: int, **changes):
    """The gradient of one step over all texts, and the trainer."""
    arguments = {"max_steps": 1, "per_device_train_batch_size": len(TEXTS) // accumulation, "max_grad_norm": 0.0}
    arguments |= {"gradient_accumulation_steps": accumulation, "use_cpu": True, "bf16": False, "report_to": "none"}
    arguments |= {"save_strategy": "no", "logging_steps": 1, "temperature": 2.0, "kl_weight": 0.3}
    arguments |= {"router_aux_loss_coef": 0.0}
    rows, gradient = Dataset.from_list([{"text": text} for text in TEXTS]), Gradient()
    trainer = MoeDistilTrainer(
        model=tiny_hf_moe(),
        teacher=tiny_olmoe(seed=3),
        args=MoeDistilConfig(output_dir=str(tmp_path), **arguments | changes),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
        callbacks=[gradient],
    )
    trainer.train()
    return gradient.value, trainer


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradient_is_that_of_one_large_batch(tmp_path, accumulation):
    model, teacher, tokenizer = tiny_hf_moe().train(), tiny_olmoe(seed=3).eval(), tiny_tokenizer()
    total = count = kl = cross_entropy = 0
    for text in TEXTS:
        ids = tokenizer(text + tokenizer.eos_token, return_tensors="pt").input_ids
        logits, target = model(ids).logits[0, :-1], ids[0, 1:]
        with torch.no_grad():
            wanted = teacher(ids).logits[0, :-1]
        kl += softened_kl(logits, wanted, 2.0).sum()
        cross_entropy += torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        count += len(target)
    total = (0.3 * kl + 0.7 * cross_entropy) / count
    total.backward()

    gradient, trainer = train(tmp_path, accumulation)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-3, atol=1e-5)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(total.item(), rel=1e-4)
    assert logged["kl"] > 0 and logged["cross_entropy"] > 0 and "router_load_max" in logged
    before = trainer.evaluate()["eval_loss"]
    assert before < total.item()


def test_balance_losses_and_a_frozen_teacher(tmp_path):
    _, trainer = train(tmp_path, 2, max_steps=3, router_aux_loss_coef=0.1, learning_rate=1e-2)
    assert "aux_loss" in trainer.state.log_history[0]
    untouched = tiny_olmoe(seed=3).state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in trainer.teacher.state_dict().items())
    assert not trainer.teacher.training and not any(x.requires_grad for x in trainer.teacher.parameters())


@pytest.fixture
def command(model_folder, data_folder, tmp_path):
    def arguments(*extra, teacher=model_folder):
        places = {"--model_name_or_path": model_folder, "--train_data": data_folder, "--output_dir": tmp_path / "out"}
        places |= {"--teacher_model_name_or_path": teacher} if teacher else {}
        return ["tiny/distil", *(str(word) for pair in places.items() for word in pair), *extra]

    return arguments


def other_teacher(folder):
    """One whose tokenizer knows one more word."""
    other = copy.deepcopy(tiny_tokenizer())
    other.add_tokens(["purple"])
    tiny_hf_moe().save_pretrained(folder)
    other.save_pretrained(folder)
    return folder


def test_refusals(command, model_folder, tmp_path):
    def refused(message, *extra, **places):
        with pytest.raises(ValueError, match=message) as error:
            main(command(*extra, **places))
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    refused(
        r"token 259 is 'purple' in teacher .*other, None in the model: the teacher has another tokenizer",
        teacher=other_teacher(tmp_path / "other"),
    )
    refused("give --teacher_model_name_or_path", teacher=None)
    with pytest.raises(FileNotFoundError, match=r"^teacher_model_name_or_path: there is no folder ./absent"):
        main(command(teacher="./absent"))
    refused("temperature is 0.0; it must be above 0", "--temperature", "0")
    refused("it must be above 0, and at most 10000", "--temperature", "1e300")
    refused("kl_weight is 1.5", "--kl_weight", "1.5")
    refused("label_smoothing_factor is 0.1", "--label_smoothing_factor", "0.1")


def test_revision_of_the_model_is_not_that_of_its_teacher(command, model_folder, tmp_path, monkeypatch):
    asked, load = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *args, revision, **kwargs: asked.append(revision) or load(*args)
    )
    with pytest.raises(ValueError, match="another tokenizer"):
        main(command("--model_revision", "v2", teacher=other_teacher(tmp_path / "other")))
    assert asked == ["v2", "main"]


@pytest.fixture
def pruned(tmp_path):
    """The arguments by which a tiny OLMoE with fewer experts learns from the one that it was, and both folders."""
    parent, folder = tmp_path / "parent", tmp_path / "pruned"
    tiny_olmoe().save_pretrained(parent)
    tiny_tokenizer().save_pretrained(parent)
    prune(parent, folder, experts=3, by="random", verify=False, progress=False)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    given = {"model_name_or_path": folder, "teacher_model_name_or_path": parent, "train_data": tmp_path / "rows.jsonl"}
    given |= {"assistant_only_loss": "false", "use_cpu": "true", "bf16": "false", "teacher_dtype": "float32"}
    given |= {"max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "save_steps": 1}
    given |= {
        "gradient_accumulation_steps": 1,
        "trainable": "all",
        "lora_r": 2,
        "lora_merge": "float32",
        "learning_rate": "1e-2",
        "warmup_steps": 0,
    }
    words = [f"--{name}={value}" for name, value in given.items()]
    return ["olmoe-1b-7b/distil", *words, "--lora_parts", "routed_experts"], folder, parent


def test_an_adapter_recovers_a_pruned_model_from_its_parent(pruned, tmp_path):
    words, folder, parent = pruned
    rows = tmp_path / "rows.jsonl"
    metrics = main([*words, f"--output_dir={tmp_path / 'out'}", f"--eval_data={rows}"])
    student, teacher = (AutoModelForCausalLM.from_pretrained(x).eval() for x in (folder, parent))
    tokenizer, total, count = tiny_tokenizer(), 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text + tokenizer.eos_token, return_tensors="pt").input_ids
        with torch.no_grad():
            logits, wanted = (model(ids).logits[0, :-1] for model in (student, teacher))
        total += 0.5 * softened_kl(logits, wanted, 1.0).sum() + 0.5 * torch.nn.functional.cross_entropy(
            logits, ids[0, 1:], reduction="sum"
        )
        count += len(ids[0]) - 1
    assert metrics["eval_loss_before"] == pytest.approx((total / count).item(), rel=1e-4)
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").state_dict()
    changed = {name for name, x in student.state_dict().items() if not torch.equal(merged[name], x)}
    assert changed == {name for name in merged if ".experts." in name}

    resumed = [*words, f"--output_dir={tmp_path / 'resumed'}"]
    main([*resumed, f"--resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-1'}"])
    whole, again = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("out", "resumed"))
    assert whole.keys() == again.keys() and all(torch.equal(x, again[name]) for name, x in whole.items())


def test_an_adapter_beside_trained_weights_is_refused(pruned, tmp_path):
    words, *_ = pruned
    with pytest.raises(ValueError, match=r"trainable is moe_only and lora_parts .* or give --trainable all") as error:
        main([*words, f"--output_dir={tmp_path / 'out'}", "--trainable", "moe_only"])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
