"""A token's experts in two launches: logits in float32; then scores, choice and weights.

Shapes: T tokens, D hidden size, E experts, K experts per token.
"""

import torch
import triton
import triton.language as tl

from .overlap import OVERLAP, let_next_start, wait_for_last

MANY = 64  # tokens; with more, a matrix product reads the weights less often
SCORES = {"softmax_topk": 0, "topk_softmax": 1, "sigmoid_topk": 2}


@triton.jit
def logits_kernel(x_ptr, weight_ptr, logits_ptr, D, E, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    let_next_start()
    wait_for_last()
    token = tl.program_id(0)
    expert, depth = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_D)
    real = expert < E
    total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        here = depth + start < D
        x = tl.load(x_ptr + token * D + start + depth, mask=here, other=0.0).to(tl.float32)
        place = weight_ptr + expert[:, None] * D + start + depth[None, :]
        total += x[None, :] * tl.load(place, mask=real[:, None] & here[None, :], other=0.0).to(tl.float32)
    tl.store(logits_ptr + token * E + expert, tl.sum(total, axis=1), mask=real)


@triton.jit
def choice_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    index_ptr,
    E,
    K,
    scale,
    SCORE: tl.constexpr,
    BIASED: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    let_next_start()
    wait_for_last()
    token = tl.program_id(0)
    expert, slot = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    real = expert < E
    logits = tl.load(logits_ptr + token * E + expert, mask=real, other=float("-inf"))

    if SCORE == 2:
        scores = tl.sigmoid(logits)
    else:
        exps = tl.exp(logits - tl.max(logits, axis=0))
        scores = exps / tl.sum(exps, axis=0)
    choice = scores
    if BIASED:
        choice += tl.load(bias_ptr + expert, mask=real, other=0.0)
    choice = tl.where(real, choice, float("-inf"))
    chosen = tl.zeros((BLOCK_K,), tl.int32)
    weights = tl.full((BLOCK_K,), float("-inf") if SCORE == 1 else 0.0, tl.float32)
    for k in range(K):
        best = tl.argmax(choice, axis=0)
        value = tl.sum(tl.where(expert == best, logits if SCORE == 1 else scores, 0.0), axis=0)
        chosen = tl.where(slot == k, best, chosen)
        weights = tl.where(slot == k, value, weights)
        choice = tl.where(expert == best, float("-inf"), choice)
    if SCORE == 1:
        exps = tl.exp(weights - tl.max(weights, axis=0))
        weights = exps / tl.sum(exps, axis=0)
    elif NORMED:
        weights = weights / tl.maximum(tl.sum(weights, axis=0), 1.1754943508222875e-38)
    tl.store(weights_ptr + token * K + slot, weights * scale, mask=slot < K)
    tl.store(index_ptr + token * K + slot, chosen.to(tl.int64), mask=slot < K)


def router_logits(x: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor) -> None:
    """x W^T in float32: of 16-bit x and W every product is exact in float32, so a sum in float32 is all it takes."""
    (tokens, dim), experts = x.shape, len(weight)
    if tokens > MANY and x.is_cuda and x.dtype == weight.dtype != torch.float32:
        torch.mm(x, weight.mT, out_dtype=torch.float32, out=logits)
    elif tokens > MANY:
        torch.mm(x.float(), weight.float().mT, out=logits)
    else:
        logits_kernel[(tokens, triton.cdiv(experts, 8))](
            x,
            weight,
            logits,
            dim,
            experts,
            BLOCK_E=8,
            BLOCK_D=min(1024, triton.next_power_of_2(dim)),
            num_warps=4,
            **OVERLAP,
        )


def route(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    router_type: str,
    normed: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [T, E] and weights [T, K] in float32, expert indices [T, K], of x [T, D] and the gate's weight [E, D]."""
    tokens, experts = len(x), len(weight)
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    index = torch.empty(tokens, top_k, dtype=torch.int64, device=x.device)
    router_logits(x, weight, logits)
    choice_kernel[(tokens,)](
        logits,
        bias,
        weights,
        index,
        experts,
        top_k,
        scale,
        SCORE=SCORES[router_type],
        BIASED=bias is not None,
        NORMED=normed,
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=1 if experts <= 256 else 4,
        **OVERLAP,
    )
    return logits, weights, index
