"""Modules that predict further ahead learn under every loss, and their routers are balanced like the others."""

import pytest
import torch
from datasets import Dataset
from hf_moe.conversion import upcycle
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_moe import HfMoeForCausalLM, MoeSFTConfig, MoeSFTTrainer, MoeTrainer

from .balance_worker import NONE, ROWS, difference, train_one_step
from .conftest import tiny_hf_moe, tiny_tokenizer
from .models import SIZES, collate, hf_moe, rows


def with_modules(**changes):
    return hf_moe(num_mtp_layers=2, mtp_loss_coef=0.5, **changes)


def squared(outputs, labels, num_items_in_batch=None):
    return outputs.logits.square().sum() / 10_000


class Custom(MoeTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_loss_func=squared, **kwargs)


class Sft(MoeSFTTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, processing_class=tiny_tokenizer(), **kwargs)


# name -> trainer, its arguments, the loss beside that of the modules (None: the model's cross-entropy)
TRAINERS = {
    "model's loss": (MoeTrainer, {}, None),
    "user's loss": (Custom, {}, squared),
    "TRL's head": (Sft, {"config_class": MoeSFTConfig, "bf16": False, "gradient_checkpointing": False}, None),
}


def large_batch(main_loss, **coefficients) -> tuple[dict[str, torch.Tensor], float]:
    """The gradient of one large batch, and its MTP loss."""
    model, batch = with_modules(**NONE | coefficients).train(), collate(rows(ROWS))
    outputs = model(**batch)
    loss = main_loss(outputs, batch["labels"]) if main_loss else outputs.loss - 0.5 * outputs.mtp_loss
    extra = sum(value * outputs.router_losses[name] for name, value in coefficients.items() if main_loss)
    (loss + 0.5 * outputs.mtp_loss + extra).backward()
    return {name: x.grad for name, x in model.named_parameters()}, outputs.mtp_loss.item()


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("coefficients", [{}, {"router_aux_loss_coef": 3.0}, {"router_z_loss_coef": 0.3}], ids=str)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_gradient_is_that_of_one_large_batch(trainer, coefficients, accumulation):
    trainer_class, arguments, main_loss = TRAINERS[trainer]
    arguments = {"trainer_class": trainer_class, "log_each_router": True, **NONE, **arguments, **coefficients}
    gradient, trainer = train_one_step(with_modules(), accumulation, **arguments)
    expected, mtp_loss = large_batch(main_loss, **coefficients)
    assert difference(gradient, expected) < 1e-5
    assert "router_load_max/model.mtp_layers.1.block.mlp.gate" in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["mtp_loss"] == pytest.approx(mtp_loss, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_transformers_own_trainer_gives_the_same_gradient(accumulation):
    gradient, _ = train_one_step(with_modules(**NONE), accumulation, trainer_class=Trainer)
    assert difference(gradient, large_batch(None)[0]) < 1e-5


def test_a_dense_model_logs_what_its_modules_learn():
    model = with_modules(**NONE | {"mlp_layer_types": ["dense", "dense"]})
    _, trainer = train_one_step(model, 2, max_steps=3, learning_rate=1e-2)
    logged = [entry["mtp_loss"] for entry in trainer.state.log_history if "mtp_loss" in entry]
    assert len(logged) == 3 and logged[2] < logged[0] - 0.1


def test_packed_documents_end_the_targets(tmp_path):
    """As TRL packs them: the masks that the decoder reports know where each document ends."""
    rows = Dataset.from_list([{"text": "red " * count} for count in (1, 2, 3, 4, 5)])
    packed = {"packing": True, "max_length": 40, "per_device_train_batch_size": 2, "max_steps": 1}
    plain = {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    model, seen = tiny_hf_moe(), []
    model.add_mtp_layers(2)
    model.model.register_forward_hook(lambda module, args, kwargs, out: seen.append((kwargs, out)), with_kwargs=True)
    args = MoeSFTConfig(output_dir=str(tmp_path), **packed, **plain)
    MoeSFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tiny_tokenizer()).train()
    kwargs, outputs = seen[0]
    positions = kwargs["position_ids"][0].tolist()
    starts = [i for i, position in enumerate(positions) if position == 0]
    assert len(starts) > 1
    ends = [*starts[1:], len(positions)]
    for places, mask in enumerate(outputs.mtp_masks, start=1):
        expected = [i + places < min(end for end in ends if end > i) for i in range(len(positions))]
        assert mask[0].tolist() == expected


def test_an_upcycled_model_learns_to_look_ahead(tmp_path):
    sizes = {
        name: value for name, value in SIZES.items() if name not in ("num_experts_per_tok", "moe_intermediate_size")
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "sparse", experts=3, top_k=2, verify=False, progress=False)
    model = HfMoeForCausalLM.from_pretrained(tmp_path / "sparse")
    model.add_mtp_layers(2)
    _, trainer = train_one_step(model, 2, max_steps=4, learning_rate=1e-2)
    logged = [entry["mtp_loss"] for entry in trainer.state.log_history if "mtp_loss" in entry]
    assert logged[3] < logged[0] - 0.1
    trainer.save_model(tmp_path / "trained")
    loaded = HfMoeForCausalLM.from_pretrained(tmp_path / "trained")
    assert loaded.config.num_mtp_layers == 2 and loaded.config.provenance["method"] == "upcycle"
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ids = torch.arange(3, 10).unsqueeze(0)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "do_sample": False}
    assert torch.equal(loaded.generate(ids, use_mtp=True, **options), loaded.generate(ids, **options))


def test_weight_drops_late_in_the_run_and_again_after_resuming(tmp_path):
    schedule = {"mtp_loss_coef": 0.3, "mtp_loss_coef_after": 0.1, "mtp_loss_coef_until": 0.6, "max_steps": 5}
    schedule |= {"save_strategy": "steps", "save_steps": 2}
    seen = []

    def run(folder, **changes):
        model = with_modules(**NONE)
        model.register_forward_hook(lambda module, args, output: seen.append(module.config.mtp_loss_coef))
        train_one_step(model, 1, keep_folder=tmp_path / folder, **schedule, **changes)

    run("a")
    assert seen == [0.3, 0.3, 0.3, 0.1, 0.1]
    seen.clear()
    run("b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert seen == [0.1]


def test_weight_without_modules_is_refused():
    with pytest.raises(ValueError, match=r"mtp_loss_coef is 0.3, but the model has no modules"):
        train_one_step(hf_moe(), 1, mtp_loss_coef=0.3)
