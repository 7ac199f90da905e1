"""MoeTrainer on every mixture of experts in Transformers: the balance loss reaches the routers, biases move."""

from contextlib import nullcontext

import pytest
import torch
from hf_moe.training.balance.dense_mixer import add_dense_mixer, check_dense_mixer
from hf_moe.training.balance.moe_arguments import MoeTrainingArguments
from hf_moe.training.balance.router_replay import check_replayable, of_batches, recording, replayed
from hf_moe.training.host_trl import show_backbone
from hf_moe.training.trainers.trainer import MoeTrainer
from hf_moe.training.weights.adapters import AdapterArguments, add_adapter
from hf_moe.training.weights.esft import (
    load_rows,
    merge_rows,
    save_rows,
    score_experts,
    select_experts,
    split_experts,
)
from safetensors.torch import load_file
from trl.trainer.utils import add_fused_lm_head

from hf_moe.model.balancing import expert_loss, routed, statistics
from hf_moe.reading import whole_model
from hf_moe.routers import captured, find_routers, routed_experts
from tests.families import EXPERTS, FAMILIES, NOT_FOR, tiny

from .policies import BYTES, run_tiny, save_model


def rows(count: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 100, (count, 9), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_two_steps_balance_every_family(model_type, tmp_path):
    model = tiny(model_type)
    options = {"router_aux_loss_coef": 0.01, "gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 1e-3}
    options |= {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    trainer = MoeTrainer(model, MoeTrainingArguments(str(tmp_path), logging_steps=1, **options), train_dataset=rows())
    biased = bool(trainer.selection_bias.biases)
    if biased:
        trainer.bias_speed = 1e-3
    before = {name: x.detach().clone() for name, x in trainer.selection_bias.biases.items()}
    routers = {id(x) for router in trainer.routers.values() for x in router.module.parameters() if x.dim() == 2}
    weights = {name: x.detach().clone() for name, x in model.named_parameters() if id(x) in routers}
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(entry["aux_loss"] > 0 for entry in logged)
    moved = [name for name, x in model.named_parameters() if name in weights and not torch.equal(x, weights[name])]
    assert moved
    for name, bias in trainer.selection_bias.biases.items():
        steps = (bias - before[name]).abs() / 1e-3
        assert steps.max() > 0.5 and (steps.round() - steps).abs().max() < 0.01, name


def refused(model_type: str, what: str):
    """Inside, a refusal is expected if it is not for this family."""
    return pytest.raises(ValueError, match=REFUSALS[what]) if model_type in NOT_FOR[what] else nullcontext()


REFUSALS = {
    "esft": "^ESFT needs fused experts beside",
    "lora": "^lora_parts names routed_experts, but the model has attention only",
    "replay": "^router_replay needs routers whose weights are known for experts that were chosen elsewhere",
    "densemixer": "^densemixer is on, but .* does not choose the top k of fused experts",
}


def loss_of(model):
    ids = torch.stack([row["input_ids"] for row in rows(2)])
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_balance_loss_alone_reaches_every_router(model_type):
    model = tiny(model_type)
    routers = find_routers(model)
    with captured(routers, routed_experts(model.config)[1]) as routings:
        loss_of(model)
    for name, routing in routings.items():
        scores = routers[name].affinity(routing.logits_TE.float())
        batch = routed(routing.logits_TE, scores, routing.index_SK)
        model.zero_grad()
        expert_loss(batch, statistics(batch), model.config).backward(retain_graph=True)
        assert any(x.grad is not None and x.grad.any() for x in routers[name].module.parameters()), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_esft_trains_the_busiest_experts_of_every_family(model_type, tmp_path):
    model = tiny(model_type)
    ids = torch.stack([row["input_ids"] for row in rows(2)])
    chosen = select_experts(score_experts(model, [{"input_ids": ids}]), 0.5)
    with refused(model_type, "esft"):
        split_experts(model, chosen)
        loss_of(model.train()).backward()
        trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
        assert len(trained) >= 2 * len(chosen) and all(x.grad.any() for x in trained.values())
        with torch.no_grad():
            for x in trained.values():
                x.add_(1)
        save_rows(model, tmp_path)
        whole = tiny(model_type)
        load_rows(whole, tmp_path)
        merge_rows(model)
        assert all(torch.equal(x, model.state_dict()[name]) for name, x in whole.state_dict().items())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_adapter_on_the_routed_experts_of_every_family(model_type):
    model = tiny(model_type)
    words = (".experts.", ".mlp.input_linear", ".mlp.output_linear")  # the last two are JetMoE's
    experts = [name for name, x in model.named_parameters() if x.dim() == 3 and any(word in name for word in words)]
    with refused(model_type, "lora"):
        adapted, said = add_adapter(model, AdapterArguments(lora_parts=["routed_experts"], lora_r=2))
        assert said.startswith(f"adapter on {len(experts)} matrices of routed_experts")
        loss_of(adapted.train()).backward()
        trained = {name: x for name, x in adapted.named_parameters() if x.requires_grad}
        assert len(trained) == 2 * len(experts) and all(x.grad is not None for x in trained.values())
        assert all(x.grad.any() for name, x in trained.items() if "lora_B" in name)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_densemixer_teaches_the_routers_of_every_family(model_type):
    model = tiny(model_type).train()
    routers = find_routers(model)

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        loss = loss_of(model)
        loss.backward()
        return loss, [x.grad.clone() for r in routers.values() for x in r.module.parameters() if x.grad is not None]

    (loss, plain), mixed = gradients(), None
    with refused(model_type, "densemixer"):
        check_dense_mixer(model, routers)
        add_dense_mixer(routers)
        again, mixed = gradients()
        assert torch.equal(again, loss)
        assert not all(torch.allclose(a, b) for a, b in zip(plain, mixed, strict=True))


@pytest.mark.parametrize("model_type", ["gpt_oss", "minimax_m2", "llama4_text", "gemma4_text", "deepseek_v4"])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(model_type, tmp_path):
    def run(folder):
        model = tiny(model_type)
        options = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "router_aux_loss_coef": 0.01}
        options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True}
        arguments = MoeTrainingArguments(str(folder), report_to="none", learning_rate=1e-3, **options)
        trainer = MoeTrainer(model, arguments, train_dataset=rows(16))
        if trainer.selection_bias.biases:
            trainer.bias_speed = 1e-3
        return model, trainer

    model, trainer = run(tmp_path)
    trainer.train()
    again, trainer = run(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    start, unbroken, resumed = (x.state_dict() for x in (tiny(model_type), model, again))
    assert all(torch.equal(x, resumed[name]) for name, x in unbroken.items())
    assert not all(torch.equal(x, start[name]) for name, x in unbroken.items())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_replayed_experts_of_every_family(model_type):
    """Its own choices again give its own logits; other experts are those that compute."""
    model = tiny(model_type)
    routers = find_routers(model)
    ids = torch.stack([row["input_ids"] for row in rows(2)])
    with refused(model_type, "replay"), torch.no_grad():
        check_replayable(routers, model)
        with recording(routers) as calls:
            logits = model(input_ids=ids, use_cache=False).logits
        own = of_batches(calls, ids.shape[1])
        with replayed(routers, own):
            again = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)
        others = {name: (x + 1) % EXPERTS for name, x in own.items()}
        with replayed(routers, others), recording(routers) as calls:
            changed = model(input_ids=ids, use_cache=False).logits
        assert not torch.equal(changed, logits)
        assert all(torch.equal(x, others[name]) for name, x in of_batches(calls, ids.shape[1]).items())


# TRL does not divide by Inkling's logits_mup_width_multiplier.
@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "inkling_text"])
def test_the_fused_head_has_the_loss_of_every_family(model_type):
    model = tiny(model_type).eval()
    ids = torch.stack([row["input_ids"] for row in rows(2)])
    scores = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    show_backbone(model)
    add_fused_lm_head(model)
    fused = model(input_ids=ids, labels=ids, fused_lm_head=True, output_router_logits=False)
    torch.testing.assert_close(fused.log_probs, scores.gather(-1, ids[:, 1:, None])[..., 0], rtol=1e-4, atol=1e-5)


def test_a_model_without_a_part_below_its_head():
    model = tiny("llama4_text")
    model.further = tiny("llama4_text").model
    with pytest.raises(ValueError, match=r"^Llama4ForCausalLM does not say which .* there are model, further\.$"):
        show_backbone(model)


@pytest.mark.parametrize(
    ("stage", "extra"),
    [
        ("dpo", "--precompute_ref_log_probs true"),
        ("dpo", "--precompute_ref_log_probs true --lora_parts attention"),
        ("dpo", "--precompute_ref_log_probs false"),
        ("grpo", "--beta 0.1 --router_replay none --max_completion_length 4"),
    ],
)
def test_a_policy_whose_class_misnames_its_base(stage, extra, tmp_path):
    source = save_model(tmp_path / "source", tiny("llama4_text", **BYTES))
    metrics, _ = run_tiny(stage, source, tmp_path / "out", "--max_steps", "1", "--use_cpu", "true", *extra.split())
    assert "train_loss" in metrics
    if "lora" not in extra:
        before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
        assert before.keys() == after.keys()
        whole_model(tmp_path / "out")
