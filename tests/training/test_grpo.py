"""GRPO: only rewards move the policy, replay holds through a run, rewards rise, runs resume."""

import json

import pytest
import torch
from datasets import Dataset
from hf_moe.training.balance.router_replay import UNKNOWN
from hf_moe.training.stages.grpo import questions as answerable
from hf_moe.training.trainers.grpo_trainer import PREFIX
from safetensors.torch import load_file
from transformers.generation.configuration_utils import GenerationMode

from hf_moe import MoeGRPOConfig, MoeGRPOTrainer
from hf_moe.model import decoding
from hf_moe.routers import captured, find_routers
from tests.families import tiny
from tests.recordings import record_on_cpu

from .balance_worker import Gradient, difference, slow_losses
from .conftest import tiny_tokenizer
from .models import hf_moe, hf_moe_biased
from .policies import BALANCED, BYTES, questions, run_tiny, save_model

OTHERS = {name: value for name, value in BALANCED.items() if name != "router_bias_update_speed"}
ROWS = [{"prompt": row["question"], "answer": row["answer"]} for row in questions(4)]


def constant(completions, **columns):
    return [1.0] * len(completions)


def alternating(completions, **columns):
    return [float(i % 2) for i in range(len(completions))]


def build(tmp_path, model=None, reward=constant, callbacks=None, **arguments) -> MoeGRPOTrainer:
    args = {"max_steps": 1, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6}
    args |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args |= {"gradient_checkpointing": False, "max_grad_norm": 0.0, "learning_rate": 1e-2, "logging_steps": 1}
    return MoeGRPOTrainer(
        model=model or hf_moe(**BYTES, **OTHERS),
        reward_funcs=[reward],
        args=MoeGRPOConfig(output_dir=str(tmp_path), **args | arguments),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def test_a_cache_that_grows_is_a_way_to_do_without_recordings(tmp_path, monkeypatch):
    """What a recorded step reserves is room for the longest text."""
    record_on_cpu(monkeypatch)
    monkeypatch.setattr(decoding.RecordedStep, "record", lambda step: pytest.fail("recorded"))
    build(tmp_path, cache_implementation="dynamic").train()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_checkpointing": True}, {"router_replay": "rollout"}],
    ids=str,
)
def test_rollouts_are_recorded_and_write_the_same_texts(tmp_path, monkeypatch, arguments):
    """By steps as recorded ones in all but the graph: one a rollout, of weights that have moved since the last."""
    texts, recordings, record = [], [], decoding.RecordedStep.record

    def heard(completions, **columns):
        texts.append(completions)
        return alternating(completions)

    def trained():
        texts.clear()
        trainer = build(tmp_path, reward=heard, max_steps=2, **arguments)
        trainer.train()
        assert trainer.moe not in decoding.KEPT
        return list(texts), trainer.rollout

    plain = trained()
    record_on_cpu(monkeypatch)
    monkeypatch.setattr(decoding.RecordedStep, "record", lambda step: recordings.append(step) or record(step))
    again = trained()
    assert again[0] == plain[0]
    assert len(plain[0]) == len(recordings) == 2
    assert again[1].keys() == plain[1].keys() and bool(plain[1]) == ("router_replay" in arguments)
    for name, index in plain[1].items():  # a text's end is noticed one step late
        assert torch.equal(again[1][name][:, : index.shape[1]], index)


@pytest.mark.gpu
def test_rollouts_on_a_gpu_are_recorded_with_their_experts(tmp_path, monkeypatch):
    """float32 weights under autocast, as recipes have them."""
    recordings, record = [], decoding.RecordedStep.record
    monkeypatch.setattr(decoding.RecordedStep, "record", lambda step: recordings.append(step) or record(step))
    monkeypatch.setattr(decoding, "WORTH_RECORDING", 1)
    trainer = build(tmp_path, router_replay="rollout", bf16=True, use_cpu=False, max_steps=2)
    trainer.train()
    assert len(recordings) == 2 and set(trainer.rollout) == set(trainer.routers)
    assert {x.dtype for x in trainer.moe.parameters()} == {torch.float32}


