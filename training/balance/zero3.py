"""DeepSpeed's ZeRO-3 and experts that some processes leave idle.

ZeRO-3 gathers the weights of a module when it is called, and expects that all processes call the same modules. A loop
over the experts that got tokens calls others on each, which ends in an error or never. A leaf is gathered as a whole.
"""

from torch import nn

from hf_moe.routers import Router


def gather_experts_whole(model: nn.Module, routers: dict[str, Router]) -> None:
    """Make the experts beside each router one leaf. To be called before DeepSpeed gets the model."""
    from deepspeed.utils import set_z3_leaf_module

    for name in routers:
        layer = model.get_submodule(name.rpartition(".")[0])
        experts = getattr(layer, "experts", None)
        fused = isinstance(experts, nn.Module) and not isinstance(experts, nn.ModuleList)
        set_z3_leaf_module(experts if fused else layer, True)
