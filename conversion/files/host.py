"""The seam to Transformers: what is undocumented there and conversions take."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

# Functions of the host that are called here: the arguments that they were written against, in order.
CALLED = {
    get_model_conversion_mapping: "model, key_mapping, hf_quantizer, add_legacy",
    rename_source_key: (
        "source_key, weight_renamings, weight_converters, base_model_prefix, meta_state_dict, reverse"
    ),
    WeightConverter.add_tensor: "self, target_key, source_key, source_pattern, future",
    WeightConverter.convert: "self, layer_name, model, config, hf_quantizer, loading_info",
}


class Conversion(NamedTuple):
    """Tensors of a model that the host computes together of others in the files.

    stored: their names. of: what it makes of them, given what reads one: names in the model -> tensors.
    """

    stored: list[str]
    of: Callable[[Callable[[str], torch.Tensor]], dict[str, torch.Tensor]]


def names_in_memory(model: PreTrainedModel, stored: Iterable[str]) -> tuple[dict[str, str], list[Conversion]]:
    """Name in a checkpoint's files -> the parameter's name in the model; and what is computed of the other names."""
    mapping, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
    converters = [x for x in mapping if isinstance(x, WeightConverter)]
    names, together = {}, defaultdict(dict)
    for name in sorted(stored, key=dot_natural_key):  # as the host reads them: some renamings wait for a first name
        new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is None:
            names[name] = new
        else:
            together[new][name] = pattern
    return names, [conversion(model, converters, new, patterns) for new, patterns in together.items()]


def conversion(
    model: PreTrainedModel, converters: list[WeightConverter], first: str, patterns: dict[str, str]
) -> Conversion:
    """The conversion that makes the parameter `first`, of the stored tensors that match these patterns."""
    whole = next(x for x in converters if next(iter(patterns.values())) in x.source_patterns)

    def of(read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = deepcopy(whole)
        for name, pattern in patterns.items():
            converter.add_tensor(first, name, pattern, read(name))
        made = converter.convert(first, model=model, config=model.config)
        return {name: x[0] if isinstance(x, list) else x for name, x in made.items()}

    return Conversion(list(patterns), of)
