"""Models whose weights stay in their files: each layer is in memory, in float32, only while it computes.

So two models can be compared on a machine that could hold neither.
"""

import copy
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...generation_settings import mended_config
from ...model.grouped import takes_rows
from ...reading import auto_class, auto_config, built, whole_model
from ...stored_loading import quantized_as
from .checkpoint import WEIGHT_DTYPES, Checkpoint, Entry
from .writer import Output


@contextmanager
def loaded(
    folder: Path, config: PreTrainedConfig, trust_remote_code: bool = False, quantize: str | None = None
) -> Iterator[PreTrainedModel]:
    """The model in `folder`, computing in float32; with its matrices stored as `quantize` says, in memory.

    Where the files do not hold the parameters under their names, as when experts lie one by one, Transformers puts
    each layer's together, in files of its own among the system's temporary ones; in memory where it cannot.
    """
    model, checkpoint = empty(config), Checkpoint(folder)
    if quantize is not None:
        yield ready(by_transformers(folder, trust_remote_code, **quantized_as(quantize, config, folder)))
    elif is_file_backed(model, checkpoint.entries):
        yield ready(backed(model, checkpoint))
    elif can_offload(model, checkpoint.entries):
        logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what is asked for here
        with tempfile.TemporaryDirectory(prefix="hf_moe-") as aside:
            yield ready(by_transformers(folder, trust_remote_code, device_map={"": "disk"}, offload_folder=aside))
    else:
        # Until Transformers 5.22 dequantised experts stay in bfloat16.
        yield ready(by_transformers(folder, trust_remote_code).float())


def backed(model: PreTrainedModel, checkpoint: Checkpoint) -> PreTrainedModel:
    """The model with its parameters in the files of the checkpoint."""
    state = {name: checkpoint.tensor(name) for name in stored_names(model)}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for group in groups(model):
        group.register_forward_pre_hook(in_float32)
        group.register_forward_hook(partial(back_to_the_file, checkpoint))
    return model


def by_transformers(folder: Path, trust_remote_code: bool = False, **where) -> PreTrainedModel:
    """The model as Transformers loads it. Raises a ValueError where it would go on with weights drawn at random."""
    trusted = {"trust_remote_code": trust_remote_code}
    config = mended_config(folder, **trusted)[0] or auto_config(folder, **trusted)
    given = {"dtype": torch.float32, "use_safetensors": True}
    return whole_model(folder, auto_class(config), config=config, **given, **trusted, **where)


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """The model for inference, its experts one by one where the grouped product would refuse them."""
    experts = [parameter for parameter in model.parameters() if parameter.ndim == 3]
    if not all(takes_rows(size, torch.float32) for parameter in experts for size in parameter.shape[1:]):
        model.set_experts_implementation("eager")
    return model.eval()


def memory(config: PreTrainedConfig, tensors: Mapping[str, Entry | Output]) -> int:
    """Bytes that the weights of a `loaded` model take at a time, its files holding `tensors`."""
    model = empty(config)
    layer = 4 * max(sum(parameter.numel() for parameter in group.parameters()) for group in groups(model))
    if is_file_backed(model, tensors):
        return layer
    # A layer's experts one by one, put together by rows, and by experts.
    return 3 * layer if can_offload(model, tensors) else whole(model)


def whole(model: PreTrainedModel) -> int:
    """Bytes of all weights in float32."""
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def can_offload(model: PreTrainedModel, tensors: Mapping[str, Entry | Output]) -> bool:
    """Whether Transformers can put the model together on the disk of temporary files, which has room for all of it."""
    state = model.state_dict()
    # Of a tensor in another shape than the config's, it says on the disk neither its name nor what was expected.
    fits = all(tensors[name].shape == tuple(weight.shape) for name, weight in state.items() if name in tensors)
    room = shutil.disk_usage(tempfile.gettempdir()).free
    return fits and not is_quantized(model) and room > whole(model)


def is_quantized(model: PreTrainedModel) -> bool:
    return getattr(model.config, "quantization_config", None) is not None


def empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The model with parameters that have no memory, and with real buffers."""
    config = copy.deepcopy(config)  # else the dtype here would be written as the checkpoint's
    with init_empty_weights():
        what = f"A {config.model_type} with this config cannot be built"
        return built(auto_class(config).from_config, what, config, dtype=torch.float32, trust_remote_code=False)


def stored_names(model: PreTrainedModel) -> list[str]:
    return [name for name in model.state_dict() if name not in model.all_tied_weights_keys]


def is_file_backed(model: PreTrainedModel, tensors: Mapping[str, Entry | Output]) -> bool:
    """Whether the tensors are the model's parameters, name by name, and floats that stand for themselves."""
    state = model.state_dict()
    return not is_quantized(model) and all(
        name in tensors and tensors[name].shape == tuple(state[name].shape) and tensors[name].dtype in WEIGHT_DTYPES
        for name in stored_names(model)
    )


def groups(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that compute with no parameters but their own: the layers of a list, and what lies outside of lists."""
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            yield from module
        elif any(True for _ in module.parameters(recurse=False)):
            yield module
        else:
            yield from groups(module)


def in_float32(module: nn.Module, args: tuple) -> None:
    module.in_file = {}
    for name, parameter in module.named_parameters():
        module.in_file[name] = parameter.data
        parameter.data = parameter.data.float()


def back_to_the_file(checkpoint: Checkpoint, module: nn.Module, args: tuple, output: object) -> None:
    for name, parameter in module.named_parameters():
        parameter.data = module.in_file[name]
    checkpoint.release()
