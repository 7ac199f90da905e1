"""What users may rely on: each public name is there, is typed, and none goes without a word here."""

import importlib
import inspect

import pytest

PUBLIC = {
    "hf_moe": {
        "HfMoeConfig",
        "HfMoeForCausalLM",
        "HfMoeForSequenceClassification",
        "HfMoeForTokenClassification",
        "HfMoeGraftConfig",
        "HfMoeGraftForCausalLM",
        "HfMoeGraftForImageTextToText",
        "HfMoeModel",
        "__version__",
        "StoredWeightsConfig",
        "fast_generate",
    },
    "hf_moe.conversion": {
        *("exchange_experts", "export_checkpoint", "grow", "import_checkpoint", "nearest_families", "prune"),
        *("upcycle", "verify"),
    },
    "hf_moe.telemetry": {"trace"},
    "hf_moe.sizes": {"sizes"},
}
# Loaded when asked for, with the extra `train`.
OF_TRAINING = {
    "MoeTrainer",
    "MoeTrainingArguments",
    "MoeSFTTrainer",
    "MoeSFTConfig",
    "MoeDPOTrainer",
    "MoeDPOConfig",
    "MoeGRPOTrainer",
    "MoeGRPOConfig",
    "load_router_bias",
    "load_rows",
    "quantize_experts",
    "train",
}
# Documented, in the modules where the documentation has them.
DOCUMENTED = {
    "hf_moe.demo": {"DEMO_MODEL"},
    "hf_moe.demo.text": {"postcard_rows", "story"},
    "hf_moe.generation.guided": {"GuidedLogitsProcessor"},
    "hf_moe.model.balancing": {"expert_loss", "quantile_bias", "routed", "statistics", "update_selection_bias"},
    "hf_moe.model.routing": {
        "ROUTERS",
        "Assignment",
        "HfMoeRouter",
        "Range",
        "Router",
        "RouterState",
        "choose",
        "drop_overflow",
        "leave_empty",
        "normalized",
        "replayed",
        "sigmoid_affinity",
        "softmax_affinity",
        "sqrt_softplus_affinity",
        "weights_of",
    },
    "hf_moe.telemetry.live": {"RoutingFigures"},
    # Of earlier releases, in the cards that they wrote.
    "hf_moe.training.esft": {"load_rows"},
}
NAMES = [(module, name) for table in (PUBLIC, DOCUMENTED) for module, names in table.items() for name in sorted(names)]
NAMES += [("hf_moe", name) for name in sorted(OF_TRAINING)]


@pytest.mark.parametrize("module", PUBLIC)
def test_a_module_says_what_is_public_in_it(module):
    assert set(importlib.import_module(module).__all__) == PUBLIC[module]


def test_what_training_needs_is_listed():
    from hf_moe import TRAINING

    assert TRAINING.keys() == OF_TRAINING


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_public_name_is_there_and_typed(module, name):
    found = getattr(importlib.import_module(module), name)
    if inspect.isfunction(found):
        assert untyped(found) == []
    if inspect.isclass(found):
        own = vars(found).items()
        methods = [x for key, x in own if inspect.isfunction(x) and not key.startswith("_") and of_hf_moe(x)]
        assert {method.__name__: untyped(method) for method in methods if untyped(method)} == {}


def of_hf_moe(function) -> bool:
    return function.__module__.startswith("hf_moe")


def untyped(function) -> list[str]:
    """The arguments of a function that have no type, and "return" where what it returns has none."""
    signature = inspect.signature(function)
    arguments = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.annotation is inspect.Parameter.empty and name not in ("self", "cls", "args", "kwargs")
    ]
    return arguments + (["return"] if signature.return_annotation is inspect.Signature.empty else [])
