"""What a run of any stage decides beside the arguments of Transformers or TRL: routing, schedules, averages."""

import json
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments

from hf_moe.kernels.recomputation import SELECTIVE
from hf_moe.model.balancing import LOSSES

from ..host import RENAMED, by_both_names

MUON = "muon"  # as a value of `optim`
BALANCE_OVER = ("step", "micro_batch")
BIAS_UPDATES = ("sign", "zero_mean", "quantile")
CHECKPOINTING = (True, False, SELECTIVE)


@dataclass
class MoeArguments:
    """Losses, selection bias, metrics and more. A coefficient of None takes the model configuration's value."""

    balance_over: str = field(
        default="step",
        metadata={
            "help": "What the balance losses balance: all tokens of an optimizer step, or each micro-batch by itself. "
            "Of a step with several micro-batches all go forward before the first goes back: held, with activation "
            "checkpointing and where there is memory, else once more, without gradient, to count its tokens.",
            "choices": BALANCE_OVER,
        },
    )
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Of the load-balancing loss, which is 1 at balance whatever K is."}
    )
    router_z_loss_coef: float | None = field(default=None, metadata={"help": "Of the router z-loss."})
    seq_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Of the load-balancing loss within each sequence."}
    )
    device_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Of the load-balancing loss over n_group groups of experts."}
    )
    comm_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Of the communication-balance loss over n_group groups of experts."}
    )
    loss_coefs: dict | str | None = field(
        default=None,
        metadata={"help": "Coefficients of losses that a plugin has added to LOSSES, by their names there."},
    )
    router_bias_update_speed: float | None = field(
        default=None, metadata={"help": "Step of the selection bias (DeepSeek-V3: 1e-3); 0 freezes it."}
    )
    router_bias_update: str = field(
        default="sign",
        metadata={
            "help": "How the selection bias moves: by the sign of what an expert lacks; by that less its mean over "
            "all; or to the quantile of its scores with which an expert would have its share of the step's tokens: "
            "the speed is then the part of the way, 1 for all of it.",
            "choices": BIAS_UPDATES,
        },
    )
    router_bias_update_until: float = field(
        default=1.0, metadata={"help": "Fraction of the run after which the selection bias stands still."}
    )
    mtp_loss_coef: float | None = field(
        default=None, metadata={"help": "Of the loss of multi-token prediction (DeepSeek-V3: 0.3)."}
    )
    mtp_loss_coef_after: float | None = field(
        default=None, metadata={"help": "The same after mtp_loss_coef_until (DeepSeek-V3: 0.1)."}
    )
    mtp_loss_coef_until: float = field(
        default=1.0,
        metadata={"help": "Fraction of the run after which mtp_loss_coef_after holds (DeepSeek-V3: 0.68)."},
    )
    densemixer: bool = field(
        default=False,
        metadata={
            "help": "Train the router on the outputs of all experts (DenseMixer). The forward pass is the same; the "
            "backward pass also runs the experts that were not chosen, without their gradient."
        },
    )
    # `optim` was MUON, which Transformers does not know: `optim` is then what trains all but matrices.
    muon: bool = field(default=False, init=False)
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay a step of a moving average of the weights, kept on the CPU in float32 and saved as a model "
            "in output_dir/ema."
        },
    )
    lr_milestones: list[float] | None = field(
        default=None,
        metadata={
            "help": "Fractions of the run at which a constant learning rate is multiplied by lr_gamma (DeepSeek: "
            "0.8 0.9), under lr_scheduler_type constant or constant_with_warmup."
        },
    )
    lr_gamma: float = field(
        default=0.316, metadata={"help": "Factor at each of lr_milestones: 31.6%%, then 10%% of the maximum."}
    )
    activation_checkpointing: Literal[True, False, "selective"] | None = field(
        default=None,
        metadata={
            "help": "Keep a layer's input alone, and run its forward again in the backward pass; selective: keep its "
            "products and attention, too, and compute only what is between them again. Also known by its old name, "
            "gradient_checkpointing."
        },
    )
    activation_checkpointing_kwargs: dict | str | None = field(
        default=None, metadata={"help": "What torch.utils.checkpoint.checkpoint takes, as {use_reentrant: false}."}
    )
    log_each_router: bool = field(
        default=False, metadata={"help": "Log the routing metrics of each router beside their summary."}
    )
    log_routing_figures: bool = field(
        default=False,
        metadata={
            "help": "Draw load, entropy and co-activation at each log, to output_dir/figures, and to TensorBoard or "
            "Weights & Biases where report_to names them."
        },
    )

    def __post_init__(self):
        vars(self).update(by_both_names(vars(self)))
        if isinstance(self.loss_coefs, str):
            self.loss_coefs = json.loads(self.loss_coefs)
        if self.optim == MUON:
            self.muon, self.optim = True, "adamw_torch"
        super().__post_init__()
        check_recomputation(self)
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # memory is pinned for its way to a GPU; PyTorch warns where none is
        for old, new in RENAMED.items():  # which a host without the new names has read, and changed
            setattr(self, new, getattr(self, old))


def check_recomputation(args: TrainingArguments) -> None:
    """Raises ValueError for a kind of activation checkpointing that there is not, or that goes not with the rest."""
    if args.gradient_checkpointing not in CHECKPOINTING:
        known = ", ".join(str(x).lower() for x in CHECKPOINTING)
        raise ValueError(f"activation_checkpointing is {args.gradient_checkpointing!r}; it can be {known}.")
    if args.gradient_checkpointing != SELECTIVE:
        return
    if args.torch_compile:
        raise ValueError(
            "activation_checkpointing is selective, which chooses among operators as they run, of which torch_compile "
            "makes others: set one of them to false."
        )
    if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "activation_checkpointing is selective, which re-entrant checkpointing cannot do: use "
            'activation_checkpointing_kwargs={"use_reentrant": False}.'
        )


@dataclass
class MoeTrainingArguments(MoeArguments, TrainingArguments):
    """TrainingArguments with what MoeTrainer adds."""


def row_processes(args: TrainingArguments) -> int:
    """How many processes of a run have rows of their own: those of a pipeline have the same."""
    return args.world_size // getattr(args, "pipeline_parallel_size", 1)


def moe_argument(args: TrainingArguments, name: str):
    """A field of MoeArguments, or its default where `args` are plain TrainingArguments; of a loss that has no field,
    its entry in `loss_coefs`."""
    if not hasattr(MoeArguments, name) and name in LOSSES:
        return (moe_argument(args, "loss_coefs") or {}).get(name)
    return getattr(args, name, getattr(MoeArguments, name))
