"""The router of a layer: its parameters and buffers, and what they do in training; the formulas are in `routing.py`.

Shapes: T tokens, D hidden size, E experts, K experts per token, V vocabulary.
"""

import torch
from torch import nn

from .configuration_hf_moe import HfMoeConfig
from .routing import HASHES, ROUTERS, RouterState, frequency_hash, spread


class HfMoeRouter(nn.Module):
    """Router logits x W^T + b, then the assignment that `router_type` names.

    In float32 whatever the model's dtype and under autocast (ST-MoE, https://arxiv.org/abs/2202.08906, 3.3). Returns
    logits [T, E], weights and expert indices [T, K], the token of each row where a row is not its own token's (expert
    choice), and the baseline [T] of a router that learns by REINFORCE.
    """

    def __init__(self, config: HfMoeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.router, args = ROUTERS[config.router_type], config.router_args
        self.seed = int(args.get("seed", 0)) + layer_idx  # every layer hashes differently
        self.weight = self.bias = self.noise_weight = self.baseline_weight = None
        if self.router.learned:
            self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        if args.get("router_bias"):
            self.bias = nn.Parameter(torch.zeros(config.num_experts))
        if args.get("noise"):
            self.noise_weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        if self.router.policy:
            self.baseline_weight = nn.Parameter(torch.zeros(config.hidden_size))
        # Moved by balancing, not by gradients; steps of 1e-3 would vanish in bfloat16.
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if args.get("selection_bias") else None
        self.register_buffer("e_score_correction_bias", bias)
        table = torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.long)
        self.register_buffer("hash_table", table if self.router.hashed else None)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, input_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        if self.hash_table is not None and input_ids is None:
            raise ValueError("A hash router chooses experts by token id: give input_ids, not inputs_embeds.")
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            hashed = None if self.hash_table is None else self.hash_table[input_ids]
            x = self.explore(hidden_states.float())
            logits = self.logits(x) if hashed is None else hash_logits(hashed, self.config.num_experts)
            state = RouterState(self.training, mask, self.e_score_correction_bias, hashed)
            weights, index, token = self.router.assign(logits, self.config, state)
            baseline = None if self.baseline_weight is None else x.detach() @ self.baseline_weight.float()
        return logits, weights, index, token, baseline

    def explore(self, x: torch.Tensor) -> torch.Tensor:
        """In training: jitter (Switch, https://arxiv.org/abs/2101.03961, C) and dropout on the input."""
        args = self.config.router_args
        if self.training and (eps := args.get("jitter", 0.0)) > 0:
            x = x * torch.empty_like(x).uniform_(1 - eps, 1 + eps)
        return nn.functional.dropout(x, args.get("dropout", 0.0), self.training)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + b, in training plus N(0, 1) softplus(x W_noise^T) (https://arxiv.org/abs/1701.06538, eq. 4)."""
        logits = nn.functional.linear(x, self.weight.float(), None if self.bias is None else self.bias.float())
        if self.noise_weight is not None and self.training:
            scale = nn.functional.softplus(nn.functional.linear(x, self.noise_weight.float()))
            logits = logits + torch.randn_like(logits) * scale
        return logits

    def first_hash_table(self) -> torch.Tensor:
        """The experts [V, K] that each token is hashed to before any text is known."""
        config = self.config
        first = HASHES[config.router_args.get("hash", "random")](config.vocab_size, config.num_experts, self.seed)
        return spread(first, config.num_experts_per_tok, config.num_experts)


class HfMoeHashTables:
    """What a model with hash routers does with their tables."""

    def hash_routers(self) -> list[HfMoeRouter]:
        return [x for x in self.modules() if isinstance(x, HfMoeRouter) and x.hash_table is not None]

    @torch.no_grad()
    def balance_hash_tables(self, token_counts: torch.Tensor) -> None:
        """Rebuild the tables of a "frequency" hash router from how often each token occurs: [V] counts."""
        if len(token_counts) != self.config.vocab_size:
            raise ValueError(f"token_counts has {len(token_counts)} entries, the vocabulary {self.config.vocab_size}.")
        experts, top_k = self.config.num_experts, self.config.num_experts_per_tok
        table = spread(frequency_hash(token_counts.cpu(), experts), top_k, experts)
        for router in self.hash_routers():
            router.hash_table.copy_(table)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As Transformers' own; in hash tables old tokens keep their experts, and new ones get some."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for router in self.hash_routers():
            old, table = router.hash_table, router.first_hash_table().to(router.hash_table)
            table[: len(old)] = old[: len(table)]
            router.hash_table = table
        return embeddings


def hash_logits(index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Logits [T, E] whose softmax is the hash's assignment [T, K]: 0 for its experts, the lowest number for others."""
    logits = torch.full((index.shape[0], num_experts), torch.finfo(torch.float32).min, device=index.device)
    return logits.scatter(-1, index, 0.0)
