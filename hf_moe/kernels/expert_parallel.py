"""The expert parallelism "hf_moe": each rank computes its experts for the tokens of all ranks.

On few ranks nearly every token has an expert on each. So tokens go to all R ranks, once, and what their experts add
comes back in one sum: R / K of what is sent where each of a token's K choices travels by itself, as in Transformers'
all-to-all. Nothing is sorted for it, and no size depends on the routes, so that the host waits for no device.
"""

from functools import cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from .experts import adds_low_rank, compute_dtype

# The name of old, of which newer releases of torch warn.
all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


class GatheredTokens(EPImplementation):
    """sum_k weight_{t,k} FFN_{index_{t,k}}(x_t) of this rank's tokens, whose experts are spread over the ranks.

    Where ranks share their tokens (tensor parallelism), or are more than twice the choices of a token, it is
    Transformers' "auto".
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts, self.group = experts, ep_mesh.get_group()
        self.host_group = on_hosts(*dist.get_process_group_ranks(self.group))
        self.auto = EPImplementationInterface()["auto"](experts, ep_mesh, tp_mesh)

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, D] from hidden_states [T, D], index and weights [T, K]; T may differ between ranks."""
        ranks, count = self.ep_mesh.size(), self.num_local_experts
        if self.tp_mesh.size() > 1 or ranks > 2 * top_k_index.shape[1]:
            return self.auto(hidden_states, top_k_index, top_k_weights)
        own, dtype = len(hidden_states), hidden_states.dtype
        length = LENGTHS.agreed or longest(own, self.host_group)
        if own > length:
            raise ValueError(f"A layer's experts got {own} tokens, more than the {length} that all ranks agreed on.")
        sent = compute_dtype(self.experts, hidden_states) if adds_low_rank(self.experts) else dtype
        tokens = Exchange.apply(filled(hidden_states, length), sent, self.group, gathered, summed)
        weights = Exchange.apply(filled(top_k_weights, length), top_k_weights.dtype, self.group, gathered, summed)
        index = gathered(filled(top_k_index, length, ranks * count), top_k_index.dtype, self.group)

        index = index - count * self.ep_mesh.get_local_rank()
        elsewhere = (index < 0) | (index >= count)
        index = index.masked_fill(elsewhere, count)
        # Experts that nobody chose must have gradients, too, or other ranks wait for them: the first token sees one
        # here with weights of 0.
        index[:1].clamp_(max=count - 1)
        output = self.experts_forward(tokens, index, weights.masked_fill(elsewhere, 0.0))
        output = Exchange.apply(output, dtype, self.group, summed, gathered)
        return output if own == length else output[:own].clone()  # FSDP2 warns of views


class Exchange(torch.autograd.Function):
    """`there`, one of `gathered` and `summed`, whose gradient goes `back` by the other."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, dtype: torch.dtype, group: dist.ProcessGroup, there, back) -> torch.Tensor:
        ctx.dtype, ctx.group, ctx.back = x.dtype, group, back
        return there(x, dtype, group)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return ctx.back(gradient, ctx.dtype, ctx.group), None, None, None, None


def gathered(x: torch.Tensor, dtype: torch.dtype, group: dist.ProcessGroup) -> torch.Tensor:
    """The rows of all ranks, one rank's after another's: [R T, D] of [T, D], as `dtype`."""
    rows = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:], dtype=dtype)
    all_gather(rows, x.to(dtype).contiguous(), group)
    return rows


def summed(x: torch.Tensor, dtype: torch.dtype, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over ranks of what each has for this rank's rows: [T, D] of [R T, D], as `dtype`.

    Not a reduce-scatter, which would round to the type of `x` with each rank that it adds.
    """
    parts = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(parts, x.contiguous(), group=group)
    return parts.unflatten(0, (dist.get_world_size(group), -1)).sum(0, dtype=dtype)


def filled(x: torch.Tensor, length: int, value: int = 0) -> torch.Tensor:
    """[T, D] made as long as the group's longest."""
    return x if len(x) == length else nn.functional.pad(x, (0, 0, 0, length - len(x)), value=value)


class Lengths:
    """What ranks fill their tokens up to in the forwards of a step, if they have agreed; else each layer asks.

    To ask is to wait for the other ranks' hosts, in each layer, so that none runs ahead of its device.
    """

    NEAR = 0.9  # of the longest: where some are shorter, each layer's filling would cost more than asking

    def __init__(self):
        self.agreed: int | None = None

    def agree(self, tokens: list[int]) -> None:
        """On the longest of all ranks' forwards, of which this one's have so many tokens. All ranks call it."""
        ends = torch.tensor([max(tokens, default=0), -min(tokens, default=0)], device="cpu")
        dist.all_reduce(ends, dist.ReduceOp.MAX, on_hosts(*range(dist.get_world_size())))
        most, least = ends[0].item(), -ends[1].item()
        self.agreed = most if 0 < self.NEAR * most <= least else None

    def forget(self) -> None:
        self.agreed = None


LENGTHS = Lengths()


def longest(length: int, group: dist.ProcessGroup) -> int:
    """The largest of the group's lengths, at least 1: between hosts, so that no device has to be waited for."""
    size = torch.tensor(length, device="cpu")
    dist.all_reduce(size, dist.ReduceOp.MAX, group)
    return max(1, size.item())


@cache
def on_hosts(*ranks: int) -> dist.ProcessGroup:
    """A group of these ranks for tensors on the CPU: one for all layers."""
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
