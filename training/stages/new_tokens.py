"""Tokens that a model has no trained row for: a chat template's, or those of a tokenizer with more tokens than rows.

Their rows are drawn around the mean of the others, each another, and trained; or the run is refused, for nothing would
ever tell such tokens apart.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from ..trainers.refusals import without_rows
from ..weights.adapters import AdapterArguments
from ..weights.esft import EsftArguments
from ..weights.groups import GROUPS
from .loading import ModelArguments, load_tokenizer
from .trained import NO_ADAPTER, NO_ESFT

SPREAD = 0.1  # of the rows' own deviations: apart even in bfloat16, and no token likelier than the mean


def take_template(tokenizer: PreTrainedTokenizerBase, args: TrainingArguments) -> list[int]:
    """Where `chat_template_path` is a tokenizer, take its template, its end and the added tokens that are lacking.

    As TRL does, but for tokens that would fill the rows up. Returns the new tokens' ids.
    """
    path = args.chat_template_path
    if path is None or Path(path).is_file():
        return []
    source = load_tokenizer(path, ModelArguments(), args, "chat_template_path")
    if source.chat_template is None:
        raise ValueError(f"chat_template_path {path} is a tokenizer without a chat template: give another.")
    known = tokenizer.get_vocab()
    lacking = [token for token in source.added_tokens_decoder.values() if token.content not in known]
    tokenizer.chat_template = source.get_chat_template()
    tokenizer.add_tokens(lacking)
    if source.eos_token is not None:
        tokenizer.eos_token = source.eos_token
    args.chat_template_path = None  # done
    return tokenizer.convert_tokens_to_ids([token.content for token in lacking])


def give_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    model_args: ModelArguments,
    adapter_args: AdapterArguments = NO_ADAPTER,
    esft_args: EsftArguments = NO_ESFT,
    new: Sequence[int] = (),
) -> list[int]:
    """Rows for the `new` tokens and for all that `tokenizer` has and `model` has not; says how many it adds.

    Returns the tokens whose rows an adapter is to train. Raises ValueError where what is trained or saved leaves new
    rows out.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    lacking = without_rows(tokenizer, rows)
    alone = {"lora_parts": " ".join(adapter_args.lora_parts or ()), "esft_p": esft_args.esft_p}
    alone = next((f"{name} {value}" for name, value in alone.items() if value), None)
    if alone and lacking and lacking == [tokenizer.pad_token_id] and tokenizer.eos_token is not None:
        print(
            f"the pad token {tokenizer.pad_token} ({lacking[0]}) has no row among the model's {rows:,}, and with "
            f"{alone} none is saved: {tokenizer.eos_token} pads",
            file=sys.stderr,
        )
        tokenizer.pad_token, lacking = tokenizer.eos_token, []
    if lacking and alone:
        raise ValueError(
            f"The tokenizer has {len(lacking)} tokens beyond the model's {rows:,} rows, the first of them "
            f"{tokenizer.convert_ids_to_tokens(lacking[0])} ({lacking[0]}), and with {alone} the rows of the base "
            "stay as they are: leave that out, or save the base with more rows (model.resize_token_embeddings"
            f"({lacking[-1] + 1}), model.save_pretrained) and give that as --model_name_or_path."
        )
    learnt = sorted({*new, *lacking} - {tokenizer.pad_token_id})  # nothing is learnt from padding
    frozen = esft_args.esft_p is not None or "embeddings" not in GROUPS[model_args.trainable]
    if learnt and frozen:
        what = f"esft_p {esft_args.esft_p}" if esft_args.esft_p is not None else f"trainable {model_args.trainable}"
        raise ValueError(
            f"{what} leaves the embeddings as they are, and {len(learnt)} tokens are new, the first of them "
            f"{tokenizer.convert_ids_to_tokens(learnt[0])}: their rows would never be trained. Leave it out, or take "
            "a chat template without new tokens."
        )
    if lacking:
        if is_deepspeed_zero3_enabled() or model_args.expert_parallel_size > 1:
            raise ValueError(
                f"The tokenizer has {len(lacking)} tokens beyond the model's {rows:,} rows, which cannot be added to "
                "weights that are spread over processes as they load: add them beforehand, or use fsdp2 or zero2."
            )
        model.resize_token_embeddings(lacking[-1] + 1, mean_resizing=False)
        print(f"the tokenizer has {lacking[-1] + 1:,} tokens, the model had {rows:,} rows: added", file=sys.stderr)
    draw_rows(model, sorted({*new, *lacking}), rows, args.seed)
    return learnt if alone else []


@torch.no_grad()
def draw_rows(model: PreTrainedModel, tokens: list[int], rows: int, seed: int) -> None:
    """Give `tokens` rows of their own, around the mean of the other ones of the first `rows`."""
    others = torch.ones(rows, dtype=torch.bool)
    others[[token for token in tokens if token < rows]] = False
    generator = torch.Generator().manual_seed(seed)
    weights = (x.weight for x in (model.get_input_embeddings(), model.get_output_embeddings()) if x is not None)
    for weight in {id(x): x for x in weights}.values() if tokens else ():
        known = weight[:rows][others.to(weight.device)].float()
        noise = torch.randn(len(tokens), weight.shape[1], generator=generator).to(weight.device)
        weight[tokens] = (known.mean(dim=0) + SPREAD * known.std(dim=0) * noise).to(weight.dtype)


@torch.no_grad()
def copy_rows(model: PreTrainedModel, copy: PreTrainedModel) -> None:
    """Give `copy`, the model before it was given rows, the same rows."""
    rows = copy.get_input_embeddings().weight.shape[0]
    if rows == model.get_input_embeddings().weight.shape[0]:
        return
    copy.resize_token_embeddings(model.get_input_embeddings().weight.shape[0], mean_resizing=False)
    for ours, theirs in (
        (model.get_input_embeddings(), copy.get_input_embeddings()),
        (model.get_output_embeddings(), copy.get_output_embeddings()),
    ):
        theirs.weight[rows:] = ours.weight[rows:].to(theirs.weight)


def trained_tokens(checkpoint: str | None) -> list[int]:
    """The tokens whose rows the adapter in `checkpoint` trains."""
    path = Path(checkpoint or "") / "adapter_config.json"
    if checkpoint is None or not path.is_file():
        return []
    said = json.loads(path.read_text(encoding="utf-8")).get("trainable_token_indices") or {}
    return next(iter(said.values()), [])
