"""Triton kernels, registered with Transformers under one name: model.set_experts_implementation("hf_moe"); and "auto".

Nothing here needs Triton or a GPU before a kernel runs.
"""

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .auto import auto_experts_forward
from .experts import hf_moe_experts_forward

ALL_EXPERTS_FUNCTIONS.register("hf_moe", hf_moe_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("auto", auto_experts_forward)
