"""Where a decoding step is recorded with our kernels, and where it can't be."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

SHARED_MEMORY = 227 * 1024  # bytes that the largest tiles take: what an H100 gives a block


def decoding_kernels(model: nn.Module, rows: int) -> AbstractContextManager:
    """The context in which a step of `rows` rows is recorded: with our kernels, or as it is, with one warning why."""
    properties = torch.cuda.get_device_properties(model.device)
    memory = getattr(properties, "shared_memory_per_block_optin", 0)  # other makers say nothing of it
    if memory < SHARED_MEMORY:
        logger.warning_once(
            f"Decoding without hf_moe's kernels, which need {SHARED_MEMORY} bytes of shared memory a block (H100 or "
            f"newer): {torch.cuda.get_device_name(model.device)} has {memory}."
        )
        return nullcontext()
    try:
        from .decode import fused
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        logger.warning_once("Decoding without hf_moe's kernels, which need Triton: pip install triton")
        return nullcontext()
    return fused(model, rows)
