"""What a run decides about routing, beside the arguments of Transformers or TRL."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

BALANCE_OVER = ("step", "micro_batch")


@dataclass
class MoeArguments:
    """Balance losses, selection bias and routing metrics. None takes the value in the model's configuration."""

    balance_over: str = field(
        default="step",
        metadata={
            "help": "What the balance losses balance: all tokens of an optimizer step, or each micro-batch by itself. "
            "A step with several micro-batches takes one more forward, without gradient, to count its tokens.",
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
    router_bias_update_speed: float | None = field(
        default=None, metadata={"help": "Step of the selection bias (DeepSeek-V3: 1e-3); 0 freezes it."}
    )
    router_bias_update_until: float = field(
        default=1.0, metadata={"help": "Fraction of the run after which the selection bias stands still."}
    )
    log_each_router: bool = field(
        default=False, metadata={"help": "Log the routing metrics of each router beside their summary."}
    )


@dataclass
class MoeTrainingArguments(MoeArguments, TrainingArguments):
    """TrainingArguments with what MoeTrainer adds."""


def moe_argument(args: TrainingArguments, name: str):
    """A field of MoeArguments, or its default where `args` are plain TrainingArguments."""
    return getattr(args, name, getattr(MoeArguments, name))
