"""Liger's kernels for hf_moe models, where TrainingArguments(use_liger_kernel=True) asks for them.

Norms and RoPE in one launch each, and the head with its cross-entropy in chunks, so that no logits of a whole batch
exist (https://arxiv.org/abs/2410.10989). Experts have kernels of our own. Training's outputs then hold no logits.
"""

from functools import partial
from types import MethodType

from torch import nn

from ..model.attention import HfMoeAttention
from ..model.modeling_hf_moe import HfMoeForCausalLM
from ..model.norms import HfMoeUnitOffsetRMSNorm
from ..model.rms_norm import HfMoeRMSNorm
from ..model.routing import ROUTERS
from .recomputation import about_to_write

# A norm's class -> what Liger adds to its weight, and where Liger rounds: as Llama and as Gemma do.
NORMS = {HfMoeRMSNorm: (0.0, "llama"), HfMoeUnitOffsetRMSNorm: (1.0, "gemma")}


def register() -> None:
    """Tell Liger, which must be installed, how hf_moe models take its kernels. Raises ImportError if it is not."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    MODEL_TYPE_TO_APPLY_LIGER_FN[HfMoeForCausalLM.config_class.model_type] = apply_liger_kernel_to_hf_moe


def apply_liger_kernel_to_hf_moe(
    model: nn.Module, rope: bool = True, rms_norm: bool = True, fused_linear_cross_entropy: bool = True
) -> None:
    """Give the modules of `model` Liger's kernels, by their switches; what Liger can't compute stays as it is."""
    for module in model.modules():
        if rms_norm and type(module) in NORMS:
            # By the class that it has now: FSDP2 gives modules classes of its own.
            module.forward = MethodType(partial(norm, kind=NORMS[type(module)]), module)
        if rope and type(module) is HfMoeAttention and not module.config.rope_interleave:
            module.rotated = MethodType(rotated, module)
    # A policy's reward is read off the logits; an adapter does more than the weight.
    plain = isinstance(model, HfMoeForCausalLM) and type(model.lm_head) is nn.Linear
    if fused_linear_cross_entropy and plain and not ROUTERS[model.config.router_type].policy:
        model.predict = MethodType(predict, model)


def norm(self, hidden_states, kind):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, *kind, False)


def rotated(self, query, key, cos, sin):
    if cos.shape[-1] != self.head_dim:
        return HfMoeAttention.rotated(self, query, key, cos, sin)
    from liger_kernel.ops.rope import LigerRopeFunction

    about_to_write(query, key)
    return LigerRopeFunction.apply(query, key, cos, sin)


def predict(self, hidden_states, labels, **kwargs):
    if labels is None or not self.training:
        return HfMoeForCausalLM.predict(self, hidden_states, labels, **kwargs)
    from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss

    loss = LigerForCausalLMLoss(
        hidden_states / self.config.logits_scaling if self.config.logits_scaling != 1 else hidden_states,
        self.lm_head.weight,
        labels,
        self.config.hidden_size,
        final_logit_softcapping=self.config.final_logit_softcapping,
        **kwargs,
    )
    return None, loss
