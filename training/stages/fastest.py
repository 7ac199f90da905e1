"""What a run on a GPU computes with, where its recipe and its command line leave it open: the fastest that is right.

Experts by our kernels or SonicMoE, attention over packed documents by a kernel of sequences of several lengths, norms
and RoPE by Liger. What is named explicitly stays.
"""

from importlib.util import find_spec

import torch
from transformers import PreTrainedModel, TrainingArguments

from hf_moe.kernels.host_norms import fuse_norms
from hf_moe.kernels.varlen import unusable
from hf_moe.model.configuration_hf_moe import HfMoeConfig

from ..host import can_choose_experts, flash_attention

IN_FLEX = ("has no soft-cap", "has no sinks")
PACKED = ("bfd", "bfd_split")  # TRL's strategies whose documents do not see each other
INSTALL = "pip install 'hf_moe[kernels]'"


def take_fastest(model: PreTrainedModel, args: TrainingArguments, named: frozenset[str]) -> str | None:
    """Set it on model and arguments, but for the arguments `named`; returns what was taken, in words, or None."""
    if args.device.type != "cuda":
        return None
    said = [choose(model, args) for name, choose in CHOICES.items() if name not in named]
    return f"on this GPU: {'; '.join(said)}" if said else None


def experts(model: PreTrainedModel, args: TrainingArguments) -> str:
    if not can_choose_experts(model):
        return "no experts whose computation can be chosen"
    model.set_experts_implementation("auto")
    spread = getattr(model.config, "distributed_config", None)
    over = "" if spread is None else f" of {spread.ep_size} processes"
    if find_spec("triton"):
        return f"experts auto{over}"
    return f"experts of Transformers{over}, for there is no Triton ({INSTALL})"


def attention(model: PreTrainedModel, args: TrainingArguments) -> str:
    packed = getattr(args, "padding_free", False) or (
        getattr(args, "packing", False) and args.packing_strategy in PACKED
    )
    if not packed:
        return f"attention {model.config._attn_implementation}, for rows are not packed"
    reason = without_varlen(model, args)
    if reason is None:
        name = flash_attention() or "varlen"
    elif reason in IN_FLEX and model._supports_flex_attn:
        name = "flex_attention"
    else:
        return f"attention {model.config._attn_implementation}, for varlen {reason}"
    model.set_attn_implementation(name)
    return f"attention {name}" + (f", for varlen {reason}" if reason else "")


def without_varlen(model: PreTrainedModel, args: TrainingArguments) -> str | None:
    """Why a kernel of sequences of several lengths cannot compute the model's attention, or None."""
    config = model.config.get_text_config(decoder=True)
    if not model._supports_flash_attn:
        return f"is not known to a {config.model_type}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "has no soft-cap"
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        return "has no sinks"
    if getattr(config, "attention_dropout", 0):
        return "has no dropout"
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
    return unusable(args.device, dtype, head_size(config))


def head_size(config) -> int:
    """Of queries and keys."""
    if getattr(config, "qk_nope_head_dim", None):
        return config.qk_nope_head_dim + config.qk_rope_head_dim
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def liger(model: PreTrainedModel, args: TrainingArguments) -> str:
    if find_spec("liger_kernel") is None:
        return f"norms without Liger, which is not installed ({INSTALL})"
    if model.config.model_type == HfMoeConfig.model_type:
        args.use_liger_kernel = True
        return "norms and RoPE by Liger"
    # Liger's own switch for a family is no choice: it replaces experts by slower ones, and functions of a module that
    # other models use.
    return "norms by Liger" if fuse_norms(model) else "norms of Transformers, for Liger's compute others"


# Argument -> what it means where nobody named it.
CHOICES = {"experts_implementation": experts, "attn_implementation": attention, "use_liger_kernel": liger}
