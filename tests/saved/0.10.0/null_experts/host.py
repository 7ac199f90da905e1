"""The seam to Transformers: all that is private or undocumented there, or has been renamed, stands here.

These files stay beside the weights they were saved with, while Transformers moves on. What can be read off the host
is read off; what can't is written down, and a host that differs is refused by name, not answered with another text.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import wraps

import transformers
from transformers.cache_utils import BaseQuantizedLayer, Cache, DynamicLayer, StaticLayer
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.integrations.moe import _grouped_linear
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs, install_output_capuring_hook

from .version import __version__

logger = logging.get_logger(__name__)

# The oldest and the newest minor release that all tests ran with.
TESTED = ((5, 21), (5, 24))

# What the cache is called in forward's arguments, in outputs and between the steps of `generate`: until 5.23
# `past_key_values`, from 5.24 on `cache`. In these files it is `past_key_values`.
CACHE = next((x.name for x in fields(MoeModelOutputWithPast) if "Cache" in str(x.type)), None)

# Arguments that `forward` need not name: what the host's attention functions, its continuous batching and its losses
# take, and what vLLM gives its attention.
PASSED_ON = frozenset(
    [
        *TransformersKwargs.__annotations__,
        *FlashAttentionKwargs.__annotations__,
        *PagedAttentionArgs.__annotations__,
        *("ignore_index", "shift_labels", "return_dict", "attention_instances"),
    ]
)

# Arguments of `generate` alone that the host leaves among the model's.
OF_GENERATE = ("tokenizer", "assistant_tokenizer")

# Methods of the host that these files override, or call: the arguments that they were written against, and why it is
# these, most of which have no documented form.
PRIVATE = {
    PreTrainedModel: {
        "_init_weights": ("self, module", "documented for new models; the underscore is the host's"),
        "_sdpa_can_dispatch": ("self, is_init_check", "a field of the config, not the class, rules sdpa out"),
        "_flash_attn_can_dispatch": ("self, flash_attn_version, is_init_check", "as sdpa"),
        "_grouped_mm_can_dispatch": ("self", "as sdpa: by the sizes of the config"),
        "_initialize_weights": ("self, module, is_custom_code", "called: a graft's blocks, by its own class"),
        "initialize_weights": ("self", "a graft's decoder is the host's, which knows no experts"),
        "is_custom_code": ("", "undocumented; a graft is initialised as the host's own models are"),
        "get_correct_experts_implementation": ("self, requested_experts", "a graft's backbone has none"),
        "_can_set_experts_implementation": ("", "a graft can, whose host's own class can't"),
        "_from_config": ("config, kwargs", "where AutoModel begins: a graft's class depends on its config"),
        "_check_and_adjust_attn_implementation": (
            "self, attn_implementation, is_init_check, allow_all_kernels",
            "vLLM sets its attention here; what that would leave out must be refused before",
        ),
        "_set_gradient_checkpointing": (
            "self, enable, gradient_checkpointing_func, every_n_layers",
            "its public callers have had two names; all of them end here",
        ),
        "_adjust_missing_and_unexpected_keys": (
            "self, loading_info",
            "missing MTP weights must stop loading, which else draws them at random",
        ),
    },
    GenerationMixin: {
        "prepare_inputs_for_generation": (
            f"self, input_ids, next_sequence_length, {CACHE}, attention_mask, inputs_embeds, is_first_iteration, "
            "kwargs",
            "documented; LongRoPE drops a cache here, and what is generate's alone goes",
        ),
        "_prepare_cache_for_generation": (
            "self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length",
            "a recorded step needs a cache whose addresses stay; generate() offers no other place for a default",
        ),
        "_optimize_model_for_decode": ("self", "the host would change the experts' implementation for decoding"),
        "_sample": (
            "self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, "
            "model_kwargs",
            "the loop that replays a recorded step; custom_generate would ask each caller for it",
        ),
        "_prefill": (
            "self, input_ids, generation_config, model_kwargs, is_first_iteration",
            "called: reads the prompt",
        ),
        "_update_model_kwargs_for_generation": (
            "self, outputs, model_kwargs, is_encoder_decoder, num_new_tokens",
            "called: the mask and positions after the prompt",
        ),
        "_validate_generation_mode": (
            "self, generation_mode, generation_config, generation_mode_kwargs",
            "use_mtp must be refused beside what it can't do before anything is read",
        ),
        "_assisted_decoding": (
            "self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, "
            "inputs_tensor, assistant_model, assistant_tokenizer, tokenizer, model_kwargs",
            "use_mtp is the host's option, whose own loop loads the modules anew at each call",
        ),
        "init_continuous_batching": (None, "documented; only to refuse what it has no cache for"),
    },
    Cache: {
        "update": ("self, key_states, value_states, layer_idx, args, kwargs", "called by each attention"),
    },
    DynamicLayer: {"update": ("self, key_states, value_states, args, kwargs", "documented; grows in place")},
    StaticLayer: {
        "update": ("self, key_states, value_states, args, kwargs", "documented; shows what it has filled"),
        "lazy_initialization": ("self, key_states, value_states", "where memory is reserved"),
        "get_mask_sizes": ("self, query_length", "what masks see of the cache"),
        "get_seq_length": ("self", "how many tokens the cache holds"),
    },
}


def arguments(function: Callable) -> str:
    return ", ".join(inspect.signature(function).parameters)


def differences(table: dict[type, dict] = PRIVATE) -> list[str]:
    """What this host does not call as `table` has it: one line a method."""
    lines = [] if CACHE or table is not PRIVATE else ["no field of MoeModelOutputWithPast is a Cache"]
    for owner, methods in table.items():
        for name, (written, _) in methods.items():
            if not hasattr(owner, name):
                lines.append(f"{owner.__name__}.{name} is gone")
            elif written is not None and (found := arguments(getattr(owner, name))) != written:
                lines.append(f"{owner.__name__}.{name} takes ({found}), not ({written})")
    return lines


def check_version(version: str) -> None:
    """Raise ImportError where `version` of Transformers is not one that these files can be right on.

    A newer one than was tested is said once, and refused where it differs in what these files override or call.
    """
    oldest, newest = (".".join(map(str, x)) for x in TESTED)
    number = tuple(int(x) for x in version.split(".")[:2])
    wayout = f"pip install 'transformers>={oldest},<{TESTED[1][0]}.{TESTED[1][1] + 1}', or pip install -U hf_moe"
    if number < TESTED[0]:
        raise ImportError(f"hf_moe {__version__} needs Transformers {oldest} or newer, this is {version}: {wayout}.")
    if number > TESTED[1] or CACHE is None:
        if found := differences():
            raise ImportError(
                f"Transformers {version} is newer than {newest}, with which hf_moe {__version__} was tested, and "
                f"differs: {found[0]}{f' (and {len(found) - 1} more)' if found[1:] else ''}; {wayout} and renew the "
                "folder with hf-moe renew."
            )
        logger.warning_once(
            f"hf_moe {__version__}'s model code was tested with Transformers {oldest} to {newest}; this is {version}."
        )


check_version(transformers.__version__)


def knows_empty_slots(experts) -> None:
    """Have the host's implementations of these experts pass over an index of E, as they do under expert parallelism.

    Raises RuntimeError where the host has no such switch.
    """
    if not hasattr(experts, "_is_expert_parallel"):
        raise RuntimeError(
            f"Transformers {transformers.__version__} no longer says how its experts pass over empty slots, which "
            "this router leaves: install the newest hf_moe."
        )
    experts._is_expert_parallel = True


def host_arguments(*recorded: str) -> Callable:
    """A decorator of a public `forward` that has an argument `past_key_values`, and passes its `kwargs` on.

    The cache may come under that name or the host's. Any other keyword that neither the forward names nor anybody
    below it takes is a TypeError: a name that the host changed must not vanish on the way. `recorded` are the outputs
    that `output_...` may ask for.
    """

    def decorate(forward: Callable) -> Callable:
        shown = inspect.signature(forward)
        known = PASSED_ON.union(shown.parameters, (f"output_{name}" for name in recorded)) - {"self", "kwargs"}

        @wraps(forward)
        def wrapped(self, *args, **kwargs):
            paged = str(self.config._attn_implementation).startswith("paged|")
            if CACHE in kwargs or "cache" in kwargs:
                kwargs = renamed_cache(kwargs, paged)
            if paged and kwargs.get("past_key_values") is None and kwargs.get("cache") is None:
                raise TypeError("The attention is that of continuous batching, and no paged cache came with the call.")
            for name in kwargs:
                if name not in known:
                    raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {name!r}")
            return forward(self, *args, **kwargs)

        # generate(), PEFT and exporters read from it what they may give.
        parameters = [x.replace(name=CACHE) if x.name == "past_key_values" else x for x in shown.parameters.values()]
        wrapped.__signature__ = shown.replace(parameters=parameters)
        return wrapped

    return decorate


def renamed_cache(kwargs: dict, paged: bool) -> dict:
    """`kwargs` with the cache as `past_key_values`, whether it came so, by the host's name, or as `cache`.

    Until 5.23 the paged cache of continuous batching comes as `cache` and is the attention function's own.
    """
    kwargs = dict(kwargs)
    for name in dict.fromkeys((CACHE, "cache")):
        own = name != CACHE and paged
        if name == "past_key_values" or own or name not in kwargs:
            continue
        cache = kwargs.pop(name)
        if cache is not None and kwargs.get("past_key_values") is not None:
            raise TypeError(f"Give the cache once, not both as {name} and as past_key_values.")
        if cache is not None:
            kwargs["past_key_values"] = cache
    return kwargs


def shown_as(host_method: Callable) -> Callable:
    """A decorator that gives an override the host's own signature, which the host reads, and keeps its docstring."""

    def decorate(method: Callable) -> Callable:
        method.__signature__ = inspect.signature(host_method)
        return method

    return decorate


