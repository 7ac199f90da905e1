"""The scaling laws of DeepSeek LLM (https://arxiv.org/abs/2401.02954, 3), fitted on dense models.

C = M D is the compute in FLOPs, D the training tokens, M the model's non-embedding FLOPs per training token: forward
and backward, attention included, M = 72 n_layer d_model^2 + 12 n_layer d_model l_seq for a dense Transformer (eq. 2).
For a mixture of experts M counts the parameters that work on a token; that the laws hold for it is an assumption.
"""

import math


def learning_rate(compute: float) -> float:
    """Best peak learning rate, 0.3118 C^-0.1250 (eq. 1)."""
    return 0.3118 * compute**-0.1250


def batch_tokens(compute: float) -> float:
    """Best batch, in tokens, 0.2920 C^0.3271 (eq. 1)."""
    return 0.2920 * compute**0.3271


def model_flops(compute: float) -> float:
    """Best model scale M_opt, in non-embedding FLOPs per training token, 0.1715 C^0.5243 (eq. 4)."""
    return 0.1715 * compute**0.5243


def data_tokens(compute: float) -> float:
    """Best data scale D_opt, in tokens, 5.8316 C^0.4757 (eq. 4)."""
    return 5.8316 * compute**0.4757


def planned(compute: float) -> dict[str, float]:
    """All four for `compute` FLOPs. Raises ValueError where it is not above 0, or infinite."""
    if not 0 < compute < math.inf:
        raise ValueError(f"flops is {compute:g}; it must be above 0, and a number.")
    return {
        "flops": compute,
        "model_flops_per_token": model_flops(compute),
        "train_tokens": data_tokens(compute),
        "learning_rate": learning_rate(compute),
        "batch_tokens": batch_tokens(compute),
    }
