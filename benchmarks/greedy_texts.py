"""Whether a greedy text is that of another path of the same model, or leaves it only where two tokens tie.

Shapes: B rows, P tokens of a prompt, N of a text, V vocabulary.
"""

import torch
from transformers import PreTrainedModel

# Of the largest logit: by so much rounding may move two of them past each other. Paths sum in different orders, which
# is an ulp or two a layer: bfloat16 has 2^-8.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2**-5}


@torch.no_grad()
def logits_after(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """[V] in float32 after ids [N], read at once and without recordings."""
    return model(ids.unsqueeze(0), logits_to_keep=1).logits[0, -1].float()


def first_difference(text: torch.Tensor, other: torch.Tensor) -> int | None:
    """The first place where two texts [N] differ; None where they don't, as far as the shorter one goes."""
    length = min(len(text), len(other))
    places = (text[:length] != other[:length]).nonzero()
    return int(places[0]) if len(places) else None


def compared(
    model: PreTrainedModel, texts: torch.Tensor, others: torch.Tensor, mask: torch.Tensor
) -> tuple[int, list[str]]:
    """How many rows of `texts` [B, N] leave those of `others` at a tie, and a line for each that does elsewhere.

    mask [B, P] is 0 on padding. At the first place where two texts differ, both tokens' logits after what they share
    have to be within `BOUNDS` of each other. What comes behind a tie is another text, and says nothing.
    """
    ties, failures = 0, []
    for row, (text, other) in enumerate(zip(texts, others, strict=True)):
        place = first_difference(text, other)
        if place is None:
            continue
        tokens = int(text[place]), int(other[place])
        ids = other[:place][torch.nn.functional.pad(mask[row], (0, place - mask.shape[1]), value=1).bool()]
        logits = logits_after(model, ids)
        gap, bound = abs(float(logits[tokens[0]] - logits[tokens[1]])), BOUNDS[model.dtype] * float(logits.abs().max())
        if gap <= bound:
            ties += 1
        else:
            failures.append(f"row {row}, place {place}: {tokens[0]}, not {tokens[1]}; logits {gap:.4f} apart")
    if texts.shape[1] != others.shape[1] and not ties and not failures:  # a tie may end a text, nothing else
        failures.append(f"{texts.shape[1]} tokens, not {others.shape[1]}")
    return ties, failures
