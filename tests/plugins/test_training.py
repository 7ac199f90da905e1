"""Routers of a user's own in training: resuming, what a router moves itself, adapters, and what is counted of them."""

import json
import math

import pytest
import torch
from hf_moe.training.balance.selection_bias import load_router_bias
from hf_moe.training.weights.esft import score_experts
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import hf_moe
from hf_moe.plugins import load_plugin
from hf_moe.routers import captured, find_routers
from hf_moe.telemetry.counts import RouterCounts
from tests.plugins.conftest import FOLDER
from tests.plugins.moved_worker import thresholds
from tests.processes import on_two_processes
from tests.training.balance_worker import NONE, ROWS, train_one_step
from tests.training.conftest import tiny_tokenizer
from tests.training.models import collate, rows
from tests.training.models import hf_moe as tiny

SETTINGS = {"n_group": 1, "topk_group": 1}


def own(router_type: str, seed: int = 0, **changes):
    return tiny(
        seed, **{"vocab_size": 259} | SETTINGS | {"router_type": router_type, "num_experts_per_tok": 3} | changes
    )


class Watched:
    """Of each training forward the mask of its tokens, and what each router answered."""

    def __init__(self, model):
        self.masks, self.answers = [], [[] for _ in model.model.layers]
        model.register_forward_pre_hook(self.see, with_kwargs=True)
        for answers, layer in zip(self.answers, model.model.layers, strict=True):
            layer.mlp.gate.register_forward_hook(lambda module, args, out, answers=answers: answers.append(out))

    def see(self, module, args, kwargs):
        self.masks.append(kwargs["attention_mask"].flatten().bool())

    @property
    def layers(self):
        """A layer's (logits, index) of the tokens that count, forward by forward."""
        for answers in self.answers:
            yield [(out[0][mask].detach(), out[2][mask]) for out, mask in zip(answers, self.masks, strict=True)]


def test_a_run_ends_where_the_unbroken_one_ends(router_type, tmp_path):
    options = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    options |= {"router_aux_loss_coef": 0.1, "per_device_train_batch_size": 4}
    unbroken = own(router_type)
    train_one_step(unbroken, 2, keep_folder=tmp_path / "run", **options)
    other = own(router_type, seed=1)
    folder = tmp_path / "run" / "checkpoint-2"
    train_one_step(other, 2, keep_folder=tmp_path / "again", resume_from_checkpoint=str(folder), **options)
    before = own(router_type).state_dict()
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
        assert "gate" not in name or not torch.equal(tensor, before[name]), name


def quantile(values: list[float], share: float) -> float:
    values, place = sorted(values), (len(values) - 1) * share
    low, high = values[int(place)], values[min(int(place) + 1, len(values) - 1)]
    return low + (high - low) * (place - int(place))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("coefficient", [0.0, 0.1])  # with a balance loss the step is counted before it is trained on
def test_a_threshold_moves_once_a_step_by_what_its_tokens_say(forgotten, accumulation, coefficient):
    load_plugin(FOLDER / "threshold.py")
    model = own("threshold", router_args={"decay": 0.8})
    watched = Watched(model)
    train_one_step(model, accumulation, **NONE | {"router_aux_loss_coef": coefficient})
    for layer, calls in zip(model.model.layers, watched.layers, strict=True):
        assert layer.mlp.gate.threshold.dtype == torch.float32
        for expert in range(6):
            scores = [logits[:, expert].double().sigmoid().tolist() for logits, _ in calls[-accumulation:]]
            mean = sum(quantile(x, 1 - 3 / 6) for x in scores) / accumulation
            assert layer.mlp.gate.threshold[expert].item() == pytest.approx(0.8 * 0.5 + 0.2 * mean, abs=1e-6)


def test_a_threshold_does_not_stall_in_bfloat16_and_comes_with_an_adapter(forgotten, tmp_path):
    load_plugin(FOLDER / "threshold.py")
    trained = get_peft_model(own("threshold").to(torch.bfloat16), LoraConfig(r=2, target_modules=["o_proj"]))
    arguments = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    train_one_step(trained, 2, keep_folder=tmp_path, **arguments)
    moved = [layer.mlp.gate.threshold for layer in trained.get_base_model().model.layers]
    assert all(x.dtype == torch.float32 and (x != 0.5).all() for x in moved)
    other = own("threshold")
    load_router_bias(other, tmp_path / "checkpoint-2")
    for layer, expected in zip(other.model.layers, moved, strict=True):
        assert torch.equal(layer.mlp.gate.threshold, expected)


