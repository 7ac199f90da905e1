"""What the processes of a pipeline have of a model and its optimizer, as the whole that one process would have."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers as a model is saved by them; of those with two names, one."""
    parameters = dict(model.named_parameters())
    state = model.state_dict(keep_vars=True)
    return {name: x.detach() for name, x in state.items() if name in parameters or not isinstance(x, nn.Parameter)}


def on_first(own: dict[str, torch.Tensor], group, device: torch.device) -> dict[str, torch.Tensor]:
    """On the first process of a group the tensors of all by name, in memory of the CPU; none on the others.

    To be called by all. What several have is the first one's.
    """
    rank, found, described = dist.get_rank(group), {}, [None] * dist.get_world_size(group)
    mine = [(name, tuple(x.shape), x.dtype) for name, x in own.items()]
    dist.all_gather_object(described, mine, group=group)
    seen = set()
    for source, tensors in enumerate(described):
        for name, shape, dtype in tensors:
            if name in seen:
                continue
            seen.add(name)
            if source == rank == 0:
                found[name] = own[name].cpu()
            elif source == rank:
                dist.send(own[name].to(device).contiguous(), group_dst=0, group=group)
            elif rank == 0:
                received = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(received, group_src=source, group=group)
                found[name] = received.cpu()
    return found


# ---- the optimizer, whose state_dict() numbers the weights group by group ----


def names_by_group(optimizer: torch.optim.Optimizer, model: nn.Module, order: list[str], group) -> list[list[str]]:
    """The weights in each parameter group of the whole model's optimizer, in its order. To be called by all."""
    name_of = {x: name for name, x in model.named_parameters()}
    mine = [[name_of[x] for x in part["params"]] for part in optimizer.param_groups]
    all_of_them = [None] * dist.get_world_size(group)
    dist.all_gather_object(all_of_them, mine, group=group)
    place = {name: number for number, name in enumerate(order)}
    return [sorted({x for names in parts for x in names}, key=place.get) for parts in zip(*all_of_them, strict=True)]


def whole_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, names: list[list[str]], group, device: torch.device
) -> dict[str, Any]:
    """`state_dict()` of the whole model's optimizer on the first process. To be called by all."""
    own, plain = {}, {}
    for name, x in model.named_parameters():
        for key, value in optimizer.state.get(x, {}).items():
            if isinstance(value, torch.Tensor):
                own[f"{name}/{key}"] = value
            else:
                plain[name, key] = value
    tensors = on_first(own, group, device)
    others = [None] * dist.get_world_size(group)
    dist.all_gather_object(others, plain, group=group)
    state = {name: {} for part in names for name in part}
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        state[name][key] = value
    for name, key in (found := {k: v for part in others for k, v in part.items()}):
        state[name][key] = found[name, key]
    number = {name: n for n, name in enumerate(name for part in names for name in part)}
    groups = [
        {**{k: v for k, v in part.items() if k != "params"}, "params": [number[x] for x in listed]}
        for part, listed in zip(optimizer.param_groups, names, strict=True)
    ]
    return {"state": {number[name]: found for name, found in state.items() if found}, "param_groups": groups}


def own_state(
    whole: dict[str, Any], optimizer: torch.optim.Optimizer, model: nn.Module, names: list[list[str]]
) -> dict[str, Any]:
    """The part of a whole model's `state_dict()` that is of the weights of this process.

    Raises ValueError where it is of other weights.
    """
    counts = [len(part["params"]) for part in whole["param_groups"]]
    if counts != [len(part) for part in names]:
        raise ValueError(f"{sum(counts)} weights in its optimizer, {sum(map(len, names))} now")
    numbers = [x for part in whole["param_groups"] for x in part["params"]]
    number = dict(zip((name for part in names for name in part), numbers, strict=True))
    name_of = {x: name for name, x in model.named_parameters()}
    state, groups, place = {}, [], 0
    for own, saved in zip(optimizer.param_groups, whole["param_groups"], strict=True):
        first = place
        for x in own["params"]:
            if (found := whole["state"].get(number[name_of[x]])) is not None:
                state[place] = found
            place += 1
        groups.append({**saved, "params": list(range(first, place))})
    return {"state": state, "param_groups": groups}
