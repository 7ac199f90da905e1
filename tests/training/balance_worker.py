"""The gradient of a step cut into micro-batches and processes beside that of one large batch.

Run by torchrun on two processes it leaves with the relative differences; the tests import it for one process.
"""

import tempfile
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel, TrainerCallback

from hf_moe import MoeTrainer, MoeTrainingArguments
from tests.processes import leave
from tests.training.models import collate, deepseek_v3, hf_moe, olmoe, rows

ROWS = 32
# Large, so that a wrong balance loss shows beside the cross-entropy.
COEFFICIENTS = {
    "router_aux_loss_coef": 3.0,
    "device_aux_loss_coef": 3.0,
    "comm_aux_loss_coef": 3.0,
    "seq_aux_loss_coef": 3.0,
    "router_z_loss_coef": 0.3,
}
HELD = COEFFICIENTS | {"gradient_checkpointing": True, "max_steps": 3, "log_each_router": True}
NONE = dict.fromkeys(COEFFICIENTS, 0.0)
MODELS = {"hf_moe": hf_moe, "olmoe": lambda: olmoe(n_group=3, topk_group=2), "deepseek_v3": deepseek_v3}


class Gradient(TrainerCallback):
    """The gradient of the last optimizer step, before the step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.value = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def train_one_step(
    model,
    accumulation: int,
    processes: int = 1,
    trainer_class=MoeTrainer,
    config_class=MoeTrainingArguments,
    keep_folder=None,
    resume_from_checkpoint=None,
    **arguments,
):
    """The gradient of one step over all rows (or the last of several), and the trainer."""
    gradient = Gradient()
    with nullcontext(keep_folder) if keep_folder else tempfile.TemporaryDirectory() as folder:
        args = {
            "max_steps": 1,
            "per_device_train_batch_size": ROWS // accumulation // processes,
            "gradient_accumulation_steps": accumulation,
            "max_grad_norm": 0.0,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        trainer = trainer_class(
            model=model,
            args=config_class(output_dir=str(folder), **args | arguments),
            train_dataset=Dataset.from_list(rows(ROWS)),
            data_collator=collate,
            callbacks=[gradient],
        )
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return gradient.value, trainer


def slow_losses(logits, chosen, mask, sigmoid: bool, groups: int, reached: int) -> dict[str, torch.Tensor]:
    """The five losses of one router from their papers' formulas: [B, S, E] logits, [B, S, K] choice, [B, S] mask."""
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    scores = scores / scores.sum(-1, keepdim=True)
    experts, top_k = logits.shape[-1], chosen.shape[-1]
    tokens = [(b, t) for b in range(len(mask)) for t in range(mask.shape[1]) if mask[b, t]]

    def f_and_p(some):
        f = [experts / (top_k * len(some)) * sum(int(i in chosen[b, t]) for b, t in some) for i in range(experts)]
        return f, sum(scores[b, t] for b, t in some) / len(some)

    f, p = f_and_p(tokens)
    sequences = [f_and_p([(b, t) for b, t in tokens if b == row]) for row in range(len(mask))]
    size = experts // groups
    device = communication = 0
    for d in range(groups):
        members = range(d * size, (d + 1) * size)
        sent = sum(any(int(i) in members for i in chosen[b, t]) for b, t in tokens)
        share = sum(p[i] for i in members)
        device = device + sum(f[i] for i in members) / size * share
        communication = communication + groups / (reached * len(tokens)) * sent * share
    return {
        "router_aux_loss_coef": sum(f[i] * p[i] for i in range(experts)),
        "device_aux_loss_coef": device,
        "comm_aux_loss_coef": communication,
        "seq_aux_loss_coef": sum(f[i] * p[i] for f, p in sequences for i in range(experts)) / len(sequences),
        "router_z_loss_coef": sum(logits[b, t].logsumexp(-1) ** 2 for b, t in tokens) / len(tokens),
    }


@cache
def one_large_batch(model: str) -> dict[str, dict[str, torch.Tensor]]:
    """Loss -> the gradient of the mean cross-entropy of all tokens plus that loss, weighted, without any trainer."""
    model = MODELS[model]().train()
    outputs = []
    gates = [layer.mlp.gate for layer in model.model.layers]
    for gate in gates:
        gate.register_forward_hook(lambda module, args, output: outputs.append(output))
    batch = collate(rows(ROWS))
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    layers, shape = [], batch["input_ids"].shape
    for gate, (router_logits, _, chosen, *_) in zip(gates, outputs, strict=True):
        sigmoid = getattr(gate, "e_score_correction_bias", None) is not None
        router_logits, chosen = router_logits.view(*shape, -1), chosen.view(*shape, -1)
        layers.append(slow_losses(router_logits, chosen, batch["attention_mask"], sigmoid, groups=3, reached=2))
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = {}
    for name, value in COEFFICIENTS.items():
        total = loss + value * sum(losses[name] for losses in layers) / len(layers)
        gradients[name] = dict(zip(names, torch.autograd.grad(total, parameters, retain_graph=True), strict=True))
    return gradients


def difference(gradient: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all parameters together or of the routers' alone, whichever is further off."""
    assert gradient.keys() == expected.keys()

    def relative(names):
        a, b = (torch.cat([x[name].flatten().double() for name in names]) for x in (gradient, expected))
        return ((a - b).norm() / b.norm()).item()

    return max(relative(expected), relative([name for name in expected if name.endswith("gate.weight")]))


def step_difference(model: str, loss: str, accumulation: int, processes: int = 1, **arguments) -> float:
    coefficients = NONE | {loss: COEFFICIENTS[loss]}
    gradient, _ = train_one_step(MODELS[model](), accumulation, processes, **coefficients, **arguments)
    return difference(gradient, one_large_batch(model)[loss])


def forwards_of(train, *args, **kwargs) -> tuple[Any, int]:
    """What `train` returns, and how many micro-batches its decoder saw, counted or trained on."""
    decoders = []

    def see(module, args):
        if isinstance(module, PreTrainedModel) and module.base_model is module:
            decoders.append(module)

    handle = register_module_forward_pre_hook(see)
    try:
        return train(*args, **kwargs), len(decoders)
    finally:
        handle.remove()


def main():
    found = {}
    for model, accumulations in {"hf_moe": [1, 4, 16], "olmoe": [4], "deepseek_v3": [4]}.items():
        for loss in COEFFICIENTS:
            for accumulation in accumulations:
                found[f"{model}/{loss}/{accumulation}"] = step_difference(model, loss, accumulation, processes=2)
            held = forwards_of(step_difference, model, loss, 4, processes=2, gradient_checkpointing=True)
            found[f"{model}/{loss}/4/held"], found[f"forwards/{model}/{loss}"] = held
    _, trainer = train_one_step(deepseek_v3(), 4, processes=2, router_bias_update_speed=1e-3, log_each_router=True)
    found["biases"] = {name: bias.tolist() for name, bias in trainer.selection_bias.biases.items()}
    found["logged"] = trainer.state.log_history[0]
    _, trainer = train_one_step(deepseek_v3(), 4, processes=2, **HELD)
    found["held"] = trainer.state.log_history[:-1]
    leave(found)


if __name__ == "__main__":
    main()
