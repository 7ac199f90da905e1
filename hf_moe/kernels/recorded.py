"""Where a decoding step is recorded with our kernels, and where it can't be."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers.utils import logging

from .tiles import SHARED_MEMORY, shared_memory

logger = logging.get_logger(__name__)


def decoding_kernels(model: nn.Module, rows: int) -> AbstractContextManager:
    """The context in which a step of `rows` rows is recorded: with our kernels, or as it is, with one warning why."""
    memory = shared_memory(model.device)
    if memory < SHARED_MEMORY:
        logger.warning_once(
            f"Decoding without hf_moe's kernels, which need {SHARED_MEMORY} bytes of shared memory a block (H100 or "
            f"newer): {torch.cuda.get_device_name(model.device)} has {memory}."
        )
        return nullcontext()
    try:
        from .decode.host_models import fused_model
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        logger.warning_once("Decoding without hf_moe's kernels, which need Triton: pip install triton")
        return nullcontext()
    return fused_model(model, rows)
