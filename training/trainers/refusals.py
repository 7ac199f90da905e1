"""What hf_moe's trainers refuse: arguments without a use, and set-ups that would make the balance losses wrong."""

import sys

import torch
from torch import nn
from transformers import IntervalStrategy, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_moe.kernels.recomputation import SELECTIVE
from hf_moe.model.balancing import LOSSES
from hf_moe.model.configuration_hf_moe import HfMoeConfig
from hf_moe.model.router import in_float32
from hf_moe.routers import find_routers, routed_experts

from ..balance.moe_arguments import BALANCE_OVER, BIAS_UPDATES, MoeArguments, moe_argument
from ..host import checkpointing_function
from ..output.saved_dtype import name_of
from ..weights.average import check_average
from .multi_step import check_milestones

# What a recipe says of routing -> what leaves it out.
ROUTING = {**{name: 0.0 for name in LOSSES if hasattr(MoeArguments, name)}, "loss_coefs": None}
ROUTING |= {"router_bias_update_speed": None, "densemixer": False}


def check_arguments(trainer) -> None:
    """Raises ValueError, in one line, for what the trainer's model has no use for or cannot train with."""
    for check in (*CHECKS, *(CHECKS_OF_ROUTERS if trainer.routers else ())):
        check(trainer)


def check_numbers(trainer) -> None:
    for name in (*LOSSES, "mtp_loss_coef", "mtp_loss_coef_after", "router_bias_update_speed"):
        value = moe_argument(trainer.args, name)
        if value is not None and not value >= 0:  # so that a NaN fails, too
            raise ValueError(f"{name} is {value}; it must be at least 0.")
    if trainer.balance_over not in BALANCE_OVER:
        raise ValueError(f"balance_over is {trainer.balance_over!r}; it can be {' or '.join(BALANCE_OVER)}.")


def check_bias_speed(trainer) -> None:
    if trainer.bias_speed and not trainer.selection_bias.biases:
        raise ValueError(
            f"router_bias_update_speed is {trainer.bias_speed}, but no router of {type(trainer.moe).__name__} has a "
            "bias."
        )
    rule = trainer.selection_bias.rule
    if rule not in BIAS_UPDATES:
        raise ValueError(f"router_bias_update is {rule!r}; it can be {', '.join(BIAS_UPDATES)}.")
    if rule != "quantile":
        return
    if not 0 < trainer.bias_speed <= 1:
        raise ValueError(
            f"router_bias_update is quantile, and router_bias_update_speed, the part of the way to it, is "
            f"{trainer.bias_speed}: give a number above 0, at most 1."
        )
    groups, reached = trainer.balance.n_group, trainer.balance.groups.topk_group
    if reached < groups:
        raise ValueError(
            f"router_bias_update is quantile, which knows no groups, and a token takes experts of {reached} of "
            f"{groups}: set it to sign or zero_mean."
        )


def check_schedules(trainer) -> None:
    args = trainer.args
    if moe_argument(args, "lr_milestones"):
        check_milestones(moe_argument(args, "lr_milestones"), moe_argument(args, "lr_gamma"), args)
    if trainer.average is not None:
        check_average(trainer.average.decay, trainer)
    check_multi_token(trainer.moe, args)


def check_losses_can_be_read(trainer) -> None:
    unread = unread_routers(trainer)
    if unread is None:
        return
    given = {name: moe_argument(trainer.args, name) for name in LOSSES}
    own = {} if hasattr(trainer.moe, "active_losses") else trainer.balance.coefficients
    for name, value in (given | own).items():
        if value:
            raise ValueError(f"{name} is {value}, but {type(trainer.moe).__name__} {unread}")


def check_rope(trainer) -> None:
    args, kind = trainer.args, trainer.moe.config.model_type
    if args.gradient_checkpointing == SELECTIVE and args.use_liger_kernel and kind != HfMoeConfig.model_type:
        raise ValueError(
            "activation_checkpointing is selective, and Liger's RoPE writes over products of "
            f"{type(trainer.moe).__name__} unseen: set use_liger_kernel to false, or activation_checkpointing to true."
        )


def check_groups(trainer) -> None:
    coefficients = trainer.balance.coefficients
    for name in ("device_aux_loss_coef", "comm_aux_loss_coef"):
        if name in coefficients and trainer.balance.n_group == 1:
            raise ValueError(
                f"{name} is {coefficients[name]}, but n_group of {type(trainer.moe).__name__} is 1 and so is the "
                "loss: set config.n_group to the number of expert groups, or the coefficient to 0."
            )


def check_one_type(trainer) -> None:
    if not trainer.is_fsdp_enabled:
        return
    kept = tuple(in_float32(trainer.moe))
    trained = {name: x.dtype for name, x in trainer.moe.named_parameters() if x.requires_grad}
    own = next((name for name in trained if kept and name.endswith(kept)), None)
    other = next((dtype for dtype in trained.values() if dtype != torch.float32), None)
    if own is not None and other is not None:
        raise ValueError(
            f"FSDP2 shards weights of one type, and {own} stays in float32 beside others in {name_of(other)}: train "
            "with --dtype float32; bf16 then computes in bfloat16."
        )


def check_policies(trainer) -> None:
    if any(router.policy for router in trainer.routers.values()) and not trainer.takes_model_loss:
        raise ValueError(
            f"The routers of {type(trainer.moe).__name__} (reinforce) learn from each token's loss, which is the "
            "model's own: use MoeTrainer without label_smoothing_factor and compute_loss_func."
        )


