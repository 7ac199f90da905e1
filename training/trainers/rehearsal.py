"""The optimizer, the schedule and the compiler that the arguments name, tried before anything is loaded."""

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler

STEPS = 100
# Of the steps, those in which warmup_stable_decay comes down where nothing else is said: enough, by MiniCPM
# (https://arxiv.org/abs/2404.06395, 4.3).
DECAY = 0.1


def schedule_arguments(args: TrainingArguments, steps: int) -> dict[str, Any]:
    """`lr_scheduler_kwargs` with what the schedule cannot do without."""
    given = dict(args.lr_scheduler_kwargs or {})
    if args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
        left = steps - args.get_warmup_steps(steps)
        given.setdefault("num_decay_steps", max(1, min(math.ceil(DECAY * steps), left)))
    return given


def rehearse(args: TrainingArguments, device: torch.device | str) -> None:
    """One step of the optimizer and of its schedule. Raises a ValueError that names which of them cannot be had.

    Of a package that is not there, an argument that it needs or does not know, or a device that it does not run on.
    """
    args = copy.copy(args)
    compile_or_say_why(args)
    if args.learning_rate is None:  # of a scaling law, later
        args.learning_rate = 1e-3
    if args.optim_target_modules is not None:  # of the model's modules, which only the model knows
        return
    name = f"optim {args.optim.value}"
    try:
        with torch.compiler.set_stance("force_eager"):  # some compile their step, for each shape anew
            optimizer = make_optimizer(args, nn.Linear(64, 64, device=device))
        kwargs = schedule_arguments(args, STEPS)
        name = f"lr_scheduler_type {args.lr_scheduler_type.value} with lr_scheduler_kwargs {kwargs}"
        warmup = args.get_warmup_steps(STEPS)
        get_scheduler(args.lr_scheduler_type, optimizer, warmup, STEPS, scheduler_specific_kwargs=kwargs)
    except Exception as error:  # of libraries that raise each its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} cannot be had here: {reason}") from error


def check_schedule(schedule: Any, args: TrainingArguments, steps: int) -> None:
    """Raises a ValueError where a run's own numbers of steps leave its schedule without a learning rate."""
    name, warmup = args.lr_scheduler_type.value, args.get_warmup_steps(steps)
    try:
        for scale in getattr(schedule, "lr_lambdas", ()):
            for step in (0, warmup, steps):
                scale(step)
    except ArithmeticError as error:
        raise ValueError(
            f"lr_scheduler_type {name} has no learning rate for {steps} steps of which {warmup} "
            f"warm up ({error}): give fewer --warmup_steps, or another schedule."
        ) from error


def compile_or_say_why(args: TrainingArguments) -> None:
    """Look up how `torch_compile` is to compile. Raises a ValueError that names what PyTorch does not know."""
    if not args.torch_compile:
        return
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    try:
        torch.compile(nn.Identity(), backend=backend, mode=mode)
    except Exception as error:  # of a type of its own for each
        reason = " ".join(str(error).split())
        raise ValueError(f"torch_compile_backend {backend}, torch_compile_mode {mode}: {reason}") from error


def make_optimizer(args: TrainingArguments, model: nn.Module) -> torch.optim.Optimizer:
    """As `Trainer.create_optimizer`, after a step."""
    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    parameters = next((kwargs.pop(key) for key in ("params", "model", "optimizer_dict") if key in kwargs), None)
    optimizer = kind(list(model.parameters()) if parameters is None else parameters, **kwargs)
    model(torch.ones(1, 64, device=next(model.parameters()).device)).sum().backward()
    optimizer.step()
    return optimizer
