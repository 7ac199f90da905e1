"""Kernels, registered with Transformers by name: experts "hf_moe", "auto" and "fp8", attention "varlen".

Beside them how tokens reach experts on other ranks, the `ep_implementation` "hf_moe".

Nothing here needs Triton or a GPU before a kernel runs.
"""

import torch
from transformers.distributed import DistributedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .auto import auto_experts_forward
from .experts import hf_moe_experts_forward
from .fp8.experts import fp8_experts_forward
from .varlen import LateMask, varlen_attention_forward

ALL_EXPERTS_FUNCTIONS.register("hf_moe", hf_moe_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("auto", auto_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("fp8", fp8_experts_forward)
ALL_ATTENTION_FUNCTIONS.register("varlen", varlen_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register("varlen", LateMask)

if torch.distributed.is_available() and hasattr(DistributedConfig, "ep_implementation"):  # since Transformers 5.23
    from transformers.distributed.expert_parallel import EPImplementationInterface

    from .expert_parallel import GatheredTokens

    EPImplementationInterface.register("hf_moe", GatheredTokens)
