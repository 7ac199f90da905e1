"""Micro-batches of any shapes through the stages of a pipeline: forward and back by a schedule, or forward alone."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from .parts import Part
from .schedules import Schedule, process_of


def at_once() -> Callable[[], None]:
    """Of a stage that does not take gradients of weights apart from those of inputs: what is left of the former."""
    return lambda: None


class Stage(PipelineStage):
    """PyTorch's, whose micro-batches all have one shape, with a shape for each.

    It takes gradients of inputs and of weights apart where the schedule says so, but not of layers that compute their
    forward again, which would do that twice, and not with several MTP modules: the embedding's has to go through the
    later ones to the earlier, where PyTorch looks for gradients of weights.
    """

    def __init__(self, part: Part, stages: int, size: int, dtype: torch.dtype, device: torch.device, group):
        def states() -> torch.Tensor:
            return torch.empty(1, 1, size, dtype=dtype, device="meta", requires_grad=True)

        number = torch.zeros(1, dtype=torch.long, device="meta")
        loss = torch.empty((), device="meta", requires_grad=True)
        super().__init__(
            part,
            part.stage,
            stages,
            device,
            input_args=number if part.first else states(),
            output_args=loss if part.last else states(),
            group=group,
            dw_builder=at_once if part.computes_again or part.embeds_twice else None,
        )
        self.shapes: list[tuple[int, ...]] = []

    def take(self, shapes: list[tuple[int, ...]]) -> None:
        """The shapes of the micro-batches to come, (B, S, D) each."""
        self.shapes = shapes
        self.make_room()

    def make_room(self) -> None:
        """Buffers to receive into, in place of those of one shape."""
        for received in (self.args_recv_info, self.grad_recv_info):
            for number, infos in received.items():
                for info in infos:
                    buffer = getattr(info, "buffer", None)  # which the first stage's input has not
                    if buffer is not None:
                        info.buffer = buffer.new_empty(self.shapes[number]).requires_grad_(buffer.requires_grad)

    def _prepare_forward_infra(self, *args, **kwargs):
        found = super()._prepare_forward_infra(*args, **kwargs)
        self.make_room()
        return found

    def _prepare_backward_infra(self, *args, **kwargs):
        found = super()._prepare_backward_infra(*args, **kwargs)
        self.make_room()
        return found


class Passes:
    """Of one process's `parts` in a pipeline of `group`; hidden states have `size` numbers of `dtype`.

    `back` are the first process and the last, for the way from the last to the first: NCCL takes what two processes
    send each other in one order, in which they might wait for each other.
    """

    def __init__(self, parts: list[Part], schedule: Schedule, size: int, dtype: torch.dtype, device, group, back):
        self.parts, self.schedule = parts, schedule
        self.size, self.dtype, self.device, self.group, self.back = size, dtype, device, group, back
        self.processes = dist.get_world_size(group)
        self.stages = self.processes * schedule.stages
        self.made: dict[int, tuple] = {}  # number of micro-batches -> their schedule, and its stages

    def forward_and_back(self, shapes: list[tuple[int, int]]) -> None:
        """All micro-batches, of shapes (B, S); gradients add up in the weights."""
        count = len(shapes)
        if count not in self.made:
            given = (self.stages, self.size, self.dtype, self.device, self.group)
            stages = [Stage(part, *given) for part in self.parts]
            kind = self.schedule.runs if self.schedule.fits(count, self.processes) else self.schedule.short
            runs = kind(
                stages[0] if self.schedule.stages == 1 else stages,
                count,
                loss_fn=lambda loss, number: loss,
                scale_grads=False,
            )
            self.made[count] = runs, stages
        runs, stages = self.made[count]
        for stage in stages:
            stage.take([(*shape, self.size) for shape in shapes])
        numbers = torch.arange(count)
        first = (numbers,) if self.parts[0].first else ()
        runs.step(*first, number=numbers, target=numbers, return_outputs=False)

    @torch.no_grad()
    def forward(self, shapes: list[tuple[int, int]]) -> None:
        """All micro-batches through one stage of this process, then through its next."""
        sent, states = [], [None] * len(shapes)
        for part in self.parts:
            for number, shape in enumerate(shapes):
                received = states[number]
                if not part.first and (way := self.way(part.stage - 1)) is not None:
                    received = torch.empty(*shape, self.size, dtype=self.dtype, device=self.device)
                    dist.recv(received, src=way[0], group=way[2])
                states[number] = part(received, torch.tensor(number))
                if not part.last and (way := self.way(part.stage)) is not None:
                    sent.append((dist.isend(states[number], dst=way[1], group=way[2]), states[number]))
        for work, _ in sent:
            work.wait()

    def way(self, stage: int) -> tuple[int, int, dist.ProcessGroup] | None:
        """From a stage to the next: sender, receiver, and by which group; None within a process."""
        source, target = (process_of(x, self.processes, self.schedule.folded) for x in (stage, stage + 1))
        if source == target:
            return None
        ranks = dist.get_process_group_ranks(self.group)
        turns = not self.schedule.folded and target == 0
        return ranks[source], ranks[target], self.back if turns else self.group
