"""A text as `generate()` writes it with a cache, beside what the model says of it without one."""

import inspect
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel


class Compared(NamedTuple):
    """`text` [B, P + N] as generated, the largest `difference` of its N logits, and whether it is the `same` text.

    The same: no logit differs by more than the square root of the dtype's epsilon times the largest one, which is far
    more than sums in another order do, and far less than a cache that is not read.
    """

    text: torch.Tensor
    difference: float
    same: bool


@torch.no_grad()
def with_and_without_cache(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    new_tokens: int,
    attention_mask: torch.Tensor | None = None,
    **options,
) -> Compared:
    """Write N = `new_tokens` greedily after input_ids [B, P], by `generate()`; then read the whole text in one forward
    without a cache. `attention_mask` [B, P] is 0 on padding, on the left; `options` are those of a GenerationConfig.
    """
    prompt = input_ids.shape[1]
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    seen = {"return_dict_in_generate": True, "output_logits": True}
    greedy = GenerationConfig(do_sample=False, pad_token_id=0, **length, **seen, **options)
    written = model.generate(input_ids, attention_mask=mask, generation_config=greedy)
    text, seen = written.sequences, torch.stack(written.logits, dim=1).float()  # [B, N, V]
    read = text[:, :-1]
    inputs = {"attention_mask": torch.nn.functional.pad(mask, (0, read.shape[1] - prompt), value=1)}
    if attention_mask is not None and "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    whole = model(input_ids=read, use_cache=False, **inputs).logits[:, prompt - 1 :].float()
    difference = (whole - seen.to(whole.device)).abs().max().item()
    bound = torch.finfo(model.dtype).eps ** 0.5 * whole.abs().max().item()
    return Compared(text, difference, difference <= bound)
