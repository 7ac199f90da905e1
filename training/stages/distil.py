"""Distillation from a teacher, as the dense model that a mixture was upcycled from: `stage: distil`.

Loss: a T^2 KL(teacher || student), both softened by the temperature T, plus 1 - a times the cross-entropy (Hinton et
al., https://arxiv.org/abs/1503.02531, 2). Each is a mean over the tokens of the whole optimizer step that have labels.
"""

import sys
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import SFTTrainer

from hf_moe.reading import whole_model
from hf_moe.same_tokens import check_same_tokens

from ..data.chat_templates import check_template, find_template, use_template
from ..data.mixture import mix
from ..data.sources import DataArguments, by_label, load_sources, together
from ..host_trl import log_beside_loss
from ..trainers.sft_trainer import MoeSFTConfig, MoeSFTTrainer
from ..weights.adapters import AdapterArguments
from .adapted import load_adapted
from .loading import ModelArguments, load_tokenizer, right_config
from .new_tokens import take_template, trained_tokens
from .run import Trained, checkpoint_to_resume, say_summary
from .trained import NO_ADAPTER, NO_ESFT, check_choices, train_and_merge


@dataclass
class MoeDistilConfig(MoeSFTConfig):
    """MoeSFTConfig with the teacher, and how much it counts."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of the teacher, or its Hub id. Its tokenizer must be the model's."}
    )
    teacher_dtype: str = field(
        default="bfloat16",
        metadata={"help": "Type of the teacher's weights.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    temperature: float = field(default=1.0, metadata={"help": "T, by which both models' logits are divided."})
    kl_weight: float = field(
        default=0.5, metadata={"help": "a, the teacher's share of the loss; the cross-entropy's is 1 - a."}
    )


class Distilling(SFTTrainer):
    """SFTTrainer whose loss is the mixture; `teacher` is set before it trains."""

    teacher: nn.Module

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.training = model.training
        inputs = {**inputs, "use_cache": False}
        with torch.no_grad():
            self.teacher_logits = self.teacher(**{k: v for k, v in inputs.items() if k in TEACHER_INPUTS}).logits
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def mixed_loss(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """`compute_loss_func` of the Trainer: the mixture, over the tokens of the step or of this batch."""
        counts = labels[:, 1:] != -100
        target = labels[:, 1:][counts]
        student, teacher = (x[:, :-1][counts].float() for x in (outputs.logits, self.teacher_logits))
        del self.teacher_logits
        kl = softened_kl(student, teacher, self.args.temperature).sum()
        cross_entropy = nn.functional.cross_entropy(student, target, reduction="sum")
        here = counts.sum().clamp(min=1)
        for name, value in (("kl", kl), ("cross_entropy", cross_entropy)):
            log_beside_loss(self, self.training, name, (value.detach() / here).item())
        whole = here if num_items_in_batch is None else num_items_in_batch
        return (self.args.kl_weight * kl + (1 - self.args.kl_weight) * cross_entropy) / whole


class MoeDistilTrainer(MoeSFTTrainer, Distilling):
    """Distillation with routing that is right in training; see MoeTrainerMixin."""

    def __init__(self, *args, teacher: PreTrainedModel, **kwargs):
        super().__init__(*args, **kwargs)
        self.compute_loss_func = self.mixed_loss
        self.teacher = self.accelerator.prepare_model(teacher.eval().requires_grad_(False), evaluation_mode=True)


MAX_TEMPERATURE = 1e4  # far beyond where nothing of the logits is left
TEACHER_INPUTS = ("input_ids", "attention_mask", "position_ids", "use_cache")
ARGUMENTS = (ModelArguments, DataArguments, MoeDistilConfig, AdapterArguments)


def softened_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each row of logits [N, V]: [N]."""
    student, teacher = ((logits / temperature).log_softmax(dim=-1) for logits in (student, teacher))
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(dim=-1)


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: MoeDistilConfig,
    adapter_args: AdapterArguments = NO_ADAPTER,
) -> Trained:
    """Train, evaluate before and after, save to `output_dir`; the metrics have `eval_loss_before`."""
    check_distil_arguments(args)
    check_choices(model_args, adapter_args, NO_ESFT)
    checkpoint = checkpoint_to_resume(args)
    args.chat_template_path = find_template(args.chat_template_path)
    sources, held_out = load_sources(data_args, args, text_field=args.dataset_text_field)
    args.eval_on_start = bool(held_out) and checkpoint is None
    source = checkpoint or model_args.model_name_or_path
    tokenizer = load_tokenizer(source, model_args, args)
    own_template = args.chat_template_path is None
    new = take_template(tokenizer, args) or trained_tokens(checkpoint)
    use_template(tokenizer, args)
    check_template(tokenizer, by_label(sources, held_out), args.dataset_num_proc)
    # A checkpoint of an adapter does not hold the model.
    weights = source if adapter_args.lora_parts is None else model_args.model_name_or_path
    model = load_adapted(weights, model_args, args, adapter_args, tokenizer, new)
    trainer = MoeDistilTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=mix(sources, data_args.train_weights, args.seed),
        eval_dataset=together(held_out, data_args.eval_by_source),
        teacher=load_teacher(model, tokenizer, args, roles=own_template),
    )
    metrics = train_and_merge(trainer, checkpoint, model_args, adapter_args)
    say_summary(trainer, metrics)
    return Trained(trainer, metrics)


def check_distil_arguments(args: MoeDistilConfig) -> None:
    """Raises ValueError for what makes no loss. Run before anything is loaded."""
    if args.teacher_model_name_or_path is None:
        raise ValueError("stage distil learns from a teacher: give --teacher_model_name_or_path.")
    if not 0 < args.temperature <= MAX_TEMPERATURE:
        raise ValueError(f"temperature is {args.temperature}; it must be above 0, and at most {MAX_TEMPERATURE:g}.")
    if not 0 <= args.kl_weight <= 1:
        raise ValueError(f"kl_weight is {args.kl_weight}; it must be from 0 to 1.")
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor is {args.label_smoothing_factor}, but the labels of stage distil are smoothed by "
            "the teacher: set it to 0."
        )


def load_teacher(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: MoeDistilConfig, roles: bool = True
) -> PreTrainedModel:
    """The teacher. Raises ValueError where its tokens are not the model's, nor its chats if `roles`."""
    source = args.teacher_model_name_or_path
    # model_revision and the like are the model's, not the teacher's.
    theirs = load_tokenizer(source, ModelArguments(), args, "teacher_model_name_or_path")
    names = (f"teacher {source}", "the model")
    why = "the teacher has another tokenizer, and reads the model's ids; give one with the same."
    check_same_tokens(theirs, tokenizer, names, sys.maxsize, why, roles)
    config = right_config(source, ModelArguments(), args)
    teacher = whole_model(source, **config, dtype=args.teacher_dtype, trust_remote_code=args.trust_remote_code)
    sizes = [x.config.get_text_config().vocab_size for x in (teacher, model)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"teacher {source} has {sizes[0]} logits, the model {sizes[1]}: they cannot be compared.")
    return teacher
