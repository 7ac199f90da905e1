"""The seam to Transformers: what is undocumented there and conversions take."""

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

# Functions of the host that are called here: the arguments that they were written against, in order.
CALLED = {
    get_model_conversion_mapping: "model, key_mapping, hf_quantizer, add_legacy",
    rename_source_key: (
        "source_key, weight_renamings, weight_converters, base_model_prefix, meta_state_dict, reverse"
    ),
}


def names_in_memory(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Name in a checkpoint's files -> the parameter's name in the model, and whether that is another tensor, which is
    computed from what is stored."""
    mapping, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
    converters = [x for x in mapping if isinstance(x, WeightConverter)]
    names = {}
    for name in sorted(stored):  # as the host reads them: some renamings wait for a first name
        new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        names[name] = (new, pattern is not None)
    return names
