"""Every choice that a recipe's help offers is either valid or refused, in one line, before anything is loaded."""

import re
import shutil
from importlib.util import find_spec

import pytest
import torch
from hf_moe.training.main import check_recipe, main, parser_of, stage_module
from hf_moe.training.stages.names import STAGES
from hf_moe.training.trainers.rehearsal import DECAY
from transformers import SchedulerType, TrainerState

from hf_moe import MoeTrainer, MoeTrainingArguments

from .conftest import tiny_hf_moe

MODULES = {stage: stage_module([f"tiny/{stage}"]) for stage in STAGES}
# What a choice needs beside it.
NEEDS = {
    "reduce_lr_on_plateau": ["--eval_strategy=steps", "--eval_steps=1"],
    "greedy": ["--eval_strategy=steps", "--eval_steps=1"],
    "cosine_with_min_lr": ['--lr_scheduler_kwargs={"min_lr_rate": 0.1}'],
    "cosine_warmup_with_min_lr": ['--lr_scheduler_kwargs={"min_lr_rate": 0.1}'],
}


def enumerated() -> dict[tuple[str, str], list[str]]:
    """(stage, argument) -> its choices; an argument of several stages counts for the first."""
    found, seen = {}, set()
    for stage, module in MODULES.items():
        for action in parser_of(module)._actions:
            choices = [str(getattr(choice, "value", choice)) for choice in action.choices or ()]
            if choices and action.dest != "stage" and (action.dest, *choices) not in seen:
                seen.add((action.dest, *choices))
                found[stage, action.dest] = choices
    return found


CHOICES = enumerated()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of choices that TRL will give up
@pytest.mark.parametrize(("stage", "name"), CHOICES)
def test_a_choice_is_valid_or_refused_in_a_line_that_names_it(stage, name):
    answers = {choice: answer(f"tiny/{stage}", f"--{name}={choice}") for choice in CHOICES[stage, name]}
    for choice, said in answers.items():
        assert said == "" or ("\n" not in said and choice in said and name in said), said
    assert "" in answers.values() or name == "dataloader_multiprocessing_context"  # which needs workers