def check_devices(trainer) -> None:
    args, coefficients = trainer.args, trainer.balance.coefficients
    if args.use_liger_kernel and args.device.type == "cpu":
        raise ValueError("use_liger_kernel is true, but Liger's kernels run on a GPU: set it to false on a CPU.")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (nn.DataParallel) cannot be balanced: start one process a GPU with "
            "torchrun or accelerate launch, or show one GPU with CUDA_VISIBLE_DEVICES."
        )
    parts = trainer.get_cp_size() * trainer.get_sp_size()
    if coefficients and parts > 1:
        raise ValueError(
            f"{', '.join(coefficients)} cannot be computed where sequences are split over {parts} processes (context "
            "or sequence parallelism): set them to 0."
        )


CHECKS = (check_numbers, check_bias_speed, check_schedules, check_rope, check_losses_can_be_read)
CHECKS_OF_ROUTERS = (check_groups, check_policies, check_devices, check_one_type)


def unread_routers(trainer) -> str | None:
    """Why no balance loss of the trainer's model can be had, in words; None where one can."""
    if trainer.routers:
        unknown = next((x for x in trainer.routers.values() if x.own is None and x.found.affinity is None), None)
        return unknown and f"has routers whose scores are unknown ({unknown.found.reason}): set it to 0."
    unread = mixtures(trainer.moe)
    if not unread:
        return "is not a Mixture-of-Experts model: no routers."
    return (
        f"is a Mixture-of-Experts model whose routers hf_moe does not read yet ({', '.join(unread)}: its classes name "
        "no router_logits of theirs): set it to 0, to train without."
    )


def mixtures(model: nn.Module) -> list[str]:
    """The classes in `model` that are routers or mixtures by their names."""
    if routed_experts(model.config)[0] == 1:
        return []
    kinds = {type(part).__name__ for part in model.modules()}
    return sorted(kind for kind in kinds if kind.endswith(("Router", "Gate", "MoE", "MoeBlock")))


def leave_out_routing(model: nn.Module, args: TrainingArguments) -> None:
    """On a dense model, set to nothing what a recipe says of routing and the command line does not; says so."""
    given = getattr(args, "given", None)
    if given is None or find_routers(model) or mixtures(model):
        return
    found = [name for name in ROUTING if getattr(args, name, None) and name not in given]
    for name in found:
        setattr(args, name, ROUTING[name])
    if found:
        print(f"{type(model).__name__} is dense: the recipe's {', '.join(found)} left out", file=sys.stderr)


def check_multi_token(model: nn.Module, args: TrainingArguments) -> None:
    """Raises ValueError where a weight is given for multi-token prediction that the model does not train."""
    for name in ("mtp_loss_coef", "mtp_loss_coef_after"):
        value = moe_argument(args, name)
        if value and not getattr(model.config, "num_mtp_layers", 0):
            raise ValueError(f"{name} is {value}, but the model has no modules for multi-token prediction.")


def check_checkpointing(model: nn.Module, coefficients: dict[str, float]) -> None:
    """Raises ValueError where reentrant activation checkpointing would give the balance losses no gradient."""
    for part in model.modules() if coefficients else ():
        checkpoint = checkpointing_function(part)
        # PyTorch's default is True, Transformers' is False.
        if checkpoint is not None and getattr(checkpoint, "keywords", {}).get("use_reentrant", True):
            raise ValueError(
                f"use_reentrant=True would cut {', '.join(coefficients)} off from the router; use "
                'activation_checkpointing_kwargs={"use_reentrant": False}, or set them to 0.'
            )


def check_best_metric(args: TrainingArguments, metrics: dict[str, float]) -> None:
    """Raises ValueError where the best checkpoint is chosen by what an evaluation does not measure."""
    name = args.metric_for_best_model
    if name is None or args.eval_strategy == IntervalStrategy.NO or f"eval_{name.removeprefix('eval_')}" in metrics:
        return
    raise ValueError(
        f"metric_for_best_model is {name}, which held-out rows are not measured by; it can be {', '.join(metrics)}."
    )


def check_finite(losses: list[torch.Tensor], step: int) -> None:
    """Raises ValueError where a training loss is no number, before it moves a weight. The Trainer would hide it.

    Of a whole step at once: each question to the device makes the host wait for it.
    """
    if losses and not (together := torch.stack(losses)).isfinite().all():
        loss = together[~together.isfinite()][0]
        raise ValueError(
            f"The loss is {loss.item()} in step {step + 1}: training stops before any weight moves by it. Go on from "
            "the last checkpoint with a lower --learning_rate or --max_grad_norm, or look for the rows that cause it."
        )


def without_rows(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """The ids of the tokens beyond a model's rows, in order."""
    return sorted(number for number in set(tokenizer.get_vocab().values()) if number >= rows)


def check_rows(model: PreTrainedModel, tokenizer) -> None:
    """Raises ValueError where `tokenizer` has special tokens, as that of padding, that `model` has no row for."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not isinstance(model, PreTrainedModel):
        return
    rows = model.config.get_text_config().vocab_size
    lacking = [number for number in without_rows(tokenizer, rows) if number in tokenizer.all_special_ids]
    if lacking:
        raise ValueError(
            f"The tokenizer's {tokenizer.convert_ids_to_tokens(lacking[0])} is token {lacking[0]}, beyond the model's "
            f"{rows:,} rows: call model.resize_token_embeddings({without_rows(tokenizer, rows)[-1] + 1}) before the "
            "trainer is made."
        )
