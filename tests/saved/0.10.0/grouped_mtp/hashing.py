"""Routing by a token's id: the tables that say which experts it is hashed to.

Shapes: T tokens, E routed experts, K experts per token, V vocabulary.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .assignment import RouterState
from .router import HfMoeRouter


def spread(first_V: torch.Tensor, top_k: int, num_experts: int) -> torch.Tensor:
    """K different experts a token from its first one: [V, K]."""
    steps_K = torch.arange(top_k, device=first_V.device) * (num_experts // top_k)
    return (first_V.unsqueeze(-1) + steps_K) % num_experts


def modulo_hash(vocab_size: int, num_experts: int, seed: int) -> torch.Tensor:
    """Expert id mod E: [V]."""
    return torch.arange(vocab_size, device="cpu") % num_experts


def random_hash(vocab_size: int, num_experts: int, seed: int) -> torch.Tensor:
    """A random expert a token, every expert the same number of tokens (within one): [V]."""
    order = torch.randperm(vocab_size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return (torch.arange(vocab_size, device="cpu") % num_experts)[order]


def frequency_hash(counts_V: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Frequent tokens first, each to the expert with the least text so far (Hash Layers, 3.2, balanced): [V]."""
    load, experts = [0.0] * num_experts, [0] * len(counts_V)
    for token in counts_V.argsort(descending=True, stable=True).tolist():
        experts[token] = load.index(min(load))
        load[experts[token]] += float(counts_V[token])
    return torch.tensor(experts, device="cpu")


# "frequency" starts as the random table, until the model is told the counts (`balance_hash_tables`).
HASHES = {"random": random_hash, "modulo": modulo_hash, "frequency": random_hash}


class HfMoeHashRouter(HfMoeRouter):
    """A router with a table of each token's experts [V, K]."""

    def __init__(self, router, config: PreTrainedConfig, layer_idx: int):
        super().__init__(router, config, layer_idx)
        table = torch.zeros(config.vocab_size, config.num_experts_per_tok, dtype=torch.long)
        self.register_buffer("hash_table", table)

    @torch.no_grad()
    def draw(self, std: float) -> None:
        super().draw(std)
        init.copy_(self.hash_table, self.first_hash_table())

    def state(self, x: torch.Tensor, mask: torch.Tensor | None, input_ids: torch.Tensor | None) -> RouterState:
        if input_ids is None:
            raise ValueError("A hash router chooses experts by token id: give input_ids, not inputs_embeds.")
        return super().state(x, mask, input_ids)._replace(hashed_TK=self.hash_table[input_ids])

    def logits(self, state: RouterState) -> torch.Tensor:
        return hash_logits(state.hashed_TK, self.config.num_experts)

    def first_hash_table(self) -> torch.Tensor:
        """The experts [V, K] that each token is hashed to before any text is known."""
        config, args = self.config, self.config.router_args
        seed = int(args.get("seed", 0)) + self.layer_idx  # every layer hashes differently
        first = HASHES[args.get("hash", "random")](config.vocab_size, config.num_experts, seed)
        return spread(first, config.num_experts_per_tok, config.num_experts)


class HfMoeHashedChoice(HfMoeHashRouter):
    """A router of the first `num_hash_layers` layers: a token's id says which experts, learned scores how much.

    DeepSeek-V4's hash layers. There is no choice to move, and so no selection bias.
    """

    def __init__(self, router, config: PreTrainedConfig, layer_idx: int):
        super().__init__(router._replace(hashed=True), config, layer_idx)
        self.register_buffer("e_score_correction_bias", None)

    def logits(self, state: RouterState) -> torch.Tensor:
        return HfMoeRouter.logits(self, state)


class HfMoeHashTables:
    """What a model with hash routers does with their tables."""

    def hash_routers(self) -> list[HfMoeHashRouter]:
        return [x for x in self.modules() if isinstance(x, HfMoeHashRouter)]

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
