"""Expert-specialised fine-tuning (ESFT): find the experts of a task, and train, save and merge those alone.

Paper: https://arxiv.org/abs/2407.01906, 3.2. A layer's fused experts [E, ...] are split into the trained rows
[n, ...], a parameter of their own, and the frozen whole. Optimizer states are of the rows; a gradient of the whole
exists only while its own layer's backward runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_moe.routers import captured, find_routers, routed_experts, token_mask

from ..balance.selection_bias import base_model
from .merging import INPUTS

ROWS_FILE = "expert_rows.safetensors"
SCORES = ("token", "gate")


@dataclass
class EsftArguments:
    """Training of a task's experts alone."""

    esft_p: float | None = field(
        default=None,
        metadata={"help": "Train only the experts that make up this share of each layer's score (ESFT: 0.2)."},
    )
    esft_score: str = field(
        default="token",
        metadata={"help": "An expert's score: its share of the tokens, or of the gates.", "choices": SCORES},
    )
    esft_batches: int = field(default=32, metadata={"help": "Training batches that the experts are scored on."})
    esft_merge: bool = field(default=False, metadata={"help": "Also write the whole model to output_dir/merged."})


def check_esft_arguments(args: EsftArguments, others: dict[str, object]) -> None:
    """Raises ValueError for what contradicts itself; `others` are given arguments that choose what trains, too."""
    if args.esft_p is None:
        if args.esft_merge:
            raise ValueError("esft_merge is true, but no experts are trained alone: give esft_p.")
        return
    if not 0 < args.esft_p <= 1:
        raise ValueError(f"esft_p is {args.esft_p}; it must be above 0 and at most 1.")
    if args.esft_batches < 1:
        raise ValueError(f"esft_batches is {args.esft_batches}; it must be at least 1.")
    if others:
        given = " and ".join(f"{name} is {value}" for name, value in others.items())
        raise ValueError(f"esft_p is {args.esft_p} and {given}: each says what trains; leave one of them out.")


