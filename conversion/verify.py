"""Two models side by side on one text, and the second one with a cache and without: `verify`."""

import math
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..generation.cached import with_and_without_cache
from ..generation_settings import mend_ids
from ..reading import built, positions
from ..same_tokens import check_same_tokens
from ..texts import texts
from .files import file_backed
from .files.checkpoint import Checkpoint, Entry, read_config
from .files.own_code import config_of
from .files.source import locate
from .files.texts import name_of
from .files.tokenizer import load_tokenizer
from .files.writer import Output

MAX_TOKENS = 512  # that are compared unless told otherwise
WINDOW = 256  # tokens that are read together
ROWS = 16  # tokens whose logits are compared at a time, in float64
PROMPT, NEW = 16, 4  # tokens that `b` reads, and writes with a cache
TEXT = """\
The river was low that summer, and the children walked across it on flat grey stones. "If you count them," said the \
oldest, "there are always twenty-three on the way over and twenty-two on the way back." Nobody believed her, so they \
counted: 1, 2, 3, and so on, until somebody fell in.

def mean(values):
    total = sum(values)
    return total / len(values)

Water boils at 100 degrees Celsius at sea level; on a mountain of 3,000 metres it boils at about 90. That is why \
beans take longer to cook up there. In 1783 two brothers sent a sheep, a duck and a rooster up in a balloon, and all \
three came back alive.

Dear Anna, thank you for the letter and the photographs. The garden is full of apples again. Can you come in October? \
The train leaves at 9:40 and arrives before noon. We could walk to the lake, as we did years ago, and be home for tea.
"""
STORY = """\
Once upon a time there was a little girl named Sue. She lived in a small house near the park with her mom and her \
dog, Max. One day Sue and Max went to the park to play. The sun was warm and the sky was blue. Sue ran up the hill \
and saw a big red ball under a tree. "Look, Max!" she said. "A ball! Do you want to play with it?"

But the ball was not theirs. A little boy sat on the grass and he was sad. "I lost my ball," he said. Sue wanted to \
keep the ball, but she saw that the boy was sad. She gave him the ball and said, "Here it is. We found it under the \
tree." The boy smiled. "Thank you," he said. "My name is Tim. Do you want to play with me?"

They played all day. They ran, they jumped, and Max barked and was happy. Then Sue's mom came and said, "It is time \
to go home." Sue said bye to Tim. At home she told her mom about her new friend, and her mom was very proud of her. \
From that day on Sue and Tim played in the park every day.
"""
TEXTS = {"built in": TEXT, "built in, simple words": STORY}
RANDOM = "random token ids"
COVERED = 2.0  # characters that a token stands for where a tokenizer knows the words, and not only their letters


