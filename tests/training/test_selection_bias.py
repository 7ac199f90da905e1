"""The selection bias: one step of sign per optimizer step, in float32, and never lost."""

import pytest
import torch
from hf_moe.training.balance.selection_bias import BIAS_FILE, SelectionBias, load_router_bias
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_moe.routers import find_routers

from .balance_worker import NONE, ROWS, train_one_step
from .models import collate, deepseek_v3, hf_moe, hf_moe_biased, rows

MODELS = {"hf_moe": hf_moe_biased, "deepseek_v3": deepseek_v3}
SPEED = 1e-3


def biases(model) -> list[torch.Tensor]:
    gates = [getattr(layer.mlp.gate, "base_layer", layer.mlp.gate) for layer in model.model.layers]
    return [gate.e_score_correction_bias.detach().clone() for gate in gates]


def slow_update(model) -> list[torch.Tensor]:
    """b_i + speed sign(mean load - load_i) with the choices of all rows that are not padding, one by one."""
    model.train()
    batch, chosen = collate(rows(ROWS)), []
    hooks = [x.mlp.gate.register_forward_hook(lambda m, args, out: chosen.append(out[2])) for x in model.model.layers]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    updated = []
    for bias, index in zip(biases(model), chosen, strict=True):
        load = [0] * len(bias)
        for experts, counts in zip(index.tolist(), batch["attention_mask"].flatten().tolist(), strict=True):
            for expert in experts if counts else ():
                load[expert] += 1
        mean = sum(load) / len(load)
        moves = torch.tensor([SPEED * ((mean > x) - (mean < x)) for x in load])
        updated.append(bias + moves)
    return updated


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("balance", [{}, {"seq_aux_loss_coef": 1e-4}, {"router_aux_loss_coef": 1e-4}], ids=str)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("model", MODELS)
def test_one_step_by_the_counts_of_the_whole_step(model, accumulation, balance, checkpointing):
    expected = slow_update(MODELS[model]())
    trained = MODELS[model]()
    arguments = NONE | balance | {"gradient_checkpointing": checkpointing, "router_bias_update_speed": SPEED}
    train_one_step(trained, accumulation, **arguments)
    for bias, wanted in zip(biases(trained), expected, strict=True):
        assert torch.equal(bias, wanted)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("speed", "until", "moves"), [(SPEED, 1.0, 6), (SPEED, 0.5, 3), (SPEED, 0.4, 3), (0.0, 1.0, 0), (None, 1.0, 0)]
)
def test_speed_is_constant_and_then_zero(model, speed, until, moves):
    trained = MODELS[model]()
    before = biases(trained)
    arguments = {"router_bias_update_speed": speed, "router_bias_update_until": until, "max_steps": 6}
    train_one_step(trained, 1, **NONE, **arguments)
    for bias, start in zip(biases(trained), before, strict=True):
        steps = (bias - start).abs() / SPEED
        assert steps.max() <= moves + 1e-3
        assert (steps.max() > moves - 1e-3) or moves > 3  # the busiest expert's load is above the mean each time


def slow_quantiles(bias: torch.Tensor, logits: list, masks: list, speed: float) -> torch.Tensor:
    """b_i + speed (q_i - b_i), where q_i is the mean over micro-batches, by their tokens, of minus the score above its
    token's (K + 1)-th best that K / E of the tokens exceed."""
    total, count = [0.0] * len(bias), 0
    for logits_TE, mask_T in zip(logits, masks, strict=True):
        scores = logits_TE[mask_T].double().sigmoid().tolist()
        prices = [sorted((s + b for s, b in zip(row, bias.tolist(), strict=True)))[-3] for row in scores]
        for e in range(len(bias)):
            above = sorted((row[e] - price for row, price in zip(scores, prices, strict=True)), reverse=True)
            total[e] -= above[round(2 / 6 * len(above))] * len(above)
        count += len(scores)
    return bias + speed * (torch.tensor(total) / count - bias)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("speed", [1.0, 0.25])
