"""Best of N: of several sampled texts, the one whose tokens the model finds likeliest on average."""

import torch
from transformers import PreTrainedModel


@torch.inference_mode()
def mean_log_probability(model: PreTrainedModel, ids: torch.Tensor, prompt_length: int) -> float:
    """1/T sum_t ln p(token_t | all before it), over the T tokens of ids [N] after the prompt.

    p is the model's own, at temperature 1 and without what sampling cuts off; divided by T, since every token makes a
    text less likely. Padding must be cut off, the end of the text belongs to it. Raises ValueError if T is 0.
    """
    if len(ids) <= prompt_length:
        raise ValueError(f"There are {len(ids)} tokens, {prompt_length} of them the prompt's: none is left to score.")
    logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0, prompt_length - 1 : -1]
    written = ids[prompt_length:, None].to(logits.device)
    return logits.float().log_softmax(dim=-1).gather(-1, written).mean().item()