class Rows(nn.Module):
    """A tensor [E, ...] as a function of some of its rows [n, ...], a parametrization for torch.nn.utils."""

    def __init__(self, whole: torch.Tensor, index: torch.Tensor):
        super().__init__()
        self.register_buffer("whole", whole)
        self.register_buffer("index", index.to(whole.device))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.whole.index_copy(0, self.index, rows)

    def right_inverse(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[self.index]


@torch.no_grad()
def score_experts(model: nn.Module, batches: Iterable[dict], score: str = "token") -> dict[str, torch.Tensor]:
    """Router -> each expert's relevance [E], which sums to 1; padding does not count.

    "token": the share of a layer's choices that fell on the expert; "gate": of its gate values.
    """
    model.eval()
    base = base_model(model)
    routers, top_k = find_routers(base), routed_experts(base.config)[1]
    totals = {}
    for batch in batches:
        inputs = {name: batch[name].to(base.device) for name in INPUTS if name in batch}
        mask = token_mask(inputs).reshape(-1)
        with captured(routers, top_k) as routings:
            model(**inputs, use_cache=False)
        for name, routing in routings.items():
            weights = torch.ones_like(routing.weights_SK) if score == "token" else routing.weights_SK
            token = mask if routing.token_S is None else mask[routing.token_S]
            values, of_experts = weights.double() * token.unsqueeze(-1), routing.index_SK < routing.experts
            total = totals.setdefault(name, values.new_zeros(routing.experts))
            total.index_add_(0, routing.index_SK[of_experts], values[of_experts])
    return {name: total / total.sum() for name, total in totals.items()}


def select_experts(scores: dict[str, torch.Tensor], p: float) -> dict[str, torch.Tensor]:
    """Router -> the fewest experts, in order of their number, whose scores together reach `p`.

    The sum is over a layer's own experts; the authors' script divides by that of all layers.
    """
    if not 0 < p <= 1:
        raise ValueError(f"esft_p is {p}; it must be above 0 and at most 1.")
    chosen = {}
    for name, values in scores.items():
        best = values.sort(descending=True, stable=True)
        count = int((best.values.cumsum(0) < p - 1e-9).sum()) + 1
        chosen[name] = best.indices[:count].sort().values
    return chosen


def expert_tensors(model: nn.Module, router: str) -> dict[str, tuple[nn.Module, str]]:
    """Name in the model -> module and attribute, of the fused tensors of the experts beside a router."""
    parent = router.rpartition(".")[0]
    experts = getattr(model.get_submodule(parent), "experts", None)
    split = list(getattr(experts, "parametrizations", ()))
    names = [name for name, _ in experts.named_parameters(recurse=False)] if isinstance(experts, nn.Module) else []
    if not names + split:
        raise ValueError(f"ESFT needs fused experts beside {router}, and there are none.")
    return {f"{parent}.experts.{name}": (experts, name) for name in sorted(names + split)}


def split_experts(model: nn.Module, chosen: dict[str, torch.Tensor]) -> str:
    """Freeze the model but for the chosen experts of each router; returns what trains, in words."""
    whole = sum(x.numel() for x in model.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for router, index in chosen.items():
        for experts, name in expert_tensors(model, router).values():
            weight = getattr(experts, name).requires_grad_(True)
            parametrize.register_parametrization(experts, name, Rows(weight.detach(), index))
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    counts = [len(index) for index in chosen.values()]
    return (
        f"ESFT trains {sum(counts)} experts in {len(counts)} layers ({min(counts)} to {max(counts)} a layer): "
        f"{trained:,} of {whole:,} parameters ({trained / whole:.2%})"
    )


def specialise(trainer: Trainer, args: EsftArguments, checkpoint: str | None) -> str:
    """Split the trainer's model before it trains: by its first training batches, or as `checkpoint` was split.

    Raises ValueError under DeepSpeed's ZeRO-3, which frees the rows between the forward and the backward pass.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(f"esft_p is {args.esft_p}, and ZeRO-3 cannot train some experts alone: use fsdp2 or zero2.")
    model = trainer.accelerator.unwrap_model(trainer.model)
    if checkpoint is not None:
        chosen, _ = read_rows(model, checkpoint)
    else:
        with torch.random.fork_rng():  # the run draws the same rows as without this look at them
            scores = score_experts(model, islice(trainer.get_train_dataloader(), args.esft_batches), args.esft_score)
        scores = {name: trainer.accelerator.reduce(values, reduction="mean") for name, values in scores.items()}
        chosen = select_experts(scores, args.esft_p)
    return split_experts(model, chosen)


def chosen_experts(model: nn.Module) -> dict[str, torch.Tensor]:
    """Router -> the experts that were split out; empty where none were."""
    found = {}
    for router in find_routers(model):
        experts = getattr(model.get_submodule(router.rpartition(".")[0]), "experts", None)
        for parts in getattr(experts, "parametrizations", {}).values():
            if isinstance(parts[0], Rows):
                found[router] = parts[0].index
    return found


def save_rows(model: nn.Module, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write the trained rows, and whose they are, to `folder`. `state`: the weights, where `model` holds shards."""
    state, tensors = model.state_dict() if state is None else state, {}
    for router, index in chosen_experts(model).items():
        tensors[f"{router}.experts"] = index.cpu()
        for key in expert_tensors(model, router):
            experts, _, name = key.rpartition(".")
            tensors[key] = state[f"{experts}.parametrizations.{name}.original"].cpu().contiguous()
    aside = Path(folder) / f".{ROWS_FILE}"
    save_file(tensors, aside)
    aside.replace(Path(folder) / ROWS_FILE)


def read_rows(model: nn.Module, folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Router -> experts, and tensor -> rows, as `save_rows` wrote them.

    Raises FileNotFoundError where there is no such file, ValueError where it is another model's.
    """
    path = Path(folder) / ROWS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {ROWS_FILE}: a run with esft_p writes it.")
    saved = load_file(path)
    chosen = {router: saved[f"{router}.experts"] for router in find_routers(model) if f"{router}.experts" in saved}
    shapes = {
        key: (len(index), *getattr(experts, name).shape[1:])
        for router, index in chosen.items()
        for key, (experts, name) in expert_tensors(model, router).items()
    }
    wrong = sorted(saved.keys() ^ (shapes.keys() | {f"{router}.experts" for router in chosen}))
    wrong += [key for key, shape in shapes.items() if key in saved and saved[key].shape != shape]
    if wrong:
        raise ValueError(f"{path} does not fit the model: {len(wrong)} tensors, the first of them {wrong[0]}.")
    return chosen, {key: saved[key] for key in shapes}


@torch.no_grad()
def load_rows(model: nn.Module, folder: str | Path) -> None:
    """Give `model` the trained rows: exactly, whether it is split in the same way or whole. Raises as `read_rows`."""
    chosen, rows = read_rows(model, folder)
    present = chosen_experts(model)
    if present and any(present.get(router, index[:0]).tolist() != index.tolist() for router, index in chosen.items()):
        raise ValueError(f"{folder} holds rows of other experts than those that this model trains.")
    for router, index in chosen.items():
        for key, (experts, name) in expert_tensors(model, router).items():
            if present:
                experts.parametrizations[name].original.copy_(rows[key])
            else:
                weight = getattr(experts, name)
                weight.index_copy_(0, index.to(weight.device), rows[key].to(weight))


def merge_rows(model: nn.Module) -> None:
    """Make the experts whole again, the trained rows in their places."""
    for router in chosen_experts(model):
        for experts, name in expert_tensors(model, router).values():
            parametrize.remove_parametrizations(experts, name, leave_parametrized=True)
