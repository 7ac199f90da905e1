"""TRL's trainer for mixture-of-experts models: the model's own balance losses, and a resume that restores all."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer


class MoeSFTTrainer(SFTTrainer):
    """SFTTrainer that trains a model with `router_losses` on those losses, and restores every weight on resume.

    TRL's fused head never calls the model's own forward: it takes Mixtral's balance loss, which pools the layers (its
    minimum is K, not 1) and knows neither the z-loss nor other score functions. Here the losses are the model's, added
    to the training loss exactly once, whatever the loss type, and kept out of the evaluation loss; both are logged.
    Other mixture-of-experts models keep TRL's loss.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.moe = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.adds_router_losses = hasattr(self.moe, "router_losses") and bool(self.moe.active_losses())
        if self.adds_router_losses:
            # Otherwise TRL would compute and add its own.
            self.aux_loss_enabled = False
            self.moe.config.output_router_logits = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.adds_router_losses:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with recorded_routing(self.moe.base_model) as recorded:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # The first forward is the one that the loss came from; TRL may add others without gradient for its metrics.
        aux_loss, losses = self.moe.router_losses(recorded[0], inputs.get("attention_mask"))
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in ({"router_aux_loss_coef": aux_loss} | losses).items():
            name = name.removeprefix("router_").removesuffix("_coef")
            metrics[name].append(self.accelerator.gather_for_metrics(value.detach()).mean().item())
        if not self.model.training:
            return result

        # Means over one micro-batch: with `num_items_in_batch` the Trainer leaves averaging over the step to us.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        router_loss = sum(getattr(self.moe.config, name) * value for name, value in losses.items()) / steps
        if return_outputs:
            return result[0] + router_loss.to(result[0].device), result[1]
        return result + router_loss.to(result.device)

    def _run_epoch(self, *args, **kwargs):
        # The Trainer would take one more step with a run that was cut short between its last step and its end.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restore every weight of the checkpoint; raises ValueError if one is missing.

        The Trainer's own way leaves experts that Transformers stores one by one as they are, with a warning
        (https://github.com/huggingface/transformers/issues/48805).
        """
        model = self.model if model is None else model
        if not isinstance(model, PreTrainedModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = load_model(resume_from_checkpoint, type(model), config=model.config, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


@contextmanager
def recorded_routing(decoder: nn.Module) -> Iterator[list]:
    """Ask `decoder` for what its routers did, and collect its outputs, while the context is open."""
    outputs = []
    wanted = dict.fromkeys(("output_router_logits", "output_router_indices", "output_router_tokens"), True)
    ask = decoder.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs | wanted), with_kwargs=True)
    keep = decoder.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        ask.remove()
        keep.remove()


def load_model(path: str, auto_class=AutoModelForCausalLM, **kwargs) -> PreTrainedModel:
    """`auto_class.from_pretrained(path)`; raises ValueError where weights are missing or unreadable."""
    try:
        model, info = auto_class.from_pretrained(path, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"{path} has weights that cannot be read: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of the model's weights, the first of them {missing[0]}.")
    return model


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes its state file last."""
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint in `folder`; one that a kill cut short does not count."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = [path.name.removeprefix(prefix) for path in Path(folder).glob(f"{prefix}*")]
    newest_first = sorted((int(step) for step in steps if step.isdigit()), reverse=True)
    checkpoints = (Path(folder) / f"{prefix}{step}" for step in newest_first)
    return next((str(checkpoint) for checkpoint in checkpoints if is_complete(checkpoint)), None)
