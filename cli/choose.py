"""How `hf-moe generate` chooses one of several sampled texts: each way takes the same arguments."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def likeliest(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: "torch.Tensor",
    texts: "list[torch.Tensor]",
) -> dict:
    """The text of the highest mean log-probability after the tokens of `prompt`, and all of them (`--best-of`)."""
    import torch

    from hf_moe.generation.best_of import mean_log_probability

    candidates = [
        {
            "text": tokenizer.decode(text, skip_special_tokens=True),
            "mean_log_probability": mean_log_probability(model, torch.cat((prompt, text)), len(prompt)),
        }
        for text in texts
    ]
    return max(candidates, key=lambda x: x["mean_log_probability"]) | {"candidates": candidates}


def most_common(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: "torch.Tensor",
    texts: "list[torch.Tensor]",
) -> dict:
    """The first text with the answer that most of the texts give, and all of them (`--self-consistency`)."""
    from hf_moe.generation.self_consistency import extract_answer, majority

    written = [tokenizer.decode(text, skip_special_tokens=True) for text in texts]
    candidates = [{"text": text, "answer": extract_answer(text)} for text in written]
    answer, votes = majority([x["answer"] for x in candidates])
    chosen = next(x for x in candidates if x["answer"] == answer)
    return chosen | {"votes": votes, "candidates": candidates}
