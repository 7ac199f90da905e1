"""The router of a layer: its parameters and buffers, and what they do in training; the formulas are in `routing.py`.

Shapes: T tokens, D hidden size, E experts, K experts per token.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .assignment import Assignment, RouterState, in_slots
from .balancing import Routed

PLACES = ("cache_dir", "revision", "token", "subfolder")
# What every router may have, in the model's type. All that a subclass adds is kept in float32.
SHARED = ("weight", "bias", "noise_weight", "baseline_weight")


class HfMoeRouter(nn.Module):
    """Router logits x W^T + b, then the assignment that `router_type` names.

    In float32 whatever the model's dtype and under autocast (ST-MoE, https://arxiv.org/abs/2202.08906, 3.3). Returns
    logits [T, E], weights and expert indices [T, K], the token of each row where a row is not its own token's (expert
    choice), and what a loss of its own reads, if it has one.

    A router with parameters or a state of its own is a subclass, named as `module` in its line of `ROUTERS`. It adds
    parameters and buffers, which are kept in float32, in `__init__`, and overrides `draw`, `logits` or `assign`; one
    that moves something itself once an optimizer step, as balancing moves a selection bias, `observed` and `moved`.
    """

    def __init__(self, router, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.router, self.config, self.layer_idx, args = router, config, layer_idx, config.router_args
        self.weight = self.bias = self.noise_weight = None
        if router.learned:
            self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        if args.get("router_bias"):
            self.bias = nn.Parameter(torch.zeros(config.num_experts))
        if args.get("noise"):
            self.noise_weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        # Moved by balancing, not by gradients; steps of 1e-3 would vanish in bfloat16.
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if args.get("selection_bias") else None
        self.register_buffer("e_score_correction_bias", bias)

    @torch.no_grad()
    def draw(self, std: float) -> None:
        """First values: weight N(0, std), the rest 0; `transformers.initialization` leaves alone what was loaded."""
        for name, tensor in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
            if name == "weight":
                init.normal_(tensor, std=std)
            else:
                init.zeros_(tensor)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, input_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            state = self.state(self.explore(hidden_states.float()), mask, input_ids)
            logits = self.logits(state)
            return logits, *self.assigned(logits, state), self.loss_input(state)

    def state(self, x: torch.Tensor, mask: torch.Tensor | None, input_ids: torch.Tensor | None) -> RouterState:
        """What the router looks at of tokens x [T, D]."""
        return RouterState(self.training, mask, self.e_score_correction_bias, hidden_TD=x)

    def assigned(self, logits: torch.Tensor, state: RouterState) -> Assignment:
        """`assign`; outside training with a row for each token."""
        assignment = self.assign(logits, state)
        if assignment.token_S is not None and not state.training:
            return in_slots(assignment, *logits.shape)
        return assignment

    def explore(self, x: torch.Tensor) -> torch.Tensor:
        """In training: jitter (Switch, https://arxiv.org/abs/2101.03961, C) and dropout on the input."""
        args = self.config.router_args
        if self.training and (eps := args.get("jitter", 0.0)) > 0:
            x = x * torch.empty_like(x).uniform_(1 - eps, 1 + eps)
        return nn.functional.dropout(x, args.get("dropout", 0.0), self.training)

    # ---- what a subclass may override ----

    def logits(self, state: RouterState) -> torch.Tensor:
        """[T, E] in float32 of state.hidden_TD: x W^T + b, in training plus N(0, 1) softplus(x W_noise^T).

        The noise: https://arxiv.org/abs/1701.06538, eq. 4.
        """
        x = state.hidden_TD
        logits = nn.functional.linear(x, self.weight.float(), None if self.bias is None else self.bias.float())
        if self.noise_weight is not None and state.training:
            scale = nn.functional.softplus(nn.functional.linear(x, self.noise_weight.float()))
            logits = logits + torch.randn_like(logits) * scale
        return logits

    def assign(self, logits: torch.Tensor, state: RouterState) -> Assignment:
        """The assignment of logits [T, E]: the pure function of the router's line in `ROUTERS`."""
        return self.router.assign(logits, self.config, state)

    def observed(self, batch: Routed) -> torch.Tensor | None:
        """What `moved` needs to know of a batch: a vector, added up over an optimizer step and all processes."""
        return None

    def moved(self, total: torch.Tensor) -> None:
        """Called once after each optimizer step, with the sum of what was `observed`; changes buffers in place."""

    def loss_input(self, state: RouterState) -> torch.Tensor | None:
        """What a loss of the router's own reads beside logits and choice: `policy` and `penalty` in its line."""
        return None


class HfMoePolicyRouter(HfMoeRouter):
    """A router that learns by REINFORCE, with a learned baseline (https://arxiv.org/abs/2202.01169, 3.3)."""

    def __init__(self, router, config: PreTrainedConfig, layer_idx: int):
        super().__init__(router, config, layer_idx)
        self.baseline_weight = nn.Parameter(torch.zeros(config.hidden_size))

    def loss_input(self, state: RouterState) -> torch.Tensor:
        """The baseline [T]: what is expected of a token's loss."""
        return state.hidden_TD.detach() @ self.baseline_weight.float()


def added(router: HfMoeRouter) -> dict[str, torch.Tensor]:
    """What is kept in float32 of a router."""
    tensors = (*router.named_parameters(recurse=False), *router.named_buffers(recurse=False))
    return {name: x for name, x in tensors if name not in SHARED and x.is_floating_point()}


def in_float32(model: nn.Module) -> set[str]:
    """The ends of the names of what is kept in float32 of the routers in a model."""
    return {f"gate.{name}" for x in model.modules() if isinstance(x, HfMoeRouter) for name in added(x)}


class HfMoeRouters:
    """What a model does for its routers."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config: Any = None, **kwargs):
        """As Transformers' own; with `trust_remote_code=True` a router whose file comes with the model is known."""
        if kwargs.get("trust_remote_code"):
            places = {name: kwargs[name] for name in PLACES if name in kwargs}
            said = config
            if getattr(said, "model_type", None) != cls.config_class.model_type:
                said = cls.config_class.from_pretrained(said or pretrained_model_name_or_path, **places)
            said.run_router_code(pretrained_model_name_or_path, **places)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    def post_init(self):
        super().post_init()
        self._keep_in_fp32_modules_strict.update(in_float32(self))
