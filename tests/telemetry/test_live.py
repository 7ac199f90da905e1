"""Figures while a model trains: what is counted, and where the pictures go."""

import pytest
import torch
from hf_moe.training.balance.moe_arguments import MoeTrainingArguments
from hf_moe.training.trainers.trainer import MoeTrainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_moe.routers import captured, find_routers

from ..training.models import MODELS, collate, hf_moe, rows

live = pytest.importorskip("hf_moe.telemetry.live", exc_type=ImportError)


class TensorBoardCallback(TrainerCallback):
    """A double of Transformers' own, which is found by its name."""

    def __init__(self):
        self.tb_writer, self.figures = self, []

    def add_figure(self, name, figure, step):
        self.figures.append((name, step))


class WandbCallback(TrainerCallback):
    def __init__(self):
        self._wandb, self.logged = self, []

    def Image(self, picture):
        return picture.size

    def log(self, values):
        self.logged.append(values)


def make(model, folder, callbacks, trainer_class=Trainer, arguments_class=TrainingArguments, **arguments):
    args = arguments_class(
        str(folder),
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=3,
        learning_rate=0.0,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        **arguments,
    )
    return trainer_class(
        model=model, args=args, train_dataset=rows(6), data_collator=collate, callbacks=list(callbacks)
    )


@pytest.mark.parametrize("name", ["hf_moe", "mixtral"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_what_is_counted(name, checkpointing, tmp_path, monkeypatch):
    """The shares of a step are those of its tokens that are not padding, in a forward of their own."""
    torch.set_num_threads(1)
    model, seen = MODELS[name](), []
    monkeypatch.setattr(live, "draw", lambda shown, numbers: seen.append(numbers["layers"]) or [])
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = make(model, tmp_path, [TensorBoardCallback()], **(kwargs if checkpointing else {}))
    trainer.add_callback(live.RoutingFigures(trainer))
    batches = list(trainer.get_train_dataloader())
    monkeypatch.setattr(trainer, "get_train_dataloader", lambda: batches)
    trainer.train()
    assert len(seen) == 2 * len(live.SHOWN)
    routers = find_routers(model)
    for batch, layers in zip(batches, seen[:: len(live.SHOWN)], strict=True):
        kept = batch["attention_mask"].flatten().bool()
        with captured(routers, 2) as routings, torch.no_grad():
            model.train()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for layer, routing in zip(layers, routings.values(), strict=True):
            counts = torch.bincount(routing.index_SK[kept].flatten(), minlength=6)
            assert layer["load"] == pytest.approx((counts * 6 / counts.sum()).tolist())
    hooks = [x for m in model.modules() for x in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any(hook.__qualname__.startswith("RoutingFigures") for hook in hooks)


def test_where_the_pictures_go(tmp_path):
    torch.set_num_threads(1)
    board, wandb = TensorBoardCallback(), WandbCallback()
    model = hf_moe(n_group=1, topk_group=1)
    make(model, tmp_path, [board, wandb], MoeTrainer, MoeTrainingArguments, log_routing_figures=True).train()
    names = ["routing/load", "routing/entropy", "routing/coactivation-layer-0", "routing/coactivation-layer-1"]
    assert board.figures == [(name, step) for step in (1, 2) for name in names]
    assert [[key for key in entry if key != "train/global_step"] for entry in wandb.logged] == [[x] for x in 2 * names]
    assert [entry["train/global_step"] for entry in wandb.logged] == [1] * 4 + [2] * 4
    assert {f"routing/{path.stem}" for path in (tmp_path / "figures" / "routing").iterdir()} == set(names)


def test_mistakes(tmp_path):
    dense = hf_moe(mlp_layer_types=["dense", "dense"])
    with pytest.raises(ValueError, match="is dense"):
        live.RoutingFigures(make(dense, tmp_path, [TensorBoardCallback()]))