def test_rollouts_read_weights_that_are_rounded_once(tmp_path, monkeypatch):
    """Those that train are the same memory before and after; routers compute in float32 as they do in training."""
    trainer, seen = build(tmp_path, bf16=True), []
    before = {name: x.data_ptr() for name, x in trainer.moe.named_parameters()}
    generate = type(trainer.moe).generate

    def watched(model, *args, **kwargs):
        seen.append({name: x.dtype for name, x in model.named_parameters()})
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(type(trainer.moe), "generate", watched)
    trainer.train()
    assert {name for name, dtype in seen[0].items() if dtype == torch.float32} == {
        f"{name}.weight" for name in trainer.routers
    }
    assert set(seen[0].values()) == {torch.float32, torch.bfloat16}
    after = dict(trainer.moe.named_parameters())
    assert before == {name: x.data_ptr() for name, x in after.items()}
    assert {x.dtype for x in after.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "arguments", "recorded"),
    [
        (torch.float32, {}, True),
        (torch.bfloat16, {"bf16": True}, True),
        (torch.float32, {"bf16": True}, True),
        (torch.float32, {"cache_implementation": "static"}, False),
    ],
    ids=["float32", "bfloat16 under autocast", "float32 under autocast", "a cache that is compiled for"],
)
def test_which_rollouts_may_be_recorded(tmp_path, dtype, arguments, recorded):
    trainer = build(tmp_path, model=hf_moe(**BYTES, **OTHERS).to(dtype), **arguments)
    wished = list(decoding.wishes(trainer.generation_config, {}, GenerationMode.SAMPLE))
    assert bool(wished) != recorded
    assert trainer.generation_config.disable_compile != recorded


def test_nothing_but_rewards_gives_a_gradient(tmp_path):
    """Equal rewards are no advantage; the configuration's balance losses do not count."""
    gradient = Gradient()
    build(tmp_path, callbacks=[gradient]).train()
    assert gradient.value and all(not x.any() for x in gradient.value.values())


@pytest.mark.parametrize("checkpointing", [False, True, "selective"], ids=["", "checkpointing", "selective"])
def test_balance_loss_counts_the_tokens_of_the_step_if_asked(checkpointing, tmp_path):
    """Of prompts and completions over both micro-batches, and not of padding."""
    gradient = Gradient()
    arguments = {"router_aux_loss_coef": 3.0, "gradient_accumulation_steps": 2}
    arguments["gradient_checkpointing"] = checkpointing
    trainer = build(tmp_path, callbacks=[gradient], **arguments)
    trainer.train()
    batches = [trainer.model_inputs(batch) for batch in trainer._buffered_inputs]
    ids, mask = (torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "attention_mask"))
    assert len(ids) == 16 and not mask.all()
    model = hf_moe(**BYTES, **OTHERS).train()
    with captured(find_routers(model), 2) as routings:
        model(ids, attention_mask=mask, output_router_logits=False)
    shape = (*ids.shape, -1)
    layers = [
        slow_losses(x.logits_TE.view(shape), x.index_SK.view(shape), mask, sigmoid=False, groups=3, reached=2)
        for x in routings.values()
    ]
    loss = 3.0 * sum(x["router_aux_loss_coef"] for x in layers) / len(layers)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    expected = {
        name: torch.zeros_like(x) if g is None else g
        for (name, x), g in zip(model.named_parameters(), gradients, strict=True)
    }
    assert difference(gradient.value, expected) < 1e-4


@pytest.mark.parametrize(
    ("replay", "iterations", "recorded"),
    [("none", 2, False), ("old_policy", 1, False), ("old_policy", 2, True), ("rollout", 2, True)],
)
def test_training_takes_the_recorded_experts(replay, iterations, recorded, tmp_path, monkeypatch):
    """In every update, while the bias moves by more than any gap between scores; without a record they change."""
    trainer = build(
        tmp_path,
        hf_moe_biased(**BYTES),
        alternating,
        router_replay=replay,
        num_iterations=iterations,
        max_steps=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        router_bias_update_speed=0.5,
    )
    seen = []
    see = trainer.see_routing
    monkeypatch.setattr(
        trainer, "see_routing", lambda routings, inputs: seen.append(routings) or see(routings, inputs)
    )
    given = []
    compute = trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda m, x, *a, **k: given.append(x) or compute(m, x, *a, **k))
    trainer.train()
    assert len(seen) == len(given) == 4
    if not recorded:
        assert not any(name.startswith(PREFIX) for batch in given for name in batch)
        return
    for batch, routings in zip(given, seen, strict=True):
        for name, routing in routings.items():
            index = batch[PREFIX + name]
            known = index != UNKNOWN
            mask = trainer.model_inputs(batch)["attention_mask"].bool()
            assert known.any() and torch.equal(known[..., 0] & ~mask, torch.zeros_like(mask))
            assert known[..., 0][mask].float().mean() > 0.8
            assert torch.equal(routing.index_SK.view(index.shape)[known], index[known].long())


