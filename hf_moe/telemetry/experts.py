"""How alike the experts of a layer are: their weights, and what they answer to the same tokens.

Shapes: T tokens, D hidden size, E experts, K experts per token.
"""

from collections.abc import Iterable

import torch
from torch import nn

from ..routers import Router
from .texts import Batch

COLUMNS = 1 << 22  # weights of each expert that are compared at a time, in float32
TOKENS = 32  # that every expert answers


def expert_tensors(model: nn.Module, router: str, experts: int) -> list[torch.Tensor]:
    """The fused weights [E, ., .] of the experts beside a router; none where they are stored in another way."""
    parent = model.get_submodule(router.rpartition(".")[0])
    return [p for p in parent.parameters() if p.dim() == 3 and len(p) == experts and p.is_floating_point()]


def similarity(gram_EE: torch.Tensor) -> torch.Tensor:
    """Cosines from inner products; 0 beside an expert whose weights are all 0."""
    norm_E = gram_EE.diagonal().sqrt().clamp_min(torch.finfo(gram_EE.dtype).tiny)
    return gram_EE / norm_E.unsqueeze(-1) / norm_E


@torch.no_grad()
def weight_similarity(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Cosine of all weights of two experts, [E, E] float64, neuron by neuron in the order in which they are stored."""
    experts, device = len(tensors[0]), tensors[0].device
    gram_EE = torch.zeros(experts, experts, dtype=torch.float64, device="cpu")
    for tensor in tensors:
        for part in tensor.flatten(1).split(max(1, COLUMNS // experts), dim=1):
            part = part.float()
            gram_EE += (part @ part.T).double().to(gram_EE.device)
    assert gram_EE.isfinite().all(), f"weights on {device} are not finite"
    return similarity(gram_EE)


@torch.no_grad()
def expert_inputs(model: nn.Module, routers: dict[str, Router], batch: Batch) -> dict[str, torch.Tensor]:
    """Router -> what the experts beside it are given at the first tokens of a batch, [T, D].

    Only where they are one module that takes (hidden states, indices [T, K], weights), as Transformers' interface
    has it.
    """
    inputs, handles = {}, []

    def keep(name):
        def hook(module, args):
            if len(args) == 3 and args[0].dim() == 2 and not args[1].is_floating_point() and args[1].dim() == 2:
                inputs[name] = args[0][:TOKENS]

        return hook

    for name in routers:
        experts = getattr(model.get_submodule(name.rpartition(".")[0]), "experts", None)
        if isinstance(experts, nn.Module):
            handles.append(experts.register_forward_pre_hook(keep(name)))
    try:
        model(input_ids=batch.ids[:1, :TOKENS].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


@torch.no_grad()
def output_similarity(experts: nn.Module, hidden_TD: torch.Tensor, count: int) -> torch.Tensor:
    """Mean over tokens of the cosine between what two experts answer, [E, E] float64."""
    # Twice the same expert, the second time for nothing: LongCat's do not take a single one.
    weights_T2 = torch.tensor([1.0, 0.0], dtype=hidden_TD.dtype, device=hidden_TD.device).repeat(len(hidden_TD), 1)
    answers = []
    for expert in range(count):
        index_T2 = torch.full_like(weights_T2, expert, dtype=torch.long)
        answers.append(nn.functional.normalize(experts(hidden_TD, index_T2, weights_T2).float(), dim=-1).flatten())
    answers = torch.stack(answers)
    return ((answers @ answers.T) / len(hidden_TD)).double().cpu()


def duplicates(similarities: Iterable[torch.Tensor | None], threshold: float = 0.99) -> list[list[int]]:
    """Groups of experts that reach the threshold in every given similarity: weights, outputs, or both."""
    known = [x for x in similarities if x is not None]
    if not known:
        return []
    alike_EE = torch.stack(known).amin(dim=0) >= threshold
    groups, seen = [], set()
    for expert in range(len(alike_EE)):
        group = [other for other in alike_EE[expert].nonzero().flatten().tolist() if other not in seen]
        if expert not in seen and len(group) > 1:
            groups.append(group)
            seen.update(group)
    return groups
