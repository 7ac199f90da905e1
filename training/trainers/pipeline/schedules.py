"""The order in which the stages of a pipeline take micro-batches forward and back: PyTorch's schedules, by name.

DeepSeek-V3, https://arxiv.org/abs/2412.19437, 3.2.1. N processes, M micro-batches of an optimizer step.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)


class Schedule(NamedTuple):
    """`short` takes the micro-batches of an epoch's last step where they are too few, or do not fit, for `runs`."""

    runs: type
    short: type
    stages: int  # of each process
    folded: bool  # the second half of the stages runs back: the first and the last are one process's
    fits: Callable[[int, int], bool]  # M, N -> whether `runs` takes them
    needs: str  # what that is in words


def in_rounds(micro_batches: int, processes: int) -> bool:
    """Whether all rounds of about N micro-batches are equally long."""
    return micro_batches >= processes and micro_batches % (micro_batches // processes) == 0


SCHEDULES = {
    "1f1b": Schedule(Schedule1F1B, ScheduleGPipe, 1, False, lambda m, n: m >= n, "one for each process"),
    "interleaved": Schedule(
        ScheduleInterleaved1F1B, ScheduleLoopedBFS, 2, False, in_rounds, "a multiple of the number of processes"
    ),
    "zbv": Schedule(
        ScheduleZBVZeroBubble, ScheduleZBVZeroBubble, 2, True, lambda m, n: m >= n, "one for each process"
    ),
    "dualpipev": Schedule(
        ScheduleDualPipeV, ScheduleZBVZeroBubble, 2, True, lambda m, n: m >= 2 * n, "two for each process"
    ),
}


def process_of(stage: int, processes: int, folded: bool) -> int:
    """Which process of a pipeline has a stage: in turns, or down and back up."""
    turn, place = divmod(stage, processes)
    return processes - 1 - place if folded and turn % 2 else place