@pytest.mark.parametrize("model", MODELS)
def test_by_quantiles_of_the_whole_step(model, speed, accumulation):
    groups = {"n_group": 1, "topk_group": 1}
    trained = MODELS[model](**groups)
    before, logits, masks = biases(trained), [], []
    for layer in trained.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, out: logits.append(out[0].detach()))
    trained.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"].flatten().bool()), with_kwargs=True
    )
    arguments = NONE | {"router_bias_update": "quantile", "router_bias_update_speed": speed}
    train_one_step(trained, accumulation, **arguments)
    assert len(masks) == accumulation
    for layer, (bias, start) in enumerate(zip(biases(trained), before, strict=True)):
        torch.testing.assert_close(bias, slow_quantiles(start, logits[layer::2], masks, speed), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_with_zero_mean(model):
    by_sign = [x - y for x, y in zip(slow_update(MODELS[model]()), biases(MODELS[model]()), strict=True)]
    trained = MODELS[model]()
    before = biases(trained)
    train_one_step(trained, 4, **NONE, router_bias_update="zero_mean", router_bias_update_speed=SPEED)
    for bias, start, moves in zip(biases(trained), before, by_sign, strict=True):
        torch.testing.assert_close(bias - start, moves - moves.mean(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"router_bias_update": "best"}, "router_bias_update is 'best'; it can be sign, zero_mean, quantile"),
        ({"router_bias_update": "quantile"}, "the part of the way to it, is 0.0: give a number above 0, at most 1"),
        (
            {"router_bias_update": "quantile", "router_bias_update_speed": 2.0},
            "the part of the way to it, is 2.0: give a number above 0, at most 1",
        ),
        ({"router_bias_update": "quantile", "router_bias_update_speed": 1.0}, "experts of 2 of 3: set it to sign"),
    ],
)
def test_what_a_rule_cannot_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        train_one_step(hf_moe_biased(), 1, **NONE, **arguments)


def test_quantiles_with_null_experts_are_refused():
    args = {"selection_bias": True, "null_experts": 2}
    model = hf_moe(router_type="null_experts", router_args=args, n_group=1, topk_group=1)
    with pytest.raises(ValueError, match="of 8 choices 6 are experts: set it to sign"):
        train_one_step(model, 1, **NONE, router_bias_update="quantile", router_bias_update_speed=1.0)


def test_speed_of_the_configuration():
    trained = hf_moe_biased(router_bias_update_speed=SPEED)
    _, trainer = train_one_step(trained, 1, **NONE)
    assert trainer.bias_speed == SPEED
    assert all(torch.equal(a, b) for a, b in zip(biases(trained), slow_update(hf_moe_biased()), strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_hundred_steps_in_bfloat16_do_not_round(model):
    """Steps of 1e-3 land at 0.1, also where the model was cast to bfloat16 before and between."""
    model = MODELS[model]()
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias.zero_()
    model.to(torch.bfloat16)
    bias = SelectionBias(find_routers(model))
    counts = torch.tensor([0.0, 9, 9, 9, 9, 9])
    for step in range(100):
        if step % 30 == 7:
            model.to(torch.bfloat16)
        bias.update(dict.fromkeys(bias.biases, counts), SPEED)
    for value in biases(model):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, torch.tensor([0.1] + [-0.1] * 5))


@pytest.mark.parametrize("model", MODELS)
def test_bias_stays_float32_in_a_bfloat16_model(model, tmp_path):
    trained = MODELS[model]().to(torch.bfloat16)
    before = biases(trained)
    _, trainer = train_one_step(trained, 4, **NONE, router_bias_update_speed=SPEED)
    for bias, start in zip(biases(trained), before, strict=True):
        assert bias.dtype == torch.float32
        moves = (bias - start.float()).abs()
        torch.testing.assert_close(moves[moves > SPEED / 2], torch.full_like(moves[moves > SPEED / 2], SPEED))
    expected = biases(trained)
    trained.to(torch.bfloat16)  # as an evaluation in bfloat16 leaves it
    trainer.save_model(str(tmp_path))
    again = type(trained).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(biases(again), expected, strict=True))
    assert again.model.embed_tokens.weight.dtype == torch.bfloat16


