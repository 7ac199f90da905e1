"""Direct preference optimisation: a recipe with `stage: dpo`, with TRL's DPOTrainer underneath."""

import copy
import sys
from functools import partial

from datasets import Dataset, Features, List
from transformers import PreTrainedTokenizerBase
from trl import extract_prompt

from ..data.chat_templates import check_template
from ..data.json_text import encoded
from ..data.mixture import mix
from ..data.rows import EXTRA_COLUMNS, OBJECTS, PLAIN, is_conversational
from ..data.sources import DataArguments, by_label, label, load_sources, together
from ..trainers.dpo_trainer import MoeDPOConfig, MoeDPOTrainer
from ..weights.adapters import AdapterArguments
from ..weights.esft import EsftArguments, specialise
from .loading import ModelArguments
from .policy import load_policy, load_tokenizer_and_template
from .run import Trained, checkpoint_to_resume, say_summary
from .trained import NO_ADAPTER, NO_ESFT, check_choices, train_and_merge

ARGUMENTS = (ModelArguments, DataArguments, MoeDPOConfig, AdapterArguments, EsftArguments)
# The second: conversations or texts that begin with the same prompt.
COLUMNS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: MoeDPOConfig,
    adapter_args: AdapterArguments = NO_ADAPTER,
    esft_args: EsftArguments = NO_ESFT,
) -> Trained:
    """Train on pairs of a chosen and a rejected text, evaluate before and after, save; returns the metrics."""
    check_choices(model_args, adapter_args, esft_args)
    checkpoint = checkpoint_to_resume(args)
    sources, held_out = load_sources(data_args, args, kinds=COLUMNS)
    sources = {name: with_prompts(rows, name) for name, rows in sources.items()}
    held_out = {name: with_prompts(rows, label(name)) for name, rows in held_out.items()}
    args.eval_on_start = bool(held_out) and checkpoint is None
    tokenizer = load_tokenizer_and_template(checkpoint or model_args.model_name_or_path, model_args, args)
    check_template(tokenizer, by_label(sources, held_out), args.dataset_num_proc)
    train_rows = mix(sources, data_args.train_weights, args.seed)
    eval_rows = together(held_out, data_args.eval_by_source)
    trainer = build_trainer(model_args, args, adapter_args, esft_args, tokenizer, train_rows, eval_rows)
    if esft_args.esft_p is not None:
        print(specialise(trainer, esft_args, checkpoint), file=sys.stderr)
    metrics = train_and_merge(trainer, checkpoint, model_args, adapter_args, esft_args)
    say_summary(trainer, metrics)
    return Trained(trainer, metrics)


def with_prompts(rows: Dataset, name: str) -> Dataset:
    """Pairs with a prompt apart and once: what both begin with, or a text before messages, as UltraFeedback has it.

    Raises ValueError, with the number of its row, for a pair without one.
    """
    if not is_conversational(rows):
        return with_text_prompts(rows, name)
    messages = OBJECTS if OBJECTS in rows.features.values() else PLAIN
    form = Features(dict.fromkeys(COLUMNS[0], messages))
    form |= {extra: rows.features[extra] for extra in EXTRA_COLUMNS if extra in rows.column_names}
    split = partial(with_prompt, name=name, messages=messages)
    return rows.map(split, with_indices=True, features=form, desc=f"Splitting {name}")


def with_text_prompts(rows: Dataset, name: str) -> Dataset:
    """Pairs of texts, from which the trainer takes what both begin with where there is no prompt apart."""
    prompts = rows["prompt"] if "prompt" in rows.column_names else None
    pairs = zip(rows["chosen"], rows["rejected"], strict=True)
    if prompts is None:
        for row, (chosen, rejected) in enumerate(pairs):
            if chosen[:1] != rejected[:1]:
                raise ValueError(
                    f"{name}: row {row}: chosen and rejected do not begin with the same text, the prompt: give it a "
                    "column prompt."
                )
    elif all(x.startswith(prompt) for prompt, pair in zip(prompts, pairs, strict=True) for x in pair):
        return rows.map(without_prompt, desc=f"Splitting {name}")
    return rows


def without_prompt(pair: dict) -> dict:
    return {name: pair[name].removeprefix(pair["prompt"]) for name in COLUMNS[1]}


def with_prompt(pair: dict, row: int, name: str, messages: List) -> dict:
    parts = split_pair(pair, f"{name}: row {row}")
    return {part: encoded(talk, messages) for part, talk in zip(COLUMNS[0], parts, strict=True)}


def split_pair(pair: dict, where: str) -> tuple[list[dict], list[dict], list[dict]]:
    """Prompt, chosen and rejected."""
    prompt, chosen, rejected = pair.get("prompt"), pair["chosen"], pair["rejected"]
    if not isinstance(chosen, list):
        raise ValueError(f"{where}: prompt is messages and chosen is text, but all must be the same.")
    if isinstance(prompt, list):
        asked = len(prompt)
        repeated = all(len(answer) > asked and answer[:asked] == prompt for answer in (chosen, rejected))
        return (prompt, chosen[asked:], rejected[asked:]) if repeated else (prompt, chosen, rejected)
    if prompt is not None and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return [{"role": "user", "content": prompt}], chosen, rejected
    split = extract_prompt({"chosen": chosen, "rejected": rejected})
    if not split["prompt"]:
        raise ValueError(f"{where}: chosen and rejected do not begin with the same message, the prompt.")
    return split["prompt"], split["chosen"], split["rejected"]


def build_trainer(
    model_args: ModelArguments,
    args: MoeDPOConfig,
    adapter_args: AdapterArguments,
    esft_args: EsftArguments,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    eval_rows: Dataset | dict[str, Dataset] | None,
) -> MoeDPOTrainer:
    """The trainer before any step.

    The reference is a copy of the model, router and selection bias included; of an adapter, the model without it.
    """
    policy, reference = load_policy(model_args, args, tokenizer, adapter_args, esft_args), None
    if policy.peft_config is None and not args.precompute_ref_log_probs:
        reference = copy.deepcopy(policy.model).requires_grad_(False)
    trainer = MoeDPOTrainer(
        model=policy.model,
        ref_model=reference,
        args=args,
        processing_class=tokenizer,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        peft_config=policy.peft_config,
    )
    policy.say_coverage(trainer, adapter_args)
    return trainer