def test_old_log_probabilities_take_the_experts_of_the_rollout(tmp_path):
    """Then the ratio of the first update is exactly 1, and that of the second that of the weights alone."""
    trainer = build(tmp_path, hf_moe_biased(**BYTES), alternating, router_replay="rollout", num_iterations=2)
    trainer.model.train()
    batch = trainer._prepare_inputs([row for row in ROWS[:2] for _ in range(4)])
    with torch.no_grad(), trainer.training_records(batch):
        ids, mask = trainer.model_inputs(batch).values()
        now = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, batch["completion_ids"].shape[1])[0]
    torch.testing.assert_close(now, batch["old_per_token_logps"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"router_replay": "rollout", "router_z_loss_coef": 0.1}, "router_z_loss_coef would balance experts that"),
        (
            {"router_aux_loss_coef": 1.0, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
            "make it a multiple",
        ),
        (
            {"router_replay": "old_policy", "model": tiny("phimoe", **BYTES)},
            "router_replay needs routers whose weights are known",
        ),
    ],
    ids=["balance", "accumulation", "native"],
)
def test_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        build(tmp_path, **arguments)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model, and an unbroken run of the tiny recipe with replay."""
    folder = tmp_path_factory.mktemp("grpo")
    model = save_model(folder / "model", hf_moe_biased(**BYTES, **BALANCED, tie_word_embeddings=True))
    extra = ["--max_steps", 8, "--save_steps", 4, "--learning_rate", 5e-2, "--max_completion_length", 6]
    _, log = run_tiny("grpo", model, folder / "whole", *extra)
    return folder, model, log, extra


def test_reward_rises(whole):
    rewards = [entry["reward"] for entry in whole[2] if "reward" in entry]
    assert len(rewards) == 4 and rewards[-1] > rewards[0] + 0.1


def test_resumed_run_ends_bitwise_where_the_unbroken_one_ends(whole):
    folder, model, log, extra = whole
    extra = [*extra, "--resume_from_checkpoint", folder / "whole" / "checkpoint-4"]
    _, resumed = run_tiny("grpo", model, folder / "resumed", *extra)
    assert [entry.get("reward") for entry in resumed] == [entry.get("reward") for entry in log]
    one, other = (load_file(folder / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(other[name], x) for name, x in one.items())


def test_rewards_by_source_are_refused(whole, tmp_path):
    with pytest.raises(ValueError, match="eval_by_source is true, but TRL's GRPO reports rewards without"):
        run_tiny("grpo", whole[1], tmp_path / "out", "--eval_by_source", "true")


@pytest.mark.parametrize("end", [None, {"eos_token": {"content": "</s>"}}], ids=["no name", "no token's name"])
def test_a_tokenizer_that_ends_no_answer(end, tmp_path):
    source = save_model(tmp_path / "source")
    said = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(said | {"eos_token": None}))
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": end}))
    with pytest.raises(ValueError, match="The tokenizer has no eos_token, which ends an answer: name it in its"):
        run_tiny("grpo", source, tmp_path / "out", "--use_cpu", "true", "--max_steps", "1")
    assert not (tmp_path / "out").exists()


def test_rows_become_questions(capsys):
    rows = Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": x}, {"role": "assistant", "content": f"#### {x}"}]}
            for x in ("7", "x")
        ]
    )
    kept = answerable(rows, ["gsm8k_answer"], "train_data")
    assert kept[:] == {"prompt": [[{"role": "user", "content": "7"}]], "answer": ["#### 7"]}
    assert "train_data: 1 of 2 rows have no answer that gsm8k_answer can read" in capsys.readouterr().err
    assert len(answerable(rows, ["gsm8k_format"], "train_data")) == 2
    alone = Dataset.from_list([{"messages": [{"role": "user", "content": "7"}]}, rows[0]])
    assert len(answerable(alone, ["gsm8k_answer"], "train_data")) == 1
    assert "train_data: 1 of 2 rows have one message alone, and are left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="train_data has no row whose messages are a question and an answer"):
        answerable(alone.select([0]), ["gsm8k_format"], "train_data")
    with pytest.raises(ValueError, match="train_data has no row with an answer"):
        answerable(rows.select([1]), ["gsm8k_answer"], "train_data")
    with pytest.raises(ValueError, match="needs a column answer in eval_data"):
        answerable(Dataset.from_list([{"prompt": "Hi"}]), ["gsm8k_answer"], "eval_data")