def with_adapter(model, seed: int = 3):
    torch.manual_seed(seed)
    experts = [f"layers.{i}.mlp.{name}" for i in (0, 1) for name in ("experts.gate_up_proj", "gate.weight")]
    config = LoraConfig(r=2, target_modules=["o_proj"], target_parameters=experts, init_lora_weights=False)
    return get_peft_model(model, config)


ADAPTER = {"router_bias_update_speed": SPEED, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
ADAPTER |= {"router_aux_loss_coef": 0.1}


@pytest.mark.parametrize("model", MODELS)
def test_adapter_keeps_the_bias(model, tmp_path):
    """Saved beside it, restored on resume, by hand on a base model with or without the adapter."""
    arguments = ADAPTER | {"max_steps": 4, "keep_folder": tmp_path}
    trained = with_adapter(MODELS[model]())
    train_one_step(trained, 2, **arguments)
    expected = biases(trained.get_base_model())
    assert not any(torch.equal(a, b) for a, b in zip(expected, biases(MODELS[model]()), strict=True))
    weights = {name: x.clone() for name, x in trained.named_parameters() if "lora" in name}

    # The base model lost its bias, the adapter is another's: the checkpoint gives both back.
    other = with_adapter(MODELS[model](), seed=4)
    for name, buffer in other.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
    train_one_step(other, 2, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **arguments)
    assert all(torch.equal(a, b) for a, b in zip(biases(other.get_base_model()), expected, strict=True))
    assert all(torch.equal(x, weights[name]) for name, x in other.named_parameters() if name in weights)

    checkpoint = tmp_path / "checkpoint-4"
    for loaded in (PeftModel.from_pretrained(MODELS[model](), checkpoint), MODELS[model]()):
        load_router_bias(loaded, checkpoint)
        base = loaded.get_base_model() if isinstance(loaded, PeftModel) else loaded
        assert all(torch.equal(a, b) for a, b in zip(biases(base), expected, strict=True))


def test_bias_or_adapter_weight_missing_is_an_error(tmp_path):
    trained = with_adapter(deepseek_v3())
    train_one_step(trained, 1, **ADAPTER, max_steps=2, keep_folder=tmp_path)
    checkpoint = tmp_path / "checkpoint-2"
    resume = ADAPTER | {"max_steps": 3, "resume_from_checkpoint": str(checkpoint)}

    saved = load_file(checkpoint / BIAS_FILE)
    assert sorted(saved) == [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (0, 1)]
    save_file({name: x for name, x in saved.items() if ".1." not in name}, checkpoint / BIAS_FILE)
    with pytest.raises(ValueError, match=r"has no model.layers.1.mlp.gate.e_score_correction_bias of 6 experts"):
        train_one_step(with_adapter(deepseek_v3()), 1, **resume)
    (checkpoint / BIAS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no {BIAS_FILE}"):
        train_one_step(with_adapter(deepseek_v3()), 1, **resume)

    weights = load_file(checkpoint / "adapter_model.safetensors")
    first = sorted(weights)[0]
    smaller = weights | {first: weights[first][:1].clone()}
    save_file(smaller, checkpoint / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"has 1 of the adapter's weights in another size, the first of them {first}"):
        train_one_step(with_adapter(deepseek_v3()), 1, **resume)
    del weights[first]
    save_file(weights, checkpoint / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"lacks 1 of the adapter's weights, the first of them {first}"):
        train_one_step(with_adapter(deepseek_v3()), 1, **resume)
