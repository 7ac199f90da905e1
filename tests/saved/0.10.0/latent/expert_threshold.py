"""Expert threshold routing: what an expert's threshold is, and how it moves.

Shapes: T tokens, E routed experts, K experts per token in the mean.
"""

import torch
from transformers import PreTrainedConfig
from transformers import initialization as init

from .assignment import RouterState
from .balancing import Routed, exceeded_by
from .router import HfMoeRouter


class HfMoeThresholdRouter(HfMoeRouter):
    """A router with a threshold [E] an expert, a moving average of the score that K T / E of its tokens exceed.

    https://arxiv.org/abs/2603.11535: the (1 - K / E) quantile of each batch, averaged over batches with
    router_args["decay"] (0.9 by default). It moves once an optimizer step, by the step's tokens that count; of several
    micro-batches and processes by the mean of their quantiles. Theirs begins with expert choice, until the average is
    known; here it begins at 0.5, where every sigmoid is, and comes near in some ten steps.
    """

    def __init__(self, router, config: PreTrainedConfig, layer_idx: int):
        super().__init__(router, config, layer_idx)
        self.register_buffer("threshold", torch.zeros(config.num_experts))

    @torch.no_grad()
    def draw(self, std: float) -> None:
        super().draw(std)
        init.constant_(self.threshold, 0.5)

    def state(self, x: torch.Tensor, mask: torch.Tensor | None, input_ids: torch.Tensor | None) -> RouterState:
        return super().state(x, mask, input_ids)._replace(threshold_E=self.threshold)

    def observed(self, batch: Routed) -> torch.Tensor:
        """[E + 1] the batch's own thresholds times its tokens, and the tokens."""
        share = self.config.num_experts_per_tok / self.config.num_experts
        thresholds_E = exceeded_by(self.router.affinity(batch.logits_TE), share, batch.mask_T)
        tokens = batch.mask_T.sum()
        return torch.cat((thresholds_E * tokens, tokens.view(1)))

    def moved(self, total: torch.Tensor) -> None:
        self.threshold.lerp_(total[:-1] / total[-1], 1 - self.config.router_args.get("decay", 0.9))
