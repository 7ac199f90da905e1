"""Self-speculation on a GPU: reading, verifying and drafting are one CUDA graph a round, which asks the host nothing.

The host learns of a round while the next one runs; a text may so have one round too many, which is left out.

Shapes: B rows, C drafts a round, one of each MTP module, D hidden size, V vocabulary. Before a round the decoder has
read all tokens but the last one. It reads that and the drafts, C + 1 tokens; some of what it says is kept, and its
cache goes back to that. Each module then reads W = 2 C entries: those of these C + 1 tokens, and the C - 1 before,
whose later modules read drafts that were not yet text. What is behind the kept ones is written over in the next round.
"""

import torch
from torch import nn
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .decoding import HfMoeReservedCache, Late, RecordedStep, beyond
from .growing_text import GrowingText
from .host import pad_token
from .padding import valid_tokens
from .rotary import position_embeddings
from .verifying import draw, follow, kept

# The host's processors that look at scores alone, and so at all places at once; and the criteria that `kept` knows.
BY_SCORES = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
KNOWN_CRITERIA = (MaxLengthCriteria, EosTokenCriteria)


def watchers(text: GrowingText) -> list[str]:
    """What must see token after token, or their scores, and so keeps a round from being recorded."""
    names = [type(x).__name__ for x in text.processors if type(x) not in BY_SCORES]
    names += [type(x).__name__ for x in text.criteria if type(x) not in KNOWN_CRITERIA]
    return names + [name for name in ("output_scores", "output_logits") if getattr(text.config, name)]


