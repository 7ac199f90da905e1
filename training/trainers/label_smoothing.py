"""Label smoothing for causal models that Transformers does not know by name."""

import torch

from ..host import LabelSmoother


class ShiftedLabelSmoother(LabelSmoother):
    """LabelSmoother that always scores a position by the next label: the Trainer does so for its own models only."""

    def __call__(
        self,
        model_output,
        labels: torch.Tensor,
        shift_labels: bool = True,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        return super().__call__(model_output, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)
