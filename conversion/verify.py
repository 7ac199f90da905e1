"""Two models side by side on one text: `verify`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .checkpoint import Checkpoint, read_json
from .source import built, locate
from .tokenizer import load_tokenizer

WINDOW = 256  # tokens that are read together
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


@torch.inference_mode()
def verify(
    a: str | Path, b: str | Path, *, data: str | Path | None = None, max_tokens: int = 512, seed: int = 0
) -> dict[str, Any]:
    """Compare the next-token logits of models `a` (the reference) and `b` on a text, in float32 on the CPU.

    a, b: folders with safetensors weights, or Hub ids. data: a text file; without one, a short text of our own, or
    random token ids (from `seed`) where `a` has no tokenizer. The first `max_tokens` tokens are read in windows of
    256. The models are loaded one after the other.

    Returns max_abs_diff and mean_abs_diff of the logits, kl (mean KL(a || b) per token, nats), top1_agreement (share
    of tokens where both put the same token first), perplexity_a, perplexity_b and tokens. Raises a ValueError where
    the models cannot be compared.
    """
    (folder_a, config_a), (folder_b, config_b) = opened(a), opened(b)
    if config_a.vocab_size != config_b.vocab_size:
        raise ValueError(
            f"The models cannot be compared: {a} has {config_a.vocab_size} tokens, {b} has {config_b.vocab_size}."
        )
    ids = token_ids(folder_a, data, config_a.vocab_size, max_tokens, seed)
    if len(ids) < 2:
        raise ValueError(f"{data} has {len(ids)} tokens; at least 2 are needed.")
    if ids.max() >= config_a.vocab_size:
        raise ValueError(f"The tokenizer of {a} gives token {ids.max()}, the model knows {config_a.vocab_size}.")
    window = min(WINDOW, config_a.max_position_embeddings, config_b.max_position_embeddings)
    windows = [part for part in ids.split(window) if len(part) > 1]
    reference = list(logits_of(folder_a, windows))

    largest, absolute, divergence, agreed, entries, tokens = 0.0, 0.0, 0.0, 0, 0, 0
    nll_a = nll_b = predicted = 0.0
    for part, logits_a, logits_b in zip(windows, reference, logits_of(folder_b, windows), strict=True):
        difference = (logits_a.double() - logits_b.double()).abs()
        # max() of Python would pass over a NaN
        largest = torch.maximum(torch.tensor(largest, dtype=torch.double), difference.max()).item()
        absolute += difference.sum().item()
        entries += difference.numel()
        tokens += len(part)
        log_a, log_b = logits_a.double().log_softmax(-1), logits_b.double().log_softmax(-1)
        divergence += (log_a.exp() * (log_a - log_b)).sum().item()
        agreed += (logits_a.argmax(-1) == logits_b.argmax(-1)).sum().item()
        nll_a -= log_a[:-1].gather(-1, part[1:, None]).sum().item()
        nll_b -= log_b[:-1].gather(-1, part[1:, None]).sum().item()
        predicted += len(part) - 1
    return {
        "max_abs_diff": largest,
        "mean_abs_diff": absolute / entries,
        "kl": divergence / tokens,
        "top1_agreement": agreed / tokens,
        "perplexity_a": torch.tensor(nll_a / predicted).exp().item(),
        "perplexity_b": torch.tensor(nll_b / predicted).exp().item(),
        "tokens": tokens,
    }


def opened(model: str | Path) -> tuple[Path, PreTrainedConfig]:
    """Folder and config of a model, its weight files checked. Raises FileNotFoundError or a ValueError of one line."""
    folder, _, _ = locate(model)
    read_json(folder / "config.json")
    Checkpoint(folder)
    config = built(AutoConfig.from_pretrained, f"{model} cannot be loaded", folder, trust_remote_code=False)
    return folder, config.get_text_config()  # of a model that sees pictures, the language model's


def token_ids(folder: Path, data: str | Path | None, vocab_size: int, max_tokens: int, seed: int) -> torch.Tensor:
    """The tokens to compare on, [T] int64."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        if data is not None:
            raise ValueError(f"{folder} has no tokenizer to read {data} with.")
        return torch.randint(vocab_size, (max_tokens,), generator=torch.Generator().manual_seed(seed))
    text = TEXT if data is None else Path(data).read_text(encoding="utf-8")
    return tokenizer(text, return_tensors="pt", truncation=True, max_length=max_tokens).input_ids[0]


def logits_of(folder: Path, windows: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Logits [T, V] of each window [T]. The model lives as long as the iteration."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    ).eval()
    for part in windows:
        yield model(input_ids=part[None], use_cache=False).logits[0]
