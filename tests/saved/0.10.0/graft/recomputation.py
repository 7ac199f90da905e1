"""What checkpointing of activations must leave to the routers: their losses."""

from collections.abc import Callable

import torch

from .balancing import LOSSES, PENALTY
from .routing import ROUTERS


class HfMoeCheckpointing:
    """A model with router losses, which re-entrant checkpointing would cut off."""

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = torch.utils.checkpoint.checkpoint, **kwargs
    ):
        # PyTorch's default is True; Transformers fills in False only where no argument at all is given.
        reentrant = getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)
        if enable and reentrant and self.active_losses():
            raise ValueError(
                f"use_reentrant=True would cut {', '.join(self.active_losses())} off from the router; use "
                '{"use_reentrant": False} in activation_checkpointing_kwargs, or set them to 0.'
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def active_losses(self) -> list[str]:
        """The configuration's loss coefficients that are not 0, and the penalty of routers that have one."""
        penalty = [PENALTY] if ROUTERS[self.config.router_type].penalty is not None else []
        return [name for name in LOSSES if getattr(self.config, name, 0)] + penalty
