"""A pipeline acted out: each process does the next thing in PyTorch's order as soon as what that needs is there."""

from types import SimpleNamespace

from hf_moe.training.trainers.pipeline.schedules import SCHEDULES
from torch import nn

DEPENDS = {"F": "F", "I": "I", "B": "I"}  # what is done -> what of another stage it waits for


def one_forward_one_backward(processes: int, micro_batches: int) -> dict[int, list[list[tuple]]]:
    """PyTorch writes down no order of this schedule."""
    orders = {}
    for rank in range(processes):
        ahead = min(micro_batches, processes - rank)
        order = [("F", rank, number) for number in range(ahead)]
        for number in range(micro_batches):
            order.append(("B", rank, number))
            if ahead + number < micro_batches:
                order.append(("F", rank, ahead + number))
        orders[rank] = [[action] for action in order]
    return orders


def orders_of(name: str, processes: int, micro_batches: int) -> dict[int, list[list[tuple]]]:
    """Process -> what it does, one thing at a time or two at once: (F, I, W or B for both, stage, micro-batch)."""
    if name == "1f1b":
        return one_forward_one_backward(processes, micro_batches)
    stages = [
        SimpleNamespace(num_stages=2 * processes, group_size=processes, group_rank=0, submod=nn.Identity())
        for _ in range(2)
    ]
    made = SCHEDULES[name].runs(stages, micro_batches, loss_fn=lambda loss, number: loss)

    def steps(action) -> list[tuple]:
        return [(x.computation_type.value, x.stage_index, x.microbatch_index) for x in action.sub_actions or [action]]

    return {rank: [steps(x) for x in order if x is not None] for rank, order in made.pipeline_order.items()}


def time_of_step(
    name: str, processes: int, micro_batches: int, forward: float, inputs: float, weights: float
) -> float:
    """Until all are done; F, I and W of a micro-batch take these times over all stages of a process."""
    each = SCHEDULES[name].stages
    last = processes * each - 1
    cost = {"F": forward / each, "I": inputs / each, "W": weights / each}
    cost["B"] = cost["I"] + cost["W"]
    left, clock = orders_of(name, processes, micro_batches), dict.fromkeys(range(processes), 0.0)
    done: dict[tuple, float] = {}

    def needs(kind: str, stage: int, number: int) -> list[tuple]:
        if kind == "F":
            return [("F", stage - 1, number)] if stage else []
        return [("F", stage, number)] + ([("I", stage + 1, number)] if kind != "W" and stage < last else [])

    while any(left.values()):
        before = sum(map(len, left.values()))
        for rank, order in left.items():
            while order:
                made = {("I" if kind == "B" else kind, *where) for kind, *where in order[0]}
                needed = {x for action in order[0] for x in needs(*action)} - made
                if not needed <= done.keys():
                    break
                clock[rank] = max([clock[rank], *(done[x] for x in needed)]) + sum(cost[x[0]] for x in order[0])
                done |= dict.fromkeys(made, clock[rank])
                order.pop(0)
        assert sum(map(len, left.values())) < before, "all wait for each other"
    return max(clock.values())