def pad_token(generation_config: GenerationConfig):
    """What a finished row of a batch is filled with, a tensor on the device of the text."""
    return generation_config._pad_token_tensor


def of_the_user(cache: Cache) -> bool:
    """Whether somebody gave this cache to `generate`, and so may still have it."""
    return getattr(cache, "_is_user_defined", False)


def does_nothing(hook: Callable) -> bool:
    """Whether a hook is one of Transformers' that changes nothing where there are no gradients: it leaves one where
    outputs were once recorded, and one on the embeddings, for gradients to reach checkpointed layers."""
    of_embeddings = f"{PreTrainedModel.enable_input_require_grads.__qualname__}."
    recorded = hook.__module__ == capture_outputs.__module__
    return recorded or getattr(hook, "__qualname__", "").startswith(of_embeddings)


def record(model, modules: Iterable, prefix: str) -> None:
    """Let `model` record, of `modules` that came after it placed its hooks, the outputs whose names begin so."""
    if not getattr(model, "_output_capturing_hooks_installed", False):
        return
    recorders = {name: x for name, x in model._can_record_outputs.items() if name.startswith(prefix)}
    for module in modules:
        for name, recorder in recorders.items():
            install_output_capuring_hook(module, name, recorder.index)


grouped_product = _grouped_linear  # y = x W_e^T over rows sorted by expert: (rows, weight [E, out, in], ends [E])
QuantizedLayer = BaseQuantizedLayer