@pytest.mark.parametrize(
    ("stage", "extra", "message"),
    [
        ("sft", ["--attn_implementation=sdp"], "attn_implementation is sdp; it can be eager, .*sdpa"),
        (
            "pretrain",
            ["--experts_implementation=sdpa"],
            "experts_implementation is sdpa; it can be eager, .*grouped_mm",
        ),
        ("grpo", ["--cache_implementation=fixed"], "cache_implementation is fixed; it can be static, .*dynamic"),
        ("dpo", ["--loss_type", "sigmoid", "simpo"], "loss_type: invalid choice: 'simpo'"),
        ("dpo", ["--loss_type=exo_pair"], "loss_type is exo_pair, which needs a label_smoothing above 0"),
        ("grpo", ["--loss_type=ppo"], "loss_type: invalid choice: 'ppo'"),
        ("grpo", ["--scale_rewards=std"], "scale_rewards: invalid choice: 'std'"),
        ("sft", ["--torch_compile_backend=tvmm"], "torch_compile_backend tvmm, .*Invalid backend"),
        ("sft", ["--torch_compile_mode=fast"], "torch_compile_mode fast: Unrecognized mode"),
        ("sft", ["--accelerator_config=absent.json"], "accelerator_config is absent.json; it must be a mapping or a"),
        ("sft", ["--pad_to_multiple_of=eight"], "pad_to_multiple_of is eight; it must be a number of tokens"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_name_that_nothing_knows_is_refused(stage, extra, message):
    said = answer(f"tiny/{stage}", *extra)
    assert re.search(message, said) and "\n" not in said, said


def test_a_kernel_of_the_hub_may_be_named():
    assert answer("tiny/sft", "--attn_implementation=kernels-community/flash-attn2") == ""


def answer(*argv: str) -> str:
    """What a check says, nothing where all is well. Other errors than the user's come through."""
    try:
        check_recipe(*argv)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("choice", [choice.value for choice in SchedulerType])
def test_every_schedule_runs_or_says_what_it_needs(choice, model_folder, data_folder, tmp_path):
    places = [f"--model_name_or_path={model_folder}", f"--output_dir={tmp_path / 'out'}", "--save_strategy=no"]
    places += [f"--{name}={data_folder / 'val.jsonl'}" for name in ("train_data", "eval_data")]
    run = ["tiny/sft", *places, "--max_steps=2", "--logging_steps=1", f"--lr_scheduler_type={choice}"]
    if choice in NEEDS:
        with pytest.raises(ValueError, match=f"lr_scheduler_type.*{choice}"):
            main(run)
        assert not (tmp_path / "out").exists()
    main([*run, *NEEDS.get(choice, [])])
    history = TrainerState.load_from_json(str(tmp_path / "out" / "trainer_state.json")).log_history
    assert sum("learning_rate" in entry for entry in history) == 2


def test_warmup_stable_decay_comes_down_in_the_last_tenth():
    args = MoeTrainingArguments("unused", lr_scheduler_type="warmup_stable_decay", warmup_steps=5, use_cpu=True)
    trainer = MoeTrainer(tiny_hf_moe(), args, train_dataset=[{"input_ids": [1]}])
    trainer.create_optimizer()
    scheduler, rates = trainer.create_scheduler(50), []
    for _ in range(51):
        rates.append(scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        scheduler.step()
    highest = [step for step, rate in enumerate(rates) if rate == max(rates)]
    assert highest[0] == 5 and highest[-1] == 50 - DECAY * 50 and rates[-1] == 0


def test_a_schedule_without_a_learning_rate_for_some_step():
    args = MoeTrainingArguments("unused", lr_scheduler_type="polynomial", warmup_steps=5, use_cpu=True)
    trainer = MoeTrainer(tiny_hf_moe(), args, train_dataset=[{"input_ids": [1]}])
    trainer.create_optimizer()
    with pytest.raises(ValueError, match="polynomial has no learning rate for 5 steps of which 5 warm up"):
        trainer.create_scheduler(5)


@pytest.mark.parametrize("by_source", [False, True], ids=["together", "by-source"])
def test_best_by_what_is_not_measured_is_refused_before_the_first_step(by_source, model_folder, data_folder, tmp_path):
    shutil.copy(data_folder / "val.jsonl", tmp_path / "other.jsonl")
    held_out = [str(data_folder / "val.jsonl"), str(tmp_path / "other.jsonl")]
    run = ["tiny/sft", f"--model_name_or_path={model_folder}", f"--train_data={held_out[0]}", "--eval_data", *held_out]
    run += ["--load_best_model_at_end=true", "--eval_strategy=steps", "--save_steps=1", "--eval_steps=1"]
    run += ["--max_steps=1", f"--eval_by_source={str(by_source).lower()}"]
    wrong, right = ("loss", "other_loss") if by_source else ("other_loss", "loss")
    with pytest.raises(ValueError, match=rf"metric_for_best_model is {wrong}, which .* can be eval_") as error:
        main([*run, f"--output_dir={tmp_path / 'out'}", f"--metric_for_best_model={wrong}"])
    assert "\n" not in str(error.value) and not [*(tmp_path / "out").glob("checkpoint-*")]
    main([*run, f"--output_dir={tmp_path / 'right'}", f"--metric_for_best_model={right}"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--optim=grokadamw"], "optim grokadamw cannot be had here: Please install grokadamw"),
        (["--dtype=float16"], "dtype is float16, in which Adam's epsilon and small squares are 0"),
        (["--lr_scheduler_type=polynomial", '--lr_scheduler_kwargs={"pow": 2}'], "lr_scheduler_type polynomial with"),
        (
            ["--push_to_hub=true", "--hub_strategy=checkpoint"],
            "hub_strategy is checkpoint, which would upload pickles",
        ),
        (["--ddp_backend=gloo"], "ddp_backend is gloo, but this is one process"),
        (["--save_strategy=best"], "save_strategy is best: give --metric_for_best_model"),
        (['--lr_scheduler_kwargs={"num_cycles: 2}'], "lr_scheduler_kwargs is .*, which is no JSON: Unter"),
        (["--activation_offloading=true"], "activation_offloading is true, but it moves activations from a GPU"),
        (["--use_liger_kernel=true"], "use_liger_kernel is true, but Liger's kernels run on a GPU"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refused_before_anything_is_loaded(extra, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        main(["tiny/sft", "--model_name_or_path=absent", "--train_data=absent", f"--output_dir={tmp_path}", *extra])
    assert "\n" not in str(error.value)


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_a_package_that_transformers_misses_is_one_line(tmp_path):
    run = ["tiny/sft", "--model_name_or_path=absent", "--train_data=absent", f"--output_dir={tmp_path}"]
    with pytest.raises(ValueError, match=r"'deepspeed.*' distribution was not found"):
        main([*run, "--deepspeed=zero2.json"])


def test_a_mixture_whose_routers_are_not_read_is_called_one(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers.models.deepseek_v4")
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    sizes |= {"q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 8}
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "hc_mult": 2, "partial_rotary_factor": 0.5}
    torch.manual_seed(0)
    message = r"is a Mixture-of-Experts model whose routers hf_moe does not read yet \(DeepseekV4HashRouter, "
    config = transformers.DeepseekV4Config(**sizes, num_hidden_layers=1, mlp_layer_types=["hash_moe"])
    model = transformers.DeepseekV4ForCausalLM(config)
    gate = model.model.layers[0].mlp.gate
    forward = gate.forward

    def cubed(*args):
        logits, _, index = forward(*args)
        return logits, logits.gather(1, index) ** 3, index

    monkeypatch.setattr(gate, "forward", cubed)  # scores that nothing explains
    with pytest.raises(ValueError, match=f"router_aux_loss_coef is [\\d.]+, but DeepseekV4ForCausalLM {message}"):
        MoeTrainer(model, MoeTrainingArguments(tmp_path, use_cpu=True), train_dataset=[{"input_ids": [1]}])
    MoeTrainer(model, MoeTrainingArguments(tmp_path, use_cpu=True, router_aux_loss_coef=0.0), train_dataset=[])
