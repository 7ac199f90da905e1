"""Pretraining and continued pretraining on packed text: `stage: pretrain`.

Documents are packed into rows of max_length, long ones cut; each sees only itself. What a recipe leaves null comes
from the scaling laws of DeepSeek LLM, for the compute C = M D of the run: learning_rate, and the batch, batch_tokens.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from hf_moe.conversion.known_config import folder_config
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_moe.reading import auto_config, built
from hf_moe.sizes.counts import sizes
from hf_moe.sizes.scaling_laws import batch_tokens, learning_rate

from ..balance.moe_arguments import row_processes
from ..data.mixture import mix
from ..data.rows import is_conversational
from ..data.sources import DataArguments, load_sources, together
from ..output.resuming import check_same_step
from ..trainers.pipeline.arguments import (
    NO_PIPELINE,
    PipelineArguments,
    check_layers,
    check_micro_batches,
    check_pipeline,
)
from ..trainers.pipeline.trainer import trainer_for
from ..trainers.refusals import leave_out_routing
from ..trainers.sft_trainer import MoeSFTConfig
from .loading import (
    ModelArguments,
    check_products,
    choose_fastest,
    choose_products,
    choose_trained,
    implementations,
    load_tokenizer,
    load_trained_model,
    right_config,
)
from .new_tokens import give_rows
from .rate_guard import RateGuard
from .run import Trained, checkpoint_to_resume, say_summary
from .trained import train_and_merge


@dataclass
class MoePretrainConfig(MoeSFTConfig):
    """MoeSFTConfig with the size of the run, and with what pretraining takes where nothing is said."""

    from_scratch: bool = field(
        default=False, metadata={"help": "Draw the weights anew, by the model's configuration and the seed."}
    )
    train_tokens: float | None = field(
        default=None,
        metadata={"help": "Tokens to train on, D, instead of max_steps; the data repeat if they are fewer."},
    )
    batch_tokens: float | None = field(
        default=None,
        metadata={
            "help": "Tokens of an optimizer step, reached by accumulation; null: the scaling law's, 0.2920 C^0.3271."
        },
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "The highest of the schedule; null: the scaling law's, 0.3118 C^-0.1250, for random weights alone."
        },
    )
    packing: bool = field(default=True, metadata={"help": "Several documents a row, each of which sees only itself."})
    packing_strategy: str = field(
        default="bfd_split",
        metadata={
            "help": "How rows are filled; bfd_split cuts long documents, bfd drops their ends.",
            "choices": ["bfd", "bfd_split", "wrapped"],
        },
    )


ARGUMENTS = (ModelArguments, DataArguments, MoePretrainConfig, PipelineArguments)
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: MoePretrainConfig,
    pipeline_args: PipelineArguments = NO_PIPELINE,
) -> Trained:
    """Train, evaluate before and after, save to `output_dir`; the metrics have `eval_loss_before`."""
    check_pipeline(pipeline_args, args, model_args)
    checkpoint = checkpoint_to_resume(args)
    if args.from_scratch and checkpoint is None:
        check_from_scratch(model_args.model_name_or_path, args)
    elif args.learning_rate is None and not args.from_scratch:
        raise ValueError(
            "learning_rate null means the scaling law's, which is for random weights and wrecks trained ones: give "
            "--learning_rate, of the order of the highest that they were trained with, or below."
        )
    sources, held_out = load_sources(data_args, args, text_field=args.dataset_text_field)
    args.eval_on_start = bool(held_out) and checkpoint is None
    source = checkpoint or model_args.model_name_or_path
    tokenizer = load_tokenizer(source, model_args, args)
    check_text([*sources.values(), *held_out.values()], tokenizer, args)
    print(size_run(source, args), file=sys.stderr)
    check_micro_batches(args, "batch_tokens")
    check_layers(source, model_args, args)
    if checkpoint is not None:
        check_same_step(checkpoint, args)
    if args.from_scratch and checkpoint is None:
        check_products(source, model_args, args)
        model = new_model(source, model_args, args)
        leave_out_routing(model, args)
        choose_fastest(model, model_args, args)
        choose_products(model, model_args)
    else:
        model = load_trained_model(source, model_args, args)
    give_rows(model, tokenizer, args, model_args)
    choose_trained(model, model_args.trainable, args)
    trainer = trainer_for(args)(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=mix(sources, data_args.train_weights, args.seed),
        eval_dataset=together(held_out, data_args.eval_by_source),
    )
    if not args.from_scratch and checkpoint is None:
        trainer.add_callback(RateGuard(trainer))
    metrics = train_and_merge(trainer, checkpoint, model_args)
    say_summary(trainer, metrics)
    return Trained(trainer, metrics)


def check_from_scratch(source: str, args: MoePretrainConfig) -> None:
    """Say that weights are drawn. Raises ValueError where `source` has weights and a recipe alone leaves them aside.

    A name of the Hub is taken for one of a model with weights.
    """
    folder = Path(source)
    trained = not folder.is_dir() or any(path for kind in WEIGHTS for path in folder.glob(kind))
    if trained and "from_scratch" not in getattr(
        args, "given", ("from_scratch",)
    ):  # Python's callers say it themselves
        raise ValueError(
            f"model_name_or_path {source} has weights, and the recipe's from_scratch would draw new ones in their "
            "place: give --from_scratch false (and a --learning_rate) to train these, --from_scratch true to train "
            "new ones by its configuration."
        )
    unread = "; its own are not read" if trained else ""
    print(
        f"from scratch: weights drawn by the configuration of {source} and seed {args.seed}{unread}", file=sys.stderr
    )


def check_text(groups: list[Dataset], tokenizer: PreTrainedTokenizerBase, args: MoePretrainConfig) -> None:
    """Raises ValueError where rows are no plain text, or nothing tells where a document ends."""
    for rows in groups:
        if is_conversational(rows) or args.dataset_text_field not in rows.column_names:
            raise ValueError(
                f"stage pretrain reads text, but there are rows with the columns {', '.join(rows.column_names)}: give "
                f"rows with {args.dataset_text_field}, or another --dataset_text_field."
            )
    if tokenizer.eos_token is None:
        raise ValueError("The tokenizer has no eos_token, which ends a document.")


def size_run(source: str, args: MoePretrainConfig) -> str:
    """Set batch, learning rate and number of steps where they are to be computed; returns what was set, in words.

    Raises ValueError where the arguments say too little, or contradict each other.
    """
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps is {args.gradient_accumulation_steps}, but in stage pretrain batch_tokens "
            "decides it: give that."
        )
    if args.max_length is None:
        raise ValueError("max_length is null, but packing fills rows of max_length tokens: give it.")
    for name in ("train_tokens", "batch_tokens"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"{name} is {getattr(args, name):g}; it must be above 0, and a number.")
    if args.train_tokens is not None and args.max_steps > 0:
        raise ValueError(
            f"max_steps is {args.max_steps}, but train_tokens ({args.train_tokens:,.0f}) decides how long this recipe "
            "trains: give another --train_tokens."
        )
    by_law = [name for name in ("learning_rate", "batch_tokens") if getattr(args, name) is None]
    total = args.train_tokens
    if total is None and args.max_steps > 0 and args.batch_tokens is not None:
        total = args.max_steps * args.batch_tokens
    said = ""
    if by_law:
        if total is None:
            raise ValueError(
                f"{' and '.join(by_law)} null means the scaling law's, which needs the compute of the run: give "
                "--train_tokens."
            )
        flops_per_token = law_flops(source, args.max_length)
        compute = flops_per_token * total
        args.learning_rate = learning_rate(compute) if args.learning_rate is None else args.learning_rate
        args.batch_tokens = batch_tokens(compute) if args.batch_tokens is None else args.batch_tokens
        said = (
            f"scaling laws for C = M D = {flops_per_token:.3g} FLOPs a token x {total:.3g} tokens = {compute:.3g} "
            f"FLOPs: {' and '.join(by_law)}; "
        )
    micro_batch = args.per_device_train_batch_size * args.max_length * row_processes(args)
    args.gradient_accumulation_steps = max(1, round(args.batch_tokens / micro_batch))
    step_tokens = micro_batch * args.gradient_accumulation_steps
    if args.train_tokens is not None:
        args.max_steps = math.ceil(args.train_tokens / step_tokens)
    steps = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    return f"{said}learning rate {args.learning_rate:.3g}, {step_tokens:,} tokens a step, {steps}"


def law_flops(source: str, context: int) -> int:
    """M of the model in the folder `source`. Raises ValueError where it cannot be counted."""
    if not Path(source).is_dir():
        raise ValueError(
            f"{source} is no folder, and only a folder's FLOPs are counted: give --learning_rate and --batch_tokens."
        )
    flops = sizes(folder_config(Path(source)), context)["non_embedding_training_flops_per_token"]
    if flops is None:
        raise ValueError(f"In {source} the data decide about the FLOPs: give --learning_rate and --batch_tokens.")
    return flops


def new_model(source: str, model_args: ModelArguments, args: MoePretrainConfig) -> PreTrainedModel:
    """The model of the configuration in `source` with weights drawn by the seed, and nothing of where those came from.

    Nor of how they were stored.
    """
    config = right_config(source, model_args, args).get("config") or auto_config(
        source, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
    )
    for name in ("provenance", "quantization_config"):
        if getattr(config, name, None) is not None:
            delattr(config, name)
    set_seed(args.seed)
    return built(
        AutoModelForCausalLM.from_config,
        f"{source} cannot be built",
        config,
        dtype=model_args.dtype if model_args.dtype == "auto" else getattr(torch, model_args.dtype),
        trust_remote_code=args.trust_remote_code,
        **implementations(model_args),
    )
