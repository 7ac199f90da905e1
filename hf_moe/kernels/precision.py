"""The type that a kernel computes in."""

import torch


def computed_in(x: torch.Tensor, own: torch.dtype) -> torch.dtype:
    """Autocast's on the device of `x` where that is on, as for PyTorch's products, else `own`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else own
