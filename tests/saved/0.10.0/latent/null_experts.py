"""Null experts: Z further choices of a router that compute nothing, so that tokens take fewer experts.

Shapes: T tokens, D hidden size, E routed experts, Z null experts, K choices per token.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .assignment import RouterState
from .balancing import Routed
from .router import HfMoeRouter


class HfMoeNullRouter(HfMoeRouter):
    """A router with rows of its own for Z null experts, and a bias that has tokens choose them as often as the others.

    Then a token takes K E / (E + Z) experts in the mean, and hard ones more than easy ones. Z is
    router_args["null_experts"] (1 by default; LongCat-Flash has E / 2). The bias [1] counts in the choice of null
    experts and in no weight; once an optimizer step it moves by router_args["null_bias_speed"] (1e-3), up where tokens
    took more experts than that and down where fewer: LongCat-Flash (https://arxiv.org/abs/2509.01322) moves each
    expert's bias, by the size of what it lacks; here those of experts are left to `selection_bias` or to a loss,
    which balance them among themselves, and the step is DeepSeek-V3's sign.
    """

    def __init__(self, router, config: PreTrainedConfig, layer_idx: int):
        super().__init__(router, config, layer_idx)
        null_experts = config.router_args.get("null_experts", 1)
        self.null_weight = nn.Parameter(torch.zeros(null_experts, config.hidden_size))
        self.register_buffer("null_bias", torch.zeros(1))

    @torch.no_grad()
    def draw(self, std: float) -> None:
        super().draw(std)
        init.normal_(self.null_weight, std=std)

    def state(self, x: torch.Tensor, mask: torch.Tensor | None, input_ids: torch.Tensor | None) -> RouterState:
        state = super().state(x, mask, input_ids)
        null_bias_Z = self.null_bias.float().expand(len(self.null_weight))
        bias_E = null_bias_Z.new_zeros(self.config.num_experts) if state.bias_E is None else state.bias_E
        return state._replace(bias_E=torch.cat((bias_E, null_bias_Z)))

    def logits(self, state: RouterState) -> torch.Tensor:
        """[T, E + Z]."""
        nulls_TZ = nn.functional.linear(state.hidden_TD, self.null_weight.float())
        return torch.cat((super().logits(state), nulls_TZ), dim=-1)

    def observed(self, batch: Routed) -> torch.Tensor:
        """[2] the choices of experts, and the tokens."""
        return torch.stack(((batch.chosen_TE * batch.mask_T.unsqueeze(-1)).sum(), batch.mask_T.sum()))

    def moved(self, total: torch.Tensor) -> None:
        experts, args = self.config.num_experts, self.config.router_args
        target = self.config.num_experts_per_tok * experts / (experts + len(self.null_weight))
        self.null_bias += args.get("null_bias_speed", 1e-3) * torch.sign(total[:1] / total[1:] - target)
