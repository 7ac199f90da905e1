"""Tokens of a text with drafts: which the model gives, and how many of them are kept.

Shapes: B rows, C drafts, V vocabulary. Nothing here waits for the device.
"""

import torch


def draw(p: torch.Tensor) -> torch.Tensor:
    """Indices [...] drawn from p [..., V], not necessarily normed.

    argmax of p / e with e ~ Exp(1): the same random numbers, and so the same tokens, as torch.multinomial's. Raises
    RuntimeError, on a GPU late, where p is not finite.
    """
    index = (p / torch.empty_like(p).exponential_()).argmax(dim=-1, keepdim=True)
    torch._assert_async((p.gather(-1, index) > 0).all(), "probabilities to draw from are not finite")
    return index.squeeze(-1)


def follow(
    scores: torch.Tensor, draft: torch.Tensor | None, distribution: torch.Tensor | None, sample: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token [B] of a place whose processed scores are [B, V], and whether it is the row's `draft` [B].

    Greedy: the likeliest token. Sampling accepts a draft from a `distribution` [B, V] with probability min(1, p / q),
    and draws else from norm(max(0, p - q)) (speculative sampling, https://arxiv.org/abs/2211.17192, 2.3, algorithm 1).
    """
    if not sample:
        token = scores.argmax(dim=-1)
        return token, torch.zeros_like(token, dtype=torch.bool) if draft is None else token == draft
    p = scores.softmax(dim=-1)
    if draft is None:
        token = draw(p)
        return token, torch.zeros_like(token, dtype=torch.bool)
    p_draft, q_draft = (x.gather(-1, draft.unsqueeze(-1)).squeeze(-1) for x in (p, distribution))
    accepted = torch.rand_like(p_draft) * q_draft < p_draft
    rest = (p - distribution).clamp_min(0)
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)  # p = q: never rejected
    return torch.where(accepted, draft, draw(rest)), accepted


def kept(
    tokens: torch.Tensor, same: torch.Tensor, unfinished: torch.Tensor, ends: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How many drafts a text takes at once, of `tokens` [B, C + 1] that the model gives; one more is its own token.

    `same` [B, C + 1] tells which tokens are drafts (the last never is); `unfinished` [B] which rows go on before the
    first; `ends` the ids that end a row, without which all rows go on. Drafts are taken up to the place where an
    unfinished row rejects its own, or where the last row ends.

    Gives their number, a scalar; and [B, C + 1] whether a row is unfinished before a place, and behind it.
    """
    before = after = unfinished.unsqueeze(1).expand_as(same)
    goes_on = same.all(dim=0)
    if ends is not None:
        after = before & ((tokens.unsqueeze(-1) == ends).any(dim=-1).cumsum(dim=1) == 0)
        before = torch.cat((unfinished.unsqueeze(1), after[:, :-1]), dim=1)
        goes_on = (same | ~before).all(dim=0) & after.any(dim=0)
    return goes_on[:-1].cumprod(dim=0, dtype=torch.long).sum(), before, after
