"""An expert takes the tokens whose score is above its threshold, a moving average of what makes K T / E of them.

A token has as many experts as take it, and looks at no other token (expert threshold routing).
"""

import torch
from transformers import initialization as init

from hf_moe.model.routing import (
    ROUTERS,
    Assignment,
    HfMoeRouter,
    Range,
    Router,
    leave_empty,
    sigmoid_affinity,
    weights_of,
)


class ThresholdRouter(HfMoeRouter):
    def __init__(self, router, config, layer_idx):
        super().__init__(router, config, layer_idx)
        self.register_buffer("threshold", torch.zeros(config.num_experts))

    def draw(self, std):
        super().draw(std)
        init.constant_(self.threshold, 0.5)

    def assign(self, logits, state):
        scores = sigmoid_affinity(logits)
        every = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
        chosen = leave_empty(every, scores <= self.threshold, logits.shape[-1], state)
        return Assignment(weights_of(scores, chosen), chosen)

    def observed(self, batch):
        """Each expert's threshold for this batch alone, and 1: over a step, their sum and the number of batches."""
        scores = sigmoid_affinity(batch.logits_TE.detach())[batch.mask_T > 0]
        share = self.config.num_experts_per_tok / self.config.num_experts
        return torch.cat([torch.quantile(scores, 1 - share, dim=0), scores.new_ones(1)])

    def moved(self, total):
        decay = self.config.router_args.get("decay", 0.9)
        self.threshold.lerp_(total[:-1] / total[-1], 1 - decay)


ROUTERS["threshold"] = Router(
    sigmoid_affinity, ROUTERS["sigmoid_topk"].assign, {"decay": Range(0.0, 1.0)}, module=ThresholdRouter
)
