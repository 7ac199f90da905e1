"""TRL's supervised fine-tuning for mixture-of-experts models."""

import copy
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ..balance.moe_arguments import MoeArguments
from ..data.chat_templates import restore_marks
from ..data.long_rows import ON_LONG_ROWS, fit
from ..data.packing import pack
from ..data.token_cache import processes
from ..host_trl import leave_out_own_aux_loss, show_backbone
from .trainer import MoeTrainerMixin

NAMES = {"train": "train_data", "eval": "eval_data"}  # TRL's -> the arguments'


@dataclass
class MoeSFTConfig(MoeArguments, SFTConfig):
    """SFTConfig with what MoeSFTTrainer adds."""

    on_long_rows: str = field(
        default="truncate",
        metadata={
            "help": "What becomes of rows with more than max_length tokens; they are counted in any case.",
            "choices": list(ON_LONG_ROWS),
        },
    )


class MoeSFTTrainer(MoeTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with routing that is right in training; see MoeTrainerMixin.

    TRL's fused head never calls the model's own forward, and takes Mixtral's balance loss, which pools the layers and
    knows neither the z-loss nor other score functions. Here the losses are hf_moe's.
    """

    takes_model_loss = False

    def __init__(self, *args: Any, processing_class: Any = None, **kwargs: Any) -> None:
        if processing_class is not None:
            restore_marks(processing_class)
        super().__init__(*args, processing_class=processing_class, **kwargs)
        leave_out_own_aux_loss(self)
        show_backbone(self.moe)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """TRL's own, with rows that `max_length` cuts counted between tokenising and cutting, and quicker packing."""
        prepare = super()._prepare_dataset
        name = NAMES.get(dataset_name, f"eval_data {dataset_name}")
        if not isinstance(dataset, Dataset):
            if args.on_long_rows != "truncate":
                raise ValueError(
                    f"on_long_rows is {args.on_long_rows}, but {name} is streamed, and its rows are cut as they come: "
                    "set it to truncate, or load all rows."
                )
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        unlabelled = "labels" not in dataset.column_names
        if unlabelled:
            uncut = copy.copy(args)
            uncut.max_length, uncut.shuffle_dataset = None, False
            try:
                dataset = prepare(dataset, processing_class, uncut, False, formatting_func, dataset_name)
            except RuntimeError as error:  # a conversation without the assistant
                raise ValueError(" ".join(str(error).split())) from error
        if unlabelled or args.on_long_rows != "truncate":  # of other rows, those that TRL cuts have been counted
            dataset = fit(dataset, name, args, packing)
        if not packing or args.packing_strategy != "bfd" or args.max_length is None:
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        rows = dataset.select_columns(["input_ids", "labels"])
        with args.main_process_first(desc=f"packing {dataset_name}"):
            rows = rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows
            return pack(rows, args.max_length, processes(rows, args), f"Packing {dataset_name}")
