"""A token's experts in one launch: logits, scores, choice and weights.

Shapes: T tokens, D hidden size, E experts, K experts per token.
"""

import torch
import triton
import triton.language as tl

SCORES = {"softmax_topk": 0, "topk_softmax": 1, "sigmoid_topk": 2}


@triton.jit
def router_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    logits_ptr,
    weights_ptr,
    index_ptr,
    D,
    E,
    K,
    scale,
    SCORE: tl.constexpr,
    BIASED: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0)
    expert, depth, slot = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    real = expert < E
    total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        here = depth + start < D
        x = tl.load(x_ptr + token * D + start + depth, mask=here, other=0.0).to(tl.float32)
        place = weight_ptr + expert[:, None] * D + start + depth[None, :]
        total += x[None, :] * tl.load(place, mask=real[:, None] & here[None, :], other=0.0).to(tl.float32)
    logits = tl.sum(total, axis=1)
    tl.store(logits_ptr + token * E + expert, logits, mask=real)
    logits = tl.where(real, logits, float("-inf"))

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
    (tokens, dim), experts = x.shape, len(weight)
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    index = torch.empty(tokens, top_k, dtype=torch.int64, device=x.device)
    block_e = triton.next_power_of_2(experts)
    router_kernel[(tokens,)](
        x,
        weight,
        bias,
        logits,
        weights,
        index,
        dim,
        experts,
        top_k,
        scale,
        SCORE=SCORES[router_type],
        BIASED=bias is not None,
        NORMED=normed,
        BLOCK_E=block_e,
        BLOCK_D=min(max(16, 8192 // block_e), triton.next_power_of_2(dim)),
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=8,
    )
    return logits, weights, index
