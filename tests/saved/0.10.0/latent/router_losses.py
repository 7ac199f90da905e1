"""The losses of a causal language model's routers, from what the decoder recorded of them."""

import torch
from torch import nn

from .balancing import LOSSES, PENALTY, Routed, policy_loss, routed, statistics
from .outputs import HfMoeModelOutput
from .routing import ROUTERS


def stacked(routings: list[tuple]) -> list[tuple]:
    """The routings of equal shapes on one device as one, with a first dimension of layers."""
    groups = {}
    for routing in routings:
        kind = tuple(None if x is None else (x.shape, x.device) for x in routing)
        groups.setdefault(kind, []).append(routing)
    return [
        tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*group, strict=True))
        for group in groups.values()
    ]


class HfMoeRouterLosses:
    """Balance losses, penalties, REINFORCE: over the layers' routers and, where they ran, those of the MTP modules."""

    def routings(self, outputs: HfMoeModelOutput) -> list[tuple]:
        """Of each router logits, index, mask, tokens, loss input. What counts in MTP is known from its own masks."""
        mask = None if outputs.token_mask is None else outputs.token_mask.reshape(-1)
        ahead = [mask.reshape(-1) for mask in self.per_mtp_router((outputs.mtp_masks or ())[:-1])]
        masks = [mask] * (len(outputs.router_logits) - len(ahead)) + ahead
        tokens = outputs.router_tokens or [None] * len(masks)
        inputs = outputs.router_loss_inputs or [None] * len(masks)
        return list(zip(outputs.router_logits, outputs.router_indices, masks, tokens, inputs, strict=True))

    def routed(self, outputs: HfMoeModelOutput, routings: list[tuple]) -> list[Routed]:
        """What the routers did with this batch, for each routing that `routings` gives."""
        affinity = ROUTERS[self.config.router_type].affinity
        sequences = len(outputs.last_hidden_state)
        experts = self.config.num_experts
        return [
            routed(logits, affinity(logits)[..., :experts], index, mask, tokens, sequences)
            for logits, index, mask, tokens, _ in routings
        ]

    def router_losses(self, outputs: HfMoeModelOutput) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The load-balance loss, and every loss that has a coefficient: averages over the routers."""
        routings = stacked(self.routings(outputs))
        batches = self.routed(outputs, routings)
        counted = [statistics(batch, self.config.n_group) for batch in batches]
        penalty = ROUTERS[self.config.router_type].penalty

        def averaged(name: str) -> torch.Tensor:
            rows = zip(batches, counted, (routing[-1] for routing in routings), strict=True)
            losses = [
                penalty(batch, counts, self.config, own)
                if name == PENALTY
                else LOSSES[name](batch, counts, self.config)
                for batch, counts, own in rows
            ]
            return torch.cat([x.to(losses[0].device) for x in losses]).mean()

        losses = {name: averaged(name) for name in dict.fromkeys(["router_aux_loss_coef", *self.active_losses()])}
        return losses["router_aux_loss_coef"], {name: losses[name] for name in self.active_losses()}

    def policy_loss(
        self,
        outputs: HfMoeModelOutput,
        logits: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """REINFORCE: a token's loss, of an MTP module that module's, is the cost of the experts it was sent to.

        A mean over the targets; with `num_items_in_batch` this batch's share of the mean over that many.
        """
        args = self.config.router_args
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        costs = nn.functional.cross_entropy(logits.mT.float(), targets, reduction="none")
        layers = self.routed(outputs, self.routings(outputs))
        ahead = []
        if outputs.mtp_masks:
            with torch.no_grad():
                losses = self.mtp_token_losses(outputs, labels)
            ahead = self.per_mtp_router(zip(losses, self.mtp_targets(outputs, labels), strict=True))
        rows = [(costs, targets)] * (len(layers) - len(ahead)) + ahead
        total = 0.0
        for layer, baseline, row in zip(layers, outputs.router_loss_inputs, rows, strict=True):
            costs, targets = (x.flatten().to(baseline.device) for x in row)
            policy, value = policy_loss(layer, baseline, costs, (targets != -100).float())
            total = total + args.get("policy_coef", 1e-2) * policy + args.get("baseline_coef", 1e-2) * value
        items = (labels[:, 1:] != -100).sum()
        share = 1.0 if num_items_in_batch is None else (items / num_items_in_batch).to(layers[0].logits_TE.device)
        return total * share / len(layers)
