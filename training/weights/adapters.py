"""LoRA on parts of a mixture of experts, with PEFT: what it reaches is counted, and merging keeps float32.

Paper: https://arxiv.org/abs/2106.09685. On PEFT 0.21, which decides how each part is targeted:
- Fused experts [E, out, in] are reached by `target_parameters`: each expert gets its own A [r, in] and B [out, r]. No
  dropout, no DoRA. PEFT's forward builds W + BA of all experts, and its backward the whole gradient; hf_moe's kernels
  add the factors instead (hf_moe/kernels/low_rank.py).
- In Transformers' own families with fused experts, gate_proj, up_proj and down_proj in `target_modules` mean the
  experts, whatever stands before them. So MLPs, too, are reached by the names of their weights.
- Merged into bfloat16, the change of experts is rounded before it is added and again after, that of other matrices
  once: `merging.py` does without the first.
- Nothing says whether a part was missed: `check_coverage` does.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..balance.selection_bias import base_name
from ..host_trl import LoraLayer, adapted_name, add_beside, show_bias
from .groups import MATRIX_PARTS as LORA_PARTS
from .groups import matrices
from .quantized import STORED, check_quantization

EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj")  # of Transformers' fused experts, to PEFT


@dataclass
class AdapterArguments:
    """A LoRA adapter in place of training the weights themselves."""

    lora_parts: list[str] | None = field(
        default=None, metadata={"help": "Parts of the model that get an adapter.", "choices": LORA_PARTS}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter, of each expert's too."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter is multiplied by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter; attention alone has it."})
    lora_base: str | None = field(
        default=None,
        metadata={
            "help": "Store the model's own matrices, routed experts too, in 4 bits (nf4: QLoRA, needs bitsandbytes; "
            "int4: equal steps) or as float8 in blocks of 128 x 128 (fp8: as DeepSeek-V3 is released).",
            "choices": list(STORED),
        },
    )
    lora_merge: str | None = field(
        default=None,
        metadata={
            "help": "Also write the model with the adapter merged into its weights, in this type, to "
            "output_dir/merged, and report how many routes that changed.",
            "choices": ["float32", "bfloat16"],
        },
    )


def check_adapter_arguments(args: AdapterArguments, trainable: str) -> None:
    """Raises ValueError for what contradicts itself. Run before anything is loaded."""
    if args.lora_parts is None:
        for name in ("lora_merge", "lora_base"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name} is {getattr(args, name)}, but there is no adapter: give lora_parts.")
        return
    unknown = [part for part in args.lora_parts if part not in LORA_PARTS]
    if unknown or not args.lora_parts:
        raise ValueError(f"lora_parts is {args.lora_parts}; it can hold {', '.join(LORA_PARTS)}.")
    if trainable != "all":
        raise ValueError(
            f"trainable is {trainable} and lora_parts {' '.join(args.lora_parts)}: an adapter freezes every weight of "
            "the model; leave lora_parts out, or give --trainable all."
        )
    if args.lora_r < 1:
        raise ValueError(f"lora_r is {args.lora_r}; it must be at least 1.")
    if args.lora_dropout and set(args.lora_parts) != {"attention"}:
        raise ValueError(
            f"lora_dropout is {args.lora_dropout}, which adapters of MLPs and experts do not have: set it to 0, or "
            "lora_parts to attention alone."
        )
    if args.lora_base is not None:
        check_quantization(args.lora_base)


def lora_targets(model: nn.Module, parts: list[str]) -> dict[str, str]:
    """Those of `matrices` that are in `parts`. Raises ValueError for a part that the model does not have."""
    found = matrices(model)
    lacking = [part for part in parts if part not in found.values()]
    if lacking:
        present = ", ".join(part for part in LORA_PARTS if part in found.values())
        raise ValueError(f"lora_parts names {' and '.join(lacking)}, but the model has {present} only.")
    return {name: part for name, part in found.items() if part in parts}


def token_rows(model: nn.Module, tokens: list[int]) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices` of `tokens`: of the embeddings, and of a head that is not the same weights."""
    if not tokens:
        return None
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    found = {names[embeddings]: tokens}
    return found if head is None or head.weight is embeddings.weight else found | {names[head]: tokens}


