"""ReLU routing: the penalty that holds the number of experts a token at K.

Shapes: T tokens, E routed experts, K experts per token in the mean.
"""

import torch
from transformers import PreTrainedConfig
from transformers import initialization as init

from .assignment import RouterState
from .balancing import Routed, Statistics
from .router import HfMoeRouter


def l1_penalty(
    batch: Routed, counted: Statistics, config: PreTrainedConfig, coefficient: torch.Tensor
) -> torch.Tensor:
    """lambda mean_t sum_i f_i relu(x_{i,t}), with f_i = E / (K T) count_i: the load-balanced L1 norm of the weights.

    ReMoE's (https://arxiv.org/abs/2412.14711), lambda [1] of the router's state. At K experts a token and balance each
    f is 1. Counts carry no gradient; like a balance loss it is this batch's share of the loss of all that is counted.
    """
    tokens = counted.tokens.clamp_min(1.0).unsqueeze(-1)
    load_E = counted.counts_E * counted.counts_E.shape[-1] / (config.num_experts_per_tok * tokens)
    norm_E = (batch.logits_TE.relu() * batch.mask_T.unsqueeze(-1)).sum(dim=-2) / tokens
    return coefficient.squeeze(-1) * (load_E * norm_E).sum(dim=-1)


class HfMoeReluRouter(HfMoeRouter):
    """A router with the coefficient lambda [1] of its penalty, which moves once an optimizer step.

    lambda <- lambda a^sign(1 - K / E - S), where S is the share of weights that are 0 over the step (ReMoE,
    https://arxiv.org/abs/2412.14711): router_args["l1_factor"] is a (1.2 by default), ["l1_start"] the first lambda
    (1e-8). Theirs is one for all layers, which come to different numbers; here each layer has its own, and comes to K
    experts a token by itself.
    """

    def __init__(self, router, config: PreTrainedConfig, layer_idx: int):
        super().__init__(router, config, layer_idx)
        self.register_buffer("l1_coef", torch.zeros(1))

    @torch.no_grad()
    def draw(self, std: float) -> None:
        super().draw(std)
        init.constant_(self.l1_coef, self.config.router_args.get("l1_start", 1e-8))

    def loss_input(self, state: RouterState) -> torch.Tensor:
        """lambda as it is now [1]."""
        return self.l1_coef.float().clone()

    def observed(self, batch: Routed) -> torch.Tensor:
        """[2] the weights that are not 0, and the tokens."""
        return torch.stack(((batch.chosen_TE * batch.mask_T.unsqueeze(-1)).sum(), batch.mask_T.sum()))

    def moved(self, total: torch.Tensor) -> None:
        config = self.config
        many = total[:1] / total[1:] - config.num_experts_per_tok  # E times (1 - K / E - S)
        self.l1_coef *= config.router_args.get("l1_factor", 1.2) ** many.sign()
