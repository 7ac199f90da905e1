"""Group-relative policy optimisation: a recipe with `stage: grpo`, with TRL's GRPOTrainer underneath."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec

from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from hf_moe.chat import render
from hf_moe.generation_settings import mended_config
from hf_moe.reading import auto_config

from ..data.chat_templates import check_template
from ..data.json_text import encoded
from ..data.mixture import mix
from ..data.sources import DataArguments, by_label, load_sources
from ..host_trl import reference_of_revision
from ..trainers.grpo_trainer import MoeGRPOConfig, MoeGRPOTrainer
from ..weights.adapters import AdapterArguments
from .loading import ModelArguments
from .new_tokens import copy_rows
from .policy import load_policy, load_tokenizer_and_template
from .rewards import NEED_ANSWER, REWARDS, find_rewards, true_answer
from .run import Trained, checkpoint_to_resume, say_saved
from .trained import NO_ADAPTER, NO_ESFT, check_choices, train_and_merge


@dataclass
class RewardArguments:
    """What is rewarded; `reward_weights` is TRL's own argument."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["gsm8k_answer"],
        metadata={"help": "Rewards by rule, added up by reward_weights.", "choices": list(REWARDS)},
    )


ARGUMENTS = (ModelArguments, DataArguments, MoeGRPOConfig, AdapterArguments, RewardArguments)
COLUMNS = (("prompt", "answer"), ("question", "answer"), ("messages",), ("conversations",), ("prompt",))


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: MoeGRPOConfig,
    adapter_args: AdapterArguments = NO_ADAPTER,
    reward_args: RewardArguments | None = None,
) -> Trained:
    """Train on rewarded texts that the policy writes, evaluate before and after, save; returns the metrics."""
    names = (reward_args or RewardArguments()).reward_funcs
    check_choices(model_args, adapter_args, NO_ESFT)
    rewards = find_rewards(names, args.reward_weights)
    if args.use_vllm and find_spec("vllm") is None:
        raise ValueError("use_vllm is true, which needs vLLM: install it, or say --use_vllm false.")
    if data_args.eval_by_source:
        raise ValueError("eval_by_source is true, but TRL's GRPO reports rewards without their source: leave it out.")
    checkpoint = checkpoint_to_resume(args)
    sources, held_out = load_sources(data_args, args, kinds=COLUMNS)
    args.eval_on_start = bool(held_out) and checkpoint is None
    tokenizer = load_tokenizer_and_template(checkpoint or model_args.model_name_or_path, model_args, args)
    if tokenizer.eos_token_id is None:  # a name may be none of its tokens
        raise ValueError("The tokenizer has no eos_token, which ends an answer: name it in its tokenizer_config.json.")
    check_template(tokenizer, by_label(sources, held_out), said=asked)
    train_rows = questions(mix(sources, data_args.train_weights, args.seed), names, "train_data")
    eval_rows = questions(held_out["eval_data"], names, "eval_data") if held_out else None
    for what, rows in {"train_data": train_rows, "eval_data": eval_rows}.items():
        if rows is not None:
            check_lengths(rows, tokenizer, model_args, args, what)
    trainer = build_trainer(model_args, args, adapter_args, rewards, tokenizer, train_rows, eval_rows)
    metrics = train_and_merge(trainer, checkpoint, model_args, adapter_args)
    say_reward(trainer, metrics)
    return Trained(trainer, metrics)


def asked(row: dict) -> list[tuple[list[dict], bool]]:
    """What of a row goes through the chat template: the prompt that `questions` makes of it."""
    if "question" in row:
        return [([{"role": "user", "content": row["question"]}], True)]
    prompt = row["messages"][:-1] if "messages" in row else row["prompt"]
    return [(prompt, True)] if prompt else []


