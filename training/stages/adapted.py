"""What sft and distil train: a model's own weights, or an adapter on them."""

import sys
from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..weights.adapters import AdapterArguments, add_adapter
from ..weights.esft import EsftArguments
from .loading import ModelArguments, choose_trained, load_trained_model
from .new_tokens import give_rows
from .trained import NO_ESFT, store_base


def load_adapted(
    source: str,
    model_args: ModelArguments,
    args: TrainingArguments,
    adapter_args: AdapterArguments,
    tokenizer: PreTrainedTokenizerBase,
    new: Sequence[int],
    esft_args: EsftArguments = NO_ESFT,
) -> PreTrainedModel | PeftModel:
    """The model in `source`, to which the tokens `new` are new, with all frozen but what is to learn; says what is."""
    model = load_trained_model(source, model_args, args)
    tokens = give_rows(model, tokenizer, args, model_args, adapter_args, esft_args, new)
    if adapter_args.lora_parts is None:
        choose_trained(model, model_args.trainable, args, says=esft_args.esft_p is None)
        return model
    store_base(model, adapter_args, args)
    model, covered = add_adapter(model, adapter_args, tokens)
    print(covered, file=sys.stderr)
    return model
