"""ReLU routing: the penalty that holds the number of experts a token at K.

Shapes: T tokens, E routed experts, K experts per token in the mean.
"""

import torch
from transformers import PreTrainedConfig
from transformers import initialization as init

from .assignment import RouterState
from .balancing import Routed
from .router import HfMoeRouter


def l1_penalty(batch: Routed, coefficient: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """lambda mean_t sum_i f_i relu(x_{i,t}), with f_i = E / (K T) count_i: the load-balanced L1 norm of the weights.

    ReMoE's (https://arxiv.org/abs/2412.14711), a scalar. At K experts a token and balance each f is 1.
    Counts carry no gradient, and are of this batch.
    """
    mask_T1 = batch.mask_T.unsqueeze(-1)
    tokens = batch.mask_T.sum().clamp_min(1.0)
    load_E = (batch.chosen_TE * mask_T1).sum(dim=0) * config.num_experts / (config.num_experts_per_tok * tokens)
    return coefficient.sum() * (load_E * batch.logits_TE.relu() * mask_T1).sum() / tokens


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
