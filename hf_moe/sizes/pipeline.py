"""The bubble of a pipeline: for how long a step's processes wait, from the times of forward and backward.

N processes; F, B and W are what one of them takes for a micro-batch's forward, its backward, and of that the gradients
of weights, where they are taken apart from those of inputs (0: they are not). Sending takes no time. As DeepSeek-V3
(https://arxiv.org/abs/2412.19437, table 2) has it for chunks, of which interleaved, zbv and dualpipev give a process
two; its overlap of a forward with a backward, which PyTorch's schedule does not do, is left out: F&B is F + B.
"""

from collections.abc import Callable


def one_forward_one_backward(n: int, f: float, b: float, w: float) -> float:
    """(N - 1)(F + B): https://arxiv.org/abs/2006.09503."""
    return (n - 1) * (f + b)


def interleaved(n: int, f: float, b: float, w: float) -> float:
    """(N - 1)(F + B) / 2: Megatron-LM, https://arxiv.org/abs/2104.04473, 2.2, with two chunks."""
    return (n - 1) * (f + b) / 2


def zero_bubble_v(n: int, f: float, b: float, w: float) -> float:
    """(N - 1)(I + max(0, I - 2W)) / 2 with I = B - W, at least F.

    ZB-V (https://arxiv.org/abs/2401.10241): with F = I = W what is left is the last process's wait for its first
    micro-batch, (N - 1) F / 2, which the paper does not count where optimizers do not wait for each other.
    """
    inputs = b - w
    return (n - 1) * (inputs + max(0.0, inputs - 2 * w)) / 2


def dual_pipe_v(n: int, f: float, b: float, w: float) -> float:
    """(N - 1)(F + 2B - 3W) / 2: table 2 with 2N stages; exact where F = B - W, an upper bound where that is more."""
    return (n - 1) * (f + 2 * b - 3 * w) / 2


BUBBLES: dict[str, Callable[[int, float, float, float], float]] = {
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zbv": zero_bubble_v,
    "dualpipev": dual_pipe_v,
}


def bubble_share(
    schedule: str, processes: int, micro_batches: int, forward: float, backward: float, weights: float
) -> float:
    """The part of a step in which a process of a pipeline waits, under a schedule of BUBBLES.

    `forward`, `backward` and `weights` are the times F, B and W of a micro-batch, in any unit.
    """
    bubble = BUBBLES[schedule](processes, forward, backward, weights)
    return bubble / (bubble + micro_batches * (forward + backward))