class Choice:
    """How tokens are chosen from logits; `repr` says all of it."""

    def __init__(self, text: GrowingText):
        self.sample, self.processors = text.config.do_sample, LogitsProcessorList(text.processors)
        ends = [x.eos_token_id for x in text.criteria if isinstance(x, EosTokenCriteria)]
        self.ends = torch.cat([x.flatten() for x in ends]).to(text.ids.device) if ends else None
        self.padding = pad_token(text.config).to(text.ids) if text.ends else None

    def __repr__(self) -> str:
        processors = [(type(x).__name__, vars(x)) for x in self.processors]
        return repr((self.sample, processors, self.ends, self.padding))

    def draft(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A token [B] of logits [B, V] and, if sampling, the distribution [B, V] that it was drawn from."""
        scores = self.processors(None, logits)
        if not self.sample:
            return scores.argmax(dim=-1), None
        distribution = scores.softmax(dim=-1)
        return draw(distribution), distribution

    def verify(
        self, logits: torch.Tensor, drafts: torch.Tensor, distributions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, C + 1] of logits [B, C + 1, V], and which of them are the drafts [B, C], the last one never."""
        scores = self.processors(None, logits.flatten(0, 1)).view_as(logits)
        if not self.sample:
            tokens = scores.argmax(dim=-1)
            return tokens, nn.functional.pad(tokens[:, :-1] == drafts, (0, 1))
        tokens, same = follow(scores[:, :-1], drafts, distributions, sample=True)
        last, _ = follow(scores[:, -1], None, None, sample=True)
        return torch.cat((tokens, last.unsqueeze(1)), dim=1), nn.functional.pad(same, (0, 1))


class RecordedRound(RecordedStep):
    """C + 1 tokens of every row through the model, the choice among them, and C new drafts, as one recording."""

    def __init__(self, model: nn.Module, cache: HfMoeReservedCache, rows: int, padded: bool, choice: Choice):
        super().__init__(model, cache, rows, padded)
        self.choice, self.modules = choice, model.model.mtp_layers
        count, device, config = len(self.modules), model.device, model.config
        self.tokens = 2 * count * rows
        self.ahead = torch.arange(2 * count, device=device)
        self.window = self.ahead - (count - 1)  # where a module's entries are, from the first new token on
        # By what a round sets lengths back if no draft is kept: one of C + 1 tokens is, and one of W entries.
        back = torch.tensor([-count, 1 - 2 * count])
        self.back = back.repeat_interleave(torch.tensor([len(part.layers) for part in cache.parts])).to(device)
        self.ids = torch.zeros(rows, count + 1, dtype=torch.long, device=device)  # the last of the text, and drafts
        self.unfinished = torch.ones(rows, dtype=torch.bool, device=device)
        # Of the C - 1 entries that are read again: their hidden states, and the tokens that the first module read.
        self.again = torch.zeros(rows, count - 1, config.hidden_size, dtype=model.dtype, device=device)
        self.read_again = torch.zeros(rows, count - 1, dtype=torch.long, device=device)
        shape = (rows, count, config.vocab_size)
        self.distributions = torch.zeros(shape, device=device) if choice.sample else None

    def begin_with(
        self,
        text: GrowingText,
        drafts: torch.Tensor,
        distributions: torch.Tensor | None,
        again: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> None:
        """Start behind a text that has `drafts` [B, C] from `distributions` [B, C, V]; `again` [B, C - 1, D]."""
        self.begin(position_ids[:, -1:], attention_mask)
        self.ids.copy_(torch.cat((text.ids[:, -1:], drafts), dim=1))
        self.unfinished.copy_(text.unfinished)
        self.again.copy_(again)
        self.read_again.copy_(text.ids[:, text.ids.shape[1] - again.shape[1] :])
        if self.distributions is not None:
            self.distributions.copy_(distributions)

    def run(self) -> torch.Tensor:
        """The tokens [B, C + 1] that the model gives beside which of them are the drafts: [B, 2 (C + 1)]."""
        hidden_states = self.model.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.position + self.ahead[: self.ids.shape[1]],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        logits = self.model.project(hidden_states).float()
        tokens, same = self.choice.verify(logits, self.ids[:, 1:], self.distributions)
        told = torch.cat((tokens, same.long()), dim=1)
        number, _, after = kept(tokens, same, self.unfinished, self.choice.ends)
        number = number.view(1)
        if self.choice.ends is not None:
            self.unfinished.copy_(after.index_select(1, number).squeeze(1))
        self.draft(hidden_states, tokens, number)
        self.position.add_(number + 1)
        self.lengths.add_(number + self.back)
        return told

    def draft(self, hidden_states: torch.Tensor, tokens: torch.Tensor, number: torch.Tensor) -> None:
        """New `ids`, of the decoder's hidden_states [B, C + 1, D] and its tokens [B, C + 1], `number` [1] drafts kept.

        Module k reads the token k behind each entry's; entry C - 1 + `number` is the last that counts.
        """
        decoder, cache, count = self.model.model, self.cache.drafts, len(self.modules)
        entry = number + (count - 1)
        chain, line = hidden_states, tokens
        if count > 1:
            chain = torch.cat((self.again, hidden_states), dim=1)  # [B, W, D]
            # What the first module reads, and behind it what the others read besides.
            line = torch.cat((self.read_again, tokens, torch.zeros_like(self.read_again)), dim=1)  # [B, W + C - 1]
            again = self.ahead[: count - 1] + (number + 1)
            self.again.copy_(chain.index_select(1, again))
        kind, entries = self.model.config.layer_types[-1], chain.shape[1]
        position_ids = self.position + self.window
        shared = {
            "attention_mask": decoder.attention_masks(self.mask, chain, cache, position_ids)[kind],
            "position_ids": position_ids,
            "position_embeddings": position_embeddings(decoder.rotary_emb, chain, position_ids, [kind])[kind],
            "token_mask": valid_tokens(self.mask, *chain.shape[:2], cache),
            "layer_cache": cache,
        }
        ids = [tokens.index_select(1, number)]
        for depth, module in enumerate(self.modules):
            read = line[:, depth : depth + entries]
            chain = module(chain, decoder.scaled(decoder.embed_tokens(read)), input_ids=read, **shared)
            logits = self.model.project(chain.index_select(1, entry).squeeze(1)).float()
            token, distribution = self.choice.draft(logits)
            ids.append(token.unsqueeze(1))
            if depth + 1 < count:
                line.index_copy_(1, entry + (depth + 1), ids[-1])
            if distribution is not None:
                self.distributions[:, depth].copy_(distribution)
        torch.cat(ids, dim=1, out=self.ids)
        if count > 1:
            self.read_again.copy_(line.index_select(1, again))

    def __call__(self) -> torch.Tensor:
        """As `run`; overwritten by the next call."""
        return self.replay()


def reserve(model: nn.Module, cache: HfMoeReservedCache, rows: int, length: int) -> HfMoeReservedCache:
    """A cache for the modules' entries of a text of so many tokens: that of the last text where it fits."""
    modules = len(model.model.mtp_layers)
    drafts, positions = cache.drafts, length + beyond(modules)
    if drafts is None or len(drafts.layers) != modules or not drafts.fits(rows, positions, model.device):
        return HfMoeReservedCache(modules, positions)
    drafts.reset()
    return drafts


def write(step: RecordedRound, text: GrowingText) -> tuple[int, int, int]:
    """Round after round until `text` ends; gives the rounds, the drafts that they read, and those accepted.

    A round is noticed one late. Drafts beyond the longest text, and all of a round too many, do not count.
    """
    choice, count, known = step.choice, len(step.modules), text.ids.shape[1]
    ends, padding = (x if x is None else x.cpu() for x in (choice.ends, choice.padding))
    rounds = drafted = accepted = 0
    late, new, unfinished = Late(), [], text.unfinished.cpu()
    while known < text.limit and bool(unfinished.any()):
        told = late.put(step())
        if told is None:
            continue
        tokens, same = told[:, : count + 1], told[:, count + 1 :].bool()
        number, before, after = kept(tokens, same, unfinished, ends)
        within = min(count, text.limit - known - 1)
        rounds, drafted = rounds + 1, drafted + within * int(unfinished.sum())
        accepted += int((same & before)[:, : min(number + 1, within)].sum())
        tokens = tokens.clone() if padding is None else tokens.where(before, padding)
        new.append(tokens[:, : min(number + 1, text.limit - known)])
        unfinished, known = after[:, number], known + new[-1].shape[1]
        if text.streamer is not None:
            for token in new[-1].unbind(dim=1):
                text.streamer.put(token)
    text.ids = torch.cat((text.ids, torch.cat(new, dim=1).to(text.ids.device)), dim=1)
    text.unfinished = unfinished.to(text.ids.device)
    for layer in step.cache.layers:
        layer.length = known - 1
    return rounds, drafted, accepted
