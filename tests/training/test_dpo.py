"""DPO: its gradient beside the formula's, with and without a balance loss; reference, adapters, groups, resuming."""

import pytest
import torch
from datasets import Dataset
from hf_moe.training.main import main
from hf_moe.training.weights.groups import part_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_moe import MoeDPOConfig, MoeDPOTrainer
from hf_moe.routers import captured, find_routers

from .balance_worker import Gradient, difference, slow_losses
from .conftest import swapped, tiny_tokenizer, write_rows
from .models import hf_moe, olmoe
from .policies import BALANCED, BYTES, pairs, run_tiny, save_model

OTHERS = {name: value for name, value in BALANCED.items() if name != "router_bias_update_speed"}
MODELS = {
    "hf_moe": lambda seed: hf_moe(seed, **BYTES, **OTHERS),
    "olmoe": lambda seed: olmoe(seed, **BYTES, router_aux_loss_coef=0.5, output_router_logits=True),
}


def logp(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of one answer, without padding."""
    logits = model(torch.tensor([prompt + answer]), output_router_logits=False).logits[0]
    scores = logits.log_softmax(-1)
    return sum(scores[len(prompt) - 1 + i, token] for i, token in enumerate(answer))


def expected_gradient(model, reference, rows: list[dict], beta: float, coefficients: dict) -> dict[str, torch.Tensor]:
    """Of DPO (https://arxiv.org/abs/2305.18290, eq. 7) and of balance losses over all texts."""
    loss = 0
    for row in rows:
        texts = row["chosen_ids"], row["rejected_ids"]
        chosen, rejected = (logp(model, row["prompt_ids"], x) - logp(reference, row["prompt_ids"], x) for x in texts)
        loss = loss - torch.nn.functional.logsigmoid(beta * (chosen - rejected)) / len(rows)
    if coefficients:
        texts = [row["prompt_ids"] + row[name] for row in rows for name in ("chosen_ids", "rejected_ids")]
        ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, texts)), batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(x)).long() for x in texts], batch_first=True)
        with captured(find_routers(model), 2) as routings:
            model(ids, attention_mask=mask, output_router_logits=False)
        shape = (*ids.shape, -1)
        layers = [
            slow_losses(x.logits_TE.view(shape), x.index_SK.view(shape), mask, sigmoid=False, groups=3, reached=2)
            for x in routings.values()
        ]
        loss = loss + sum(c * sum(x[name] for x in layers) / len(layers) for name, c in coefficients.items())
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize(
    ("name", "coefficients", "arguments"),
    [
        ("hf_moe", {}, {"gradient_accumulation_steps": 2}),
        ("olmoe", {}, {"pad_to_multiple_of": 32}),
        ("hf_moe", {"router_aux_loss_coef": 3.0}, {"gradient_accumulation_steps": 2}),
        ("hf_moe", {"router_aux_loss_coef": 3.0}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
        ("hf_moe", {"router_aux_loss_coef": 3.0, "router_z_loss_coef": 0.3}, {"pad_to_multiple_of": 32}),
    ],
    ids=["off", "off-olmoe", "on-accumulated", "on-checkpointed", "on-padded"],
)
def test_gradient_is_that_of_preferences_and_of_what_was_asked_for(name, coefficients, arguments, tmp_path):
    """Whatever the configuration says; chosen and rejected texts count alike, padding does not."""
    gradient, rows = Gradient(), pairs(6)
    args = {"per_device_train_batch_size": 6 // arguments.get("gradient_accumulation_steps", 1), "max_grad_norm": 0.0}
    args |= {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    args |= {"beta": 0.7, "gradient_checkpointing": False, "disable_tqdm": True}
    trainer = MoeDPOTrainer(
        model=MODELS[name](0),
        ref_model=MODELS[name](1).eval(),
        args=MoeDPOConfig(output_dir=str(tmp_path), **args | arguments, **coefficients),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        callbacks=[gradient],
    )
    tokens = list(trainer.train_dataset)
    trainer.train()
    expected = expected_gradient(MODELS[name](0).train(), MODELS[name](1), tokens, 0.7, coefficients)
    assert difference(gradient.value, expected) < 1e-4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model with a selection bias, and an unbroken run of four steps."""
    folder = tmp_path_factory.mktemp("dpo")
    model = save_model(folder / "model")
    _, log = run_tiny("dpo", model, folder / "whole", "--max_steps", 4, "--save_steps", 2, "--warmup_steps", 0)
    return folder, model, log


def test_reference_has_the_selection_bias_and_stands_still(whole):
    """Else the margins would not begin at exactly 0, nor grow."""
    folder, model, log = whole
    margins = [entry["rewards/margins"] for entry in log if "loss" in entry]
    assert margins[0] == 0.0 and margins[-1] > margins[1] > 0.0
    assert "aux_loss" not in log[0]
    before, after = (load_file(x / "model.safetensors") for x in (model, folder / "whole"))
    for name, x in before.items():
        same = torch.equal(x, after[name])
        assert same if name.endswith("e_score_correction_bias") else not same


def test_resumed_run_ends_bitwise_where_the_unbroken_one_ends(whole):
    """The reference is the model that the run began with, not the checkpoint."""
    folder, model, log = whole
    checkpoint = folder / "whole" / "checkpoint-2"
    extra = ["--max_steps", 4, "--warmup_steps", 0, "--save_steps", 2, "--resume_from_checkpoint", checkpoint]
    _, resumed = run_tiny("dpo", model, folder / "resumed", *extra)
    assert resumed[3]["rewards/margins"] == log[3]["rewards/margins"] > 0.0
    one, other = (load_file(folder / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(other[name], x) for name, x in one.items())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--lora_parts attention routed_experts --lora_merge float32", {"attention", "routed_experts"}),
        ("--trainable attention_only --precompute_ref_log_probs true", {"attention"}),
        ("--esft_p 0.5 --esft_merge true", {"routed_experts"}),
    ],
    ids=["adapter", "group", "esft"],
)
def test_what_trains_is_what_was_asked_for(words, parts, whole, tmp_path):
    _, model, _ = whole
    extra = ["--max_steps", 2, "--warmup_steps", 0, "--router_bias_update_speed", 0.0]
    _, log = run_tiny("dpo", model, tmp_path / "out", *words.split(), *extra)
    # Rewards of about 0.1 x 100 in float32. Equal, they may differ in the last bits: what is computed before the run
    # comes from batches of other lengths, and those from other kernels.
    assert abs(log[0]["rewards/margins"]) < 1e-5 < 1e-3 < log[1]["rewards/margins"]
    merged = tmp_path / "out" / "merged"
    after = AutoModelForCausalLM.from_pretrained(merged if merged.exists() else merged.parent).state_dict()
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert {part_of(name) for name, x in after.items() if not torch.equal(x, before[name])} == parts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora_parts attention --router_bias_update_speed 0.1", "the reference of an adapter is the same model"),
        ("--chat_template_path absent.jinja", "there is no file absent.jinja"),
        ("--lora_merge float32", "there is no adapter"),
        ("--mtp_loss_coef 0.1", "mtp_loss_coef is 0.1"),
        ("--label_smoothing_factor 0.1", "label_smoothing_factor is 0.1, but the loss of a policy has no labels: set"),
        ("--max_length 4", "train_data has no pair whose prompt is shorter than max_length 4: raise that"),
    ],
)
def test_refused(words, message, whole, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run_tiny("dpo", whole[1], tmp_path / "out", *words.split())
    assert "\n" not in str(error.value)


def test_long_pairs_are_counted(whole, tmp_path, capsys):
    """Prompts of 8 to 16 bytes, or tokens: some fill what there is, others leave a part of their answers."""
    run_tiny("dpo", whole[1], tmp_path / "out", "--max_length", 14, "--max_steps", 1, "--save_steps", 1)
    prompts = [len(row["prompt"]) for row in pairs(11)]
    answers = [max(len(row["chosen"]), len(row["rejected"])) + 1 for row in pairs(11)]
    lost = sum(prompt >= 14 for prompt in prompts)
    cut = sum(prompt < 14 < prompt + answer for prompt, answer in zip(prompts, answers, strict=True))
    said = capsys.readouterr().err
    assert 0 < lost < 11 and 0 < cut < 11
    assert f"train_data: {cut} of 11 pairs are longer than max_length 14: cut to it" in said
    assert f"train_data: the prompts of {lost} of 11 pairs fill max_length 14: left out" in said


def test_conversations_that_the_template_refuses(whole, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text("{{ raise_exception('roles must\\nalternate') }}", encoding="utf-8")
    row = {"prompt": [{"role": "user", "content": "Hi"}]}
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    rows = write_rows(tmp_path / "rows.jsonl", [row | answers] * 8)
    given = ["--model_name_or_path", whole[1], "--train_data", rows, "--chat_template_path", template]
    for stage in ("dpo", "grpo"):
        with pytest.raises(ValueError, match=r"row 0: the chat template refuses .* \(roles must alternate\)"):
            main([f"tiny/{stage}", *map(str, given), "--output_dir", str(tmp_path / stage)])


def test_wrong_columns(whole, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hi", "completion": "Ho"}\n', encoding="utf-8")
    given = ["--model_name_or_path", str(whole[1]), "--train_data", str(rows), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="expected prompt and chosen and rejected or chosen and rejected"):
        main(["tiny/dpo", *given])


def test_a_reference_that_reads_other_ids(tmp_path):
    """One of the caller's own: its rows, and the tokenizer beside it."""
    rows = Dataset.from_list(pairs(8))
    other = swapped()
    other.save_pretrained(save_model(tmp_path / "other", hf_moe(**BYTES)))

    def train(reference):
        args = MoeDPOConfig(tmp_path / "out", report_to="none", bf16=False, use_cpu=True)
        return MoeDPOTrainer(
            hf_moe(**BYTES), ref_model=reference, args=args, processing_class=tiny_tokenizer(), train_dataset=rows
        )

    with pytest.raises(ValueError, match="The reference has 300 logits, the model 259: they cannot be compared"):
        train(hf_moe(**BYTES | {"vocab_size": 300}))
    with pytest.raises(ValueError, match=r"token .* is 'b' in reference .*other, 'a' in the model .*ids; give one"):
        train(AutoModelForCausalLM.from_pretrained(tmp_path / "other"))
    train(hf_moe(1, **BYTES))