@torch.inference_mode()
def verify(
    a: str | Path,
    b: str | Path,
    *,
    data: str | Path | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    quantize: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare the next-token logits of models `a` (the reference) and `b` on a text, in float32 on the CPU.

    a, b: folders with safetensors weights, or Hub ids. data: a file or a folder of text or rows, or a data set's
    name on the Hub, as `trace` reads them; without one, a short text of our own that the tokenizer of `a` has words
    for, or random token ids (from `seed`) where there is no tokenizer, or it covers none of the texts.
    quantize: "fp8" or "int4", in which the matrices of `b` are stored, as `StoredWeightsConfig` has them; all of it is
    in memory then. trust_remote_code: run model code that lies beside a checkpoint, of one that Transformers does not
    know. The first
    `max_tokens` tokens are read in windows of 256. One model follows the other, and of each only one layer's weights
    are in memory at a time. If its files do not hold them under the names that they have in
    Transformers, that writes the model, in float32, to temporary files (TMPDIR); where these have no room, and with
    quantised weights, all are in memory.

    Returns max_abs_diff and mean_abs_diff of the logits, kl (mean KL(a || b) per token, nats), top1_agreement (share
    of tokens where both put the same token first), perplexity_a, perplexity_b, tokens and text, its name; of the text
    that `b` writes with a cache cache_max_abs_diff, how far its logits are from those without, and cached_text_equal,
    whether that is rounding alone (None where the experts of a token depend on what else is read). Raises a ValueError
    where the models cannot be compared, or not in the memory that is free.
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 2.")
    (folder_a, config_a), (folder_b, config_b) = (opened(x, trust_remote_code) for x in (a, b))
    text_a, text_b = config_a.get_text_config(), config_b.get_text_config()  # of pictures and text, that of the text
    if text_a.vocab_size != text_b.vocab_size:
        raise ValueError(
            f"The models cannot be compared: {a} has {text_a.vocab_size} tokens, {b} has {text_b.vocab_size}."
        )
    tokenizers = [load_tokenizer(folder) for folder in (folder_a, folder_b)]
    if None not in tokenizers:
        why = "a text is not the same to both, and their logits cannot be compared."
        check_same_tokens(*tokenizers, (str(a), str(b)), text_a.vocab_size, why, roles=False)
    ids, text = token_ids(folder_a, data, text_a.vocab_size, max_tokens, seed)
    window = min(positions(text_a, WINDOW), positions(text_b, WINDOW))
    windows = [part for part in ids.split(window) if len(part) > 1]
    models = [(config_a, Checkpoint(folder_a).entries), (config_b, Checkpoint(folder_b).entries)]
    check_memory(memory_needed(models, len(ids)))
    with file_backed.loaded(folder_a, config_a, trust_remote_code) as model_a:
        reference = list(logits_of(model_a, windows))
    with file_backed.loaded(folder_b, config_b, trust_remote_code, quantize) as model_b:
        return compared(reference, model_b, windows) | {"text": text}


def compared(reference: list[torch.Tensor], model: PreTrainedModel, windows: list[torch.Tensor]) -> dict[str, Any]:
    """What `verify` returns, given the logits [T, V] of the first model for each window, and the second model."""
    largest, absolute, divergence, agreed, entries, tokens = 0.0, 0.0, 0.0, 0, 0, 0
    nll_a = nll_b = predicted = 0.0
    for part, all_a, all_b in zip(windows, reference, logits_of(model, windows), strict=True):
        tokens += len(part)
        predicted += len(part) - 1
        entries += all_a.numel()
        for start in range(0, len(part), ROWS):
            rows = slice(start, start + ROWS)
            logits_a, logits_b, following = all_a[rows].double(), all_b[rows].double(), part[1:][rows]
            difference = (logits_a - logits_b).abs()
            # max() of Python would pass over a NaN
            largest = torch.maximum(torch.tensor(largest, dtype=torch.double), difference.max()).item()
            absolute += difference.sum().item()
            log_a, log_b = logits_a.log_softmax(-1), logits_b.log_softmax(-1)
            divergence += (log_a.exp() * (log_a - log_b)).sum().item()
            agreed += (logits_a.argmax(-1) == logits_b.argmax(-1)).sum().item()
            nll_a -= log_a[: len(following)].gather(-1, following[:, None]).sum().item()
            nll_b -= log_b[: len(following)].gather(-1, following[:, None]).sum().item()
    return {
        "max_abs_diff": largest,
        "mean_abs_diff": absolute / entries,
        "kl": divergence / tokens,
        "top1_agreement": agreed / tokens,
        "perplexity_a": torch.tensor(nll_a / predicted).exp().item(),
        "perplexity_b": torch.tensor(nll_b / predicted).exp().item(),
        "tokens": tokens,
        **cached_text(model, windows[0]),
    }


def unusable(report: Mapping[str, Any]) -> str | None:
    """What to say where the second model is far from the first one; None where it is near.

    KL(a || b) is the logarithm of how many times larger perplexity is with b than with a on a text that a writes.
    Perplexity itself misleads where the text is none that a knows: damage then makes it better.
    """
    if report["kl"] <= math.log(2):
        return None
    times = f"{math.exp(report['kl']):,.3g} times the source's" if report["kl"] < 700 else "no number"
    return (
        f"untrained, the result is not usable: {report['top1_agreement']:.1%} of its likeliest next tokens are the "
        f"source's, and on what the source would write its perplexity is {times}. Train it before use."
    )


def cached_text(model: PreTrainedModel, window: torch.Tensor) -> dict[str, float | bool | None]:
    """What a text of the model says of its cache; `window` [T] is where it begins."""
    if getattr(model.config, "router_args", {}).get("eval_capacity_factor") is not None:
        return {"cache_max_abs_diff": None, "cached_text_equal": None}
    found = with_and_without_cache(model, window[None, :PROMPT], NEW)
    return {"cache_max_abs_diff": found.difference, "cached_text_equal": found.same}


def opened(model: str | Path, trust_remote_code: bool) -> tuple[Path, PreTrainedConfig]:
    """Folder and config of a model, its weight files checked. Raises FileNotFoundError or a ValueError of one line."""
    folder, _, _ = locate(model)
    read_config(folder)
    Checkpoint(folder)
    config = config_of(folder, trust_remote_code)
    text = config.get_text_config()
    mend_ids(text, text.vocab_size)
    return folder, config


def token_ids(
    folder: Path, data: str | Path | None, vocab_size: int, max_tokens: int = MAX_TOKENS, seed: int = 0
) -> tuple[torch.Tensor, str]:
    """The tokens to compare on, [T] int64, and what they are. OSError or ValueError where there are none."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None and data is not None:
        raise ValueError(f"{folder} has no tokenizer to read {data} with.")
    name = name_of(data) if data is not None else covered_text(tokenizer)
    if name is None:
        return torch.randint(vocab_size, (max_tokens,), generator=torch.Generator().manual_seed(seed)), RANDOM
    read = [TEXTS[name]] if data is None else texts(str(data), tokenizer)
    found = chain.from_iterable(tokenizer(text, verbose=False).input_ids for text in read)
    ids = torch.tensor(list(islice(found, max_tokens)), dtype=torch.long)
    if len(ids) < 2:
        raise ValueError(f"{data} has {len(ids)} tokens; at least 2 are needed.")
    if ids.max() >= vocab_size:
        raise ValueError(f"The tokenizer of {folder} gives token {ids.max()}, the model knows {vocab_size}.")
    return ids, name


def covered_text(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """The first of TEXTS that the tokenizer has words for: on bytes and letters no perplexity says anything."""
    for name, text in TEXTS.items() if tokenizer is not None else ():
        tokens = tokenizer.tokenize(text)
        if tokens and tokenizer.unk_token not in tokens and len(text) >= COVERED * len(tokens):
            return name
    return None


def logits_of(model: PreTrainedModel, windows: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Logits [T, V] of each window [T]. Raises a ValueError of one line where the model cannot read it."""
    for part in windows:
        what = f"A {model.config.model_type} cannot read the text to compare"
        yield built(model, what, input_ids=part[None], use_cache=False).logits[0]


def memory_needed(
    models: list[tuple[PreTrainedConfig, Mapping[str, Entry | Output]]], tokens: int = MAX_TOKENS
) -> int:
    """Bytes that comparing two models takes, given the config of each and the tensors in its files."""
    weights = max(file_backed.memory(config, tensors) for config, tensors in models)
    vocab_size = models[0][0].get_text_config().vocab_size
    return weights + 4 * vocab_size * (tokens + WINDOW) + 8 * vocab_size * ROWS * 6


def check_memory(
    needed: int, what: str = "Comparing the models", way_out: str = "convert without verify (--no-verify)"
) -> None:
    """Raise a ValueError where so many bytes of memory are not free."""
    free = psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"{what} takes {needed / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free; give TMPDIR a disk with "
            f"room for the model in float32, or {way_out}."
        )
