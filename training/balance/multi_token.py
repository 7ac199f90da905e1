"""Multi-token prediction under trainers that compute the loss themselves: the modules run, and their loss counts."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import TrainingArguments

from .moe_arguments import moe_argument


def mtp_coefficient(args: TrainingArguments, done: float) -> float | None:
    """What the arguments say it is after the fraction `done` of a run; None: what the configuration says."""
    after = moe_argument(args, "mtp_loss_coef_after")
    if after is not None and done >= moe_argument(args, "mtp_loss_coef_until"):
        return after
    return moe_argument(args, "mtp_loss_coef")


def multi_token_decoder(model: nn.Module) -> nn.Module | None:
    """The decoder that has MTP modules, if they are trained."""
    config = model.config
    trained = hasattr(model, "mtp_loss") and config.num_mtp_layers > 0 and config.mtp_loss_coef > 0
    return model.base_model if trained else None


@contextmanager
def looking_ahead(decoder: nn.Module | None) -> Iterator[list]:
    """Make the decoder run its MTP modules inside the context, also without labels, and collect its outputs."""
    outputs = []
    if decoder is None:
        yield outputs
        return
    wanted = {"output_mtp_hidden_states": True}
    ask = decoder.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs | wanted), with_kwargs=True)
    keep = decoder.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        ask.remove()
        keep.remove()
