"""The figures of the report while a model trains: files beside the run, and images where the Trainer reports."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..routers import Router, Routing, find_routers, routed_experts, token_mask
from ..staging import written_aside
from .counts import RARE, RouterCounts
from .figures import draw, png
from .measures import router_numbers
from .tracing import layer_labels

SHOWN = ("load", "entropy", "coactivation")


def to_tensorboard(callback: TrainerCallback, name: str, figure: Figure, step: int) -> None:
    callback.tb_writer.add_figure(name, figure, step)


def to_wandb(callback: TrainerCallback, name: str, figure: Figure, step: int) -> None:
    wandb = callback._wandb
    wandb.log({name: wandb.Image(Image.open(io.BytesIO(png(figure)))), "train/global_step": step})


def write(path: Path, picture: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_bytes(picture)


# The Trainer's callback that reports somewhere -> how it takes a picture.
REPORTERS: dict[str, Callable[[TrainerCallback, str, Figure, int], None]] = {
    "TensorBoardCallback": to_tensorboard,
    "WandbCallback": to_wandb,
}


class RoutingFigures(TrainerCallback):
    """Logs load, entropy and co-activation over the tokens since the last log.

    `trainer.add_callback(RoutingFigures(trainer))`, for any Trainer and any mixture of experts of Transformers.
    Padding does not count. The latest lie in `output_dir`/figures; all go to TensorBoard and Weights & Biases, where
    `report_to` says so. Raises ValueError where there is no router.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.handles, self.counts, self.mask = [], {}, None
        if not find_routers(trainer.model):
            raise ValueError("The model is dense: it has no router to draw figures of.")

    def reporters(self) -> dict[str, TrainerCallback]:
        found = {type(callback).__name__: callback for callback in self.trainer.callback_handler.callbacks}
        return {name: found[name] for name in REPORTERS if name in found}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = self.trainer.model
        self.routers = find_routers(model)
        config = getattr(model, "config", None)
        self.top_k = routed_experts(config)[1]
        self.remove_hooks()
        self.counts.clear()
        self.handles = [
            router.module.register_forward_hook(self.counting(name, router)) for name, router in self.routers.items()
        ]
        self.handles.append(model.register_forward_pre_hook(self.keep_mask, with_kwargs=True))

    def keep_mask(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.mask = token_mask(kwargs) if kwargs.get("attention_mask") is not None else None

    def counting(self, name: str, router: Router) -> Callable:
        def hook(module, args, output):
            if module.training:
                with torch.no_grad():
                    self.count(name, router.read(router.mask(args), output, self.top_k))

        return hook

    def count(self, name: str, routing: Routing) -> None:
        """Checkpointing runs a forward twice: every token then counts twice, which changes no share."""
        tokens = len(routing.logits_TE)
        if name not in self.counts:
            self.counts[name] = RouterCounts(routing.experts, 1, 0, routing.logits_TE.device)
        mask = self.mask if self.mask is not None and self.mask.numel() == tokens else torch.ones(tokens)
        kept_T = mask.flatten().nonzero().flatten().to(routing.logits_TE.device)
        nothing_T = torch.full_like(kept_T, -1)
        self.counts[name].add(routing, self.routers[name], 0, kept_T, nothing_T, nothing_T)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if "loss" not in (logs or {}) or not self.counts:
            return
        for counts in self.counts.values():
            counts.reduce(self.trainer.accelerator)
        if state.is_world_process_zero:
            labels = layer_labels(self.counts)
            layers = [{"label": labels[name]} | router_numbers(x, RARE) for name, x in self.counts.items()]
            for shown in SHOWN:
                for title, figure in draw(shown, {"layers": layers}):
                    name = "/".join(["routing", "-".join([shown, *title.split()])])
                    write(Path(args.output_dir) / "figures" / f"{name}.png", png(figure))
                    for kind, callback in self.reporters().items():
                        REPORTERS[kind](callback, name, figure, state.global_step)
        self.counts.clear()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.remove_hooks()

    def remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