def test_logged_numbers_are_those_counted_by_hand(router_type):
    model = own(router_type)
    watched = Watched(model)
    _, trainer = train_one_step(model, 1, log_each_router=True, **NONE)
    logged = trainer.state.log_history[0]
    for layer, calls in enumerate(watched.layers):
        ((_, index),) = calls
        own_choices = [[e for e in experts if e < 6] for experts in index.tolist()]
        numbers = [len(x) for x in own_choices]
        mean = sum(numbers) / len(numbers)
        spread = (sum((x - mean) ** 2 for x in numbers) / len(numbers)) ** 0.5
        loads = [sum(e in x for x in own_choices) * 6 / sum(numbers) for e in range(6)]
        shares = [load / 6 for load in loads if load]
        expected = {
            "router_experts_per_token": mean,
            "router_experts_per_token_spread": spread,
            "router_load_max": max(loads),
            "router_max_violation": max(loads) - 1,
            "router_load_entropy": -sum(x * math.log(x, 6) for x in shares),
            "router_dead_experts": loads.count(0),
            "router_dropped_fraction": 0,
        }
        assert (spread == 0) == (router_type == "cosine")
        for name, value in expected.items():
            assert logged[f"{name}/model.layers.{layer}.mlp.gate"] == pytest.approx(value, abs=1e-5), name


def test_two_processes_move_it_as_one_does(forgotten):
    two = on_two_processes("plugins/moved_worker.py")
    for found, expected in zip(two, thresholds(2, 1), strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
        assert all(abs(x - 0.5) > 1e-5 for x in found)


def test_experts_that_matter_are_chosen_among_those_that_tokens_have(router_type):
    model = own(router_type).eval()
    batch = collate(rows(ROWS))
    scores = score_experts(model, [batch], "token")
    with captured(find_routers(model), 3) as routings, torch.no_grad():
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    for name, routing in routings.items():
        index = routing.index_SK[batch["attention_mask"].flatten().bool()].flatten().tolist()
        counts = [index.count(e) for e in range(6)]
        torch.testing.assert_close(scores[name], torch.tensor(counts).double() / sum(counts))


def test_traced_numbers_are_those_of_the_choices(router_type):
    model = own(router_type).eval()
    batch = collate(rows(ROWS))
    with captured(find_routers(model), 3) as routings, torch.no_grad():
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
    kept = batch["attention_mask"].flatten().nonzero().flatten()
    for (name, routing), router in zip(routings.items(), find_routers(model).values(), strict=True):
        counts = RouterCounts(6, 1, 0, torch.device("cpu"))
        counts.add(routing, router, 0, kept, torch.full_like(kept, -1), torch.full_like(kept, -1))
        own_choices = [{e for e in routing.index_SK[t].tolist() if e < 6} for t in kept.tolist()]
        numbers = [len(x) for x in own_choices]
        mean = sum(numbers) / len(numbers)
        assert counts.mean_k == pytest.approx(mean), name
        assert counts.spread_k == pytest.approx((sum((x - mean) ** 2 for x in numbers) / len(numbers)) ** 0.5)
        assert counts.chosen_NE[0].tolist() == [sum(e in x for x in own_choices) for e in range(6)]
        together = [[sum({i, j} <= x for x in own_choices) for j in range(6)] for i in range(6)]
        assert counts.together_EE.tolist() == together
        first = [0] * 6
        for t in kept.tolist():
            pairs = zip(routing.weights_SK[t].tolist(), routing.index_SK[t].tolist(), strict=True)
            best = max((weight, -e) for weight, e in pairs if e < 6) if own_choices[kept.tolist().index(t)] else None
            if best:
                first[-best[1]] += 1
        assert counts.first_NE[0].tolist() == first


@pytest.mark.parametrize("name", ["cosine", "threshold"])
def test_a_model_saved_in_bfloat16_keeps_it_in_float32(forgotten, name, tmp_path):
    load_plugin(FOLDER / f"{name}.py")
    source, added = own(name).to(torch.bfloat16), {"cosine": "log_temperature", "threshold": "threshold"}[name]
    source.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": "a b a c " * 4}) for _ in range(8)))
    words = {"model": tmp_path / "source", "train_data": tmp_path / "text.jsonl", "output_dir": tmp_path / "out"}
    words |= {"train_tokens": 400, "batch_tokens": 128, "max_length": 16, "per_device_train_batch_size": 4}
    run = hf_moe.train("tiny/continue", **words, save_strategy="no", trainable="all")
    state = load_file(tmp_path / "out" / "model.safetensors")
    tensors = {key: x for key, x in state.items() if ".gate." in key}
    assert {key: x.dtype for key, x in tensors.items()} == {
        key: torch.float32 if key.endswith(added) else torch.bfloat16 for key in tensors
    }
    trained = run.trainer.moe.state_dict()
    assert all(torch.equal(x, trained[key]) for key, x in tensors.items() if key.endswith(added))