def endings(wanted: set[str], names: Iterable[str], words: int) -> set[str]:
    """The ends of the wanted names, of at least so many words, that no other of `names` has: few, for they are the
    same in every layer."""
    others = {end for name in names if name not in wanted for end in ends(name, 1)}
    return {next(end for end in ends(name, words) if end not in others) for name in wanted}


def ends(name: str, words: int) -> Iterator[str]:
    """Of at least so many words; `weight` is none."""
    parts = name.split(".")
    first = words + (parts[-1] == "weight")
    return (".".join(parts[-count:]) for count in range(min(first, len(parts)), len(parts) + 1))


def lora_config(
    model: nn.Module, args: AdapterArguments, tokens: Sequence[int] = ()
) -> tuple[LoraConfig, dict[str, str]]:
    """PEFT's configuration of an adapter on `args.lora_parts` and the rows of `tokens`, and the weights that it is to
    reach, as `lora_targets`.

    Raises ValueError as that does, and for the experts of mixture-of-heads attention.
    """
    targets = lora_targets(model, args.lora_parts)
    heads = [name for name, part in targets.items() if part == "routed_experts" and ".self_attn." in name]
    if heads:
        raise ValueError(
            f"{heads[0]}: PEFT's wrapper would hide the attention around it; lora_parts can be attention."
        )
    # What PEFT would take for an expert's matrix, and all that is no module, is reached as a parameter.
    as_modules = {
        name.removesuffix(".weight")
        for name, part in targets.items()
        if part == "attention" and name.split(".")[-2] not in EXPERT_MATRICES
    }
    as_parameters = {name for name in targets if name.removesuffix(".weight") not in as_modules}
    modules = endings(as_modules, [name for name, _ in model.named_modules()], 1)
    parameters = endings(as_parameters, [name for name, _ in model.named_parameters()], 2)
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=sorted(modules),
        target_parameters=sorted(parameters) or None,
        trainable_token_indices=token_rows(model, list(tokens)),
        task_type="CAUSAL_LM",
    )
    return config, targets


def add_adapter(model: nn.Module, args: AdapterArguments, tokens: Sequence[int] = ()) -> tuple[PeftModel, str]:
    """The model with a LoRA adapter on `args.lora_parts` and the rows of `tokens`, all else frozen; and what it
    covers, in words.

    Raises ValueError as `lora_config` and `check_coverage` do.
    """
    config, targets = lora_config(model, args, tokens)
    adapted = get_peft_model(model, config)
    add_beside(adapted)
    if tokens:
        show_bias(model.get_output_embeddings())
    covered = check_coverage(adapted, targets, args.lora_parts)
    return adapted, f"{covered}, among them the rows of {len(tokens)} new tokens" if tokens else covered


def adapted_weights(model: PeftModel) -> dict[str, LoraLayer]:
    """Name of a weight in the base model -> the layer that adapts it."""
    return {
        f"{base_name(name)}.{adapted_name(layer)}": layer
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }


@torch.no_grad()
def merge_one_by_one(model: nn.Module, dtype: torch.dtype) -> None:
    """Each adapted weight in float32 for as long as its change is added: the whole model is never that large."""
    for layer in [x for x in model.modules() if isinstance(x, LoraLayer)]:
        weight = getattr(layer.get_base_layer(), adapted_name(layer))
        weight.data = weight.data.float()
        for factors in (layer.lora_A, layer.lora_B):
            factors.float()
        layer.merge(safe_merge=True)
        weight.data = weight.data.to(dtype)


def check_coverage(model: PeftModel, targets: dict[str, str], parts: list[str]) -> str:
    """What the adapter reaches, in words. Raises ValueError where it isn't all of `targets`, and nothing else."""
    layers = adapted_weights(model)
    missed, extra = sorted(targets.keys() - layers.keys()), sorted(layers.keys() - targets.keys())
    if missed or extra:
        word, names = ("missed", missed) if missed else ("also reached", extra)
        raise ValueError(f"The adapter {word} {len(names)} weights, the first of them {names[0]}.")
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    whole = sum(math.prod(x.shape) for x in model.parameters()) - sum(x.numel() for x in trained.values())
    count = sum(x.numel() for x in trained.values())
    covered = ", ".join(f"{sum(part == x for x in targets.values())} matrices of {part}" for part in parts)
    return f"adapter on {covered}: {count:,} parameters ({count / whole:.2%} of the model's {whole:,})"
