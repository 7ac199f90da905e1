"""What the models return beyond Transformers' own output classes. T tokens, E routed experts, K experts per token."""

from dataclasses import dataclass, fields
from functools import cache

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class HfMoeModelOutput(MoeModelOutputWithPast):
    """`router_logits` and `router_indices` hold one tensor per router: [T, E] float32 and [T, K] int64.

    Layer after layer, and in a layer that of the attention heads ("moa") before that of the MLP.
    `router_tokens` names the token of each row of the indices where an expert chose it, `router_loss_inputs` are what
    the loss of a router's own reads, as the baselines [T] of REINFORCE; both are empty for other routers.

    With MTP, `mtp_hidden_states` holds one [B, S, D] a module and `mtp_masks` one more [B, S], see `predict_ahead`;
    the modules' routers come after those of the layers. `token_mask` [B, S] is False on padding, None without any.
    """

    router_indices: tuple[torch.Tensor, ...] | None = None
    router_tokens: tuple[torch.Tensor, ...] | None = None
    router_loss_inputs: tuple[torch.Tensor, ...] | None = None
    mtp_hidden_states: tuple[torch.Tensor, ...] | None = None
    mtp_masks: tuple[torch.Tensor, ...] | None = None
    token_mask: torch.Tensor | None = None


@dataclass
class HfMoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """`aux_loss` and the scalars in `router_losses` are averaged over the routers and not yet weighted.

    `router_losses` has an entry for each loss whose coefficient in the configuration is not 0, under that field's
    name. `mtp_loss` is that of multi-token prediction, not weighted either.
    """

    mtp_loss: torch.Tensor | None = None
    router_losses: dict[str, torch.Tensor] | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None


@cache
def with_fields_of(host: type[ModelOutput]) -> type[HfMoeCausalLMOutput]:
    """HfMoeCausalLMOutput; where the host's output tells more, as of pictures, one that is both."""
    if {x.name for x in fields(host)} <= {x.name for x in fields(HfMoeCausalLMOutput)}:
        return HfMoeCausalLMOutput
    body = {"__module__": __name__, "__doc__": f"{host.__name__}, and what its routers did."}
    return dataclass(type(HfMoeCausalLMOutput.__name__, (HfMoeCausalLMOutput, host), body))
