"""Routing metrics: what is logged equals a count by hand, once per token over the whole step."""

import math

import pytest
import torch
from datasets import Dataset

from hf_moe import MoeTrainer

from .balance_worker import COEFFICIENTS, NONE, ROWS, train_one_step
from .models import collate, deepseek_v3, hf_moe, hf_moe_biased, mixtral, olmoe, rows

MODELS = {
    "hf_moe": hf_moe,
    "capacity": lambda: hf_moe(expert_capacity_factor=0.7, router_args={"capacity_priority": "score"}),
    "expert-choice": lambda: hf_moe(router_type="expert_choice", expert_capacity_factor=1.5, n_group=1, topk_group=1),
    "hash": lambda: hf_moe(router_type="hash", router_aux_loss_coef=0.0),
    "heads": lambda: hf_moe(attention_type="moa", num_attention_heads=4, num_key_value_heads=2),
    "bias": hf_moe_biased,
    "olmoe": olmoe,
    "mixtral": mixtral,
    "deepseek_v3": deepseek_v3,
}


def by_hand(model) -> dict[str, dict[str, float]]:
    """Router -> metric, with Python's own counting, of one batch of all rows in training."""
    model.train()
    batch, outputs = collate(rows(ROWS)), {}
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(lambda m, args, out, name=name: outputs.setdefault(name, out))
    with torch.no_grad():
        model(**batch)
    counts = batch["attention_mask"].flatten().tolist()
    found = {}
    for name, (logits, weights, index, *rest) in outputs.items():
        tokens = rest[0].tolist() if rest and rest[0] is not None else range(len(index))
        load, dropped, of_token = [0] * logits.shape[1], 0, [0] * len(counts)
        for token, experts, gates in zip(tokens, index.tolist(), weights.tolist(), strict=True):
            for expert, gate in zip(experts, gates, strict=True):
                load[expert] += counts[token]
                dropped += counts[token] * (gate == 0)
                of_token[token] += counts[token]
        mean, experts = sum(load) / len(load), sum(load) / sum(counts)
        spread = sum(count * (own - experts) ** 2 for count, own in zip(counts, of_token, strict=True)) / sum(counts)
        squares = [math.log(sum(math.exp(min(x, 80)) for x in row)) ** 2 for row in logits.tolist()]
        found[name] = {
            "router_load_max": max(load) / mean,
            "router_max_violation": (max(load) - mean) / mean,
            "router_load_entropy": -sum(x / sum(load) * math.log(x / sum(load), len(load)) for x in load if x),
            "router_dead_experts": load.count(0),
            "router_dropped_fraction": dropped / sum(load),
            "router_experts_per_token": experts,
            "router_experts_per_token_spread": spread**0.5,
            "z_loss": sum(x for x, counted in zip(squares, counts, strict=True) if counted) / sum(counts),
        }
        bias = getattr(model.get_submodule(name), "e_score_correction_bias", None)
        if bias is not None:
            found[name]["router_bias_range"] = (bias.max() - bias.min()).item()
    return found


SUMMARIES = dict.fromkeys(["router_max_violation", "router_bias_range"], max) | {"router_dead_experts": sum}


@pytest.mark.parametrize("model", MODELS)
def test_logged_metrics_are_those_counted_by_hand(model):
    expected = by_hand(MODELS[model]())
    accumulations = [1] if model in ("capacity", "expert-choice") else [1, 4]  # who is dropped depends on the batch
    for accumulation in accumulations:
        _, trainer = train_one_step(MODELS[model](), accumulation, log_each_router=True, **NONE)
        logged = trainer.state.log_history[0]
        assert len(expected) == (4 if model == "heads" else 2)
        for metric in next(iter(expected.values())):
            values = [expected[router][metric] for router in expected]
            for router, value in zip(expected, values, strict=True):
                assert logged[f"{metric}/{router}"] == pytest.approx(value, rel=1e-4, abs=1e-6), metric
            summary = SUMMARIES.get(metric, lambda x: sum(x) / len(x))(values)
            assert logged[metric] == pytest.approx(summary, rel=1e-4, abs=1e-6), metric
    assert (model in ("capacity", "expert-choice")) == (logged["router_dropped_fraction"] > 0.01)


def test_metrics_are_means_over_the_steps_since_the_last_log():
    def logs(**arguments):
        _, trainer = train_one_step(deepseek_v3(), 2, max_steps=4, router_bias_update_speed=1e-3, **arguments)
        return trainer.state.log_history

    each, pairs = logs(logging_steps=1), logs(logging_steps=2)
    assert "router_load_max/model.layers.0.mlp.gate" not in each[0]
    for metric in ("router_load_max", "router_load_entropy", "z_loss"):
        assert pairs[1][metric] == pytest.approx((each[2][metric] + each[3][metric]) / 2, rel=1e-5)
    assert not any("router" in name for name in each[-1])  # the summary of the run


@pytest.mark.parametrize("model", ["hf_moe", "olmoe", "deepseek_v3"])
def test_evaluation_loss_is_cross_entropy_and_balance_is_logged_apart(model, tmp_path):
    coefficients = COEFFICIENTS if model != "olmoe" else {"router_aux_loss_coef": 3.0, "router_z_loss_coef": 0.3}
    _, trainer = train_one_step(MODELS[model](), 4, learning_rate=0.0, keep_folder=tmp_path, **coefficients)
    held_out = Dataset.from_list(rows(9, seed=5))
    trainer.args.per_device_eval_batch_size = 9
    metrics = trainer.evaluate(held_out, metric_key_prefix="held_out")
    module, batch = MODELS[model]().eval(), collate(rows(9, seed=5))
    with torch.no_grad():
        logits = module(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert metrics["held_out_loss"] == pytest.approx(expected.item(), rel=1e-5)
    names = {name.removeprefix("router_").removesuffix("_coef") for name in coefficients}
    assert {f"held_out_{name}" for name in names | {"router_max_violation"}} <= metrics.keys()
    assert trainer.state.log_history[-1]["held_out_aux_loss"] == metrics["held_out_aux_loss"]
    assert metrics["held_out_aux_loss"] > 1

    trainer.args.per_device_eval_batch_size = 2
    in_parts = trainer.evaluate(held_out, metric_key_prefix="held_out")
    for name in ("router_load_max", "router_dead_experts", "z_loss"):  # of all tokens, however they are cut
        assert in_parts[f"held_out_{name}"] == pytest.approx(metrics[f"held_out_{name}"], rel=1e-5)


def test_evaluation_while_training_takes_nothing_from_the_training_metrics():
    class Evaluated(MoeTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, eval_dataset=Dataset.from_list(rows(5, seed=5)), **kwargs)

    arguments = {"max_steps": 4, "logging_steps": 4, "per_device_eval_batch_size": 2}
    _, alone = train_one_step(olmoe(), 2, **arguments)
    _, evaluated = train_one_step(
        olmoe(), 2, trainer_class=Evaluated, eval_strategy="steps", eval_steps=1, **arguments
    )
    logged = [entry for entry in evaluated.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(alone.state.log_history[0], rel=1e-5)
    assert len([entry for entry in evaluated.state.log_history if "eval_router_load_max" in entry]) == 4