def questions(rows: Dataset, rewards: list[str], what: str) -> Dataset:
    """Rows with a prompt and, where a reward needs it, an answer; rows without one that can be read are counted.

    A `question` becomes one message; of `messages` the last is the answer, and rows without another are counted, too.
    Raises ValueError if no row is left.
    """
    if "question" in rows.column_names:
        rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["question"]}]})
    elif "messages" in rows.column_names:
        answered = rows.filter(lambda row: len(row["messages"]) > 1)
        if len(answered) == 0:
            raise ValueError(f"{what} has no row whose messages are a question and an answer.")
        if len(answered) < len(rows):
            lost = f"{len(rows) - len(answered)} of {len(rows)}"
            print(f"{what}: {lost} rows have one message alone, and are left out", file=sys.stderr)
        messages = rows.features["messages"]
        rows = answered.map(
            lambda row: {
                "prompt": encoded(row["messages"][:-1], messages),
                "answer": row["messages"][-1].get("content") or "",
            },
            features=Features({"prompt": messages, "answer": Value("string")}),
            remove_columns=rows.column_names,
        )
    needing = [name for name in rewards if name in NEED_ANSWER]
    if needing:
        if "answer" not in rows.column_names:
            raise ValueError(f"reward_funcs holds {needing[0]}, which needs a column answer in {what}.")
        kept = rows.filter(lambda row: true_answer(row["answer"]) is not None)
        if len(kept) == 0:
            raise ValueError(f"{what} has no row with an answer that {needing[0]} can read: '#### 42', or a number.")
        if len(kept) < len(rows):
            lost = f"{len(rows) - len(kept)} of {len(rows)}"
            print(f"{what}: {lost} rows have no answer that {needing[0]} can read, and are left out", file=sys.stderr)
        rows = kept
    return rows.select_columns([name for name in ("prompt", "answer") if name in rows.column_names])


def check_lengths(
    rows: Dataset | tuple,
    tokenizer: PreTrainedTokenizerBase,
    model_args: ModelArguments,
    args: MoeGRPOConfig,
    what: str,
) -> None:
    """Raises ValueError for a prompt that leaves no position for an answer: nothing cuts prompts, and long ones take
    time and memory that grow with their square."""
    config = auto_config(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=args.trust_remote_code,
    )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    for row in rows if positions else ():
        text = row["prompt"]
        if not isinstance(text, str):
            text = render(tokenizer, text, what, add_generation_prompt=True)
        if len(text.encode(errors="replace")) < positions:  # a token is a byte at least
            continue
        tokens = len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if tokens >= positions:
            raise ValueError(
                f"{what} has a prompt of {tokens:,} tokens, but the model has {positions:,} positions for it and the "
                f"answer; leave it out or shorten it: {text!r:.100}"
            )


def build_trainer(
    model_args: ModelArguments,
    args: MoeGRPOConfig,
    adapter_args: AdapterArguments,
    rewards: list,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    eval_rows: Dataset | None,
) -> MoeGRPOTrainer:
    """The trainer before any step, with a reference if `beta` is above 0."""
    policy = load_policy(model_args, args, tokenizer, adapter_args)
    own_reference = policy.peft_config is None and args.beta
    config, _ = mended_config(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=args.trust_remote_code,
    )
    right = {} if config is None else {"config": config}
    with reference_of_revision(args, model_args.model_revision, **right) if own_reference else nullcontext():
        trainer = MoeGRPOTrainer(
            model=policy.model,
            reward_funcs=rewards,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            peft_config=policy.peft_config,
        )
    if own_reference:
        copy_rows(policy.model, trainer.accelerator.unwrap_model(trainer.ref_model))
    policy.say_coverage(trainer, adapter_args)
    return trainer


def say_reward(trainer: MoeGRPOTrainer, metrics: dict[str, float]) -> None:
    """One line, by one process."""
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    reward = f"last reward in training {history[-1]['reward']:.4f}" if history else "no step was left to train"
    if "eval_reward" in metrics:
        before = next(entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry)
        reward = f"held-out reward {before:.4f} before, {metrics['eval_reward']:.4f} after"
    if trainer.is_world_process_zero():
        print(f"{reward}; {say_saved(trainer)}", file=sys.stderr)
