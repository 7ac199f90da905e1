"""Logits are cosines of a token's hidden state and the experts' embeddings, over a learned temperature."""

import torch
from torch import nn
from transformers import initialization as init

from hf_moe.model.routing import ROUTERS, HfMoeRouter, Router, softmax_affinity


class CosineRouter(HfMoeRouter):
    def __init__(self, router, config, layer_idx):
        super().__init__(router, config, layer_idx)
        self.log_temperature = nn.Parameter(torch.zeros(1))

    def draw(self, std):
        super().draw(std)
        init.constant_(self.log_temperature, -2.0)

    def logits(self, state):
        cosine = nn.functional.linear(
            nn.functional.normalize(state.hidden_TD, dim=-1), nn.functional.normalize(self.weight.float(), dim=-1)
        )
        return cosine / self.log_temperature.float().exp()


ROUTERS["cosine"] = Router(softmax_affinity, ROUTERS["softmax_topk"].assign, {}, fills=True, module=CosineRouter)
