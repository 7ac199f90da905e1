"""Guided decoding: only tokens that a JSON schema or a regular expression allows next, by llguidance.

Shapes: B rows, N tokens so far, V vocabulary.
"""

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Exactly what json.dumps writes: a model that may add blanks anywhere can add them for ever.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def unpacked(bits: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` bits of each row of bytes, the lowest first: bool [B, `count`] of uint8 [B, bytes]."""
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> place) & 1).bool().flatten(1)[:, :count]


class GuidedLogitsProcessor(LogitsProcessor):
    """Keeps the text after the prompt within a JSON schema (a dict, or its JSON) or a regular expression.

    One for each call: `model.generate(**inputs, logits_processor=[GuidedLogitsProcessor(tokenizer, regex="yes|no")])`.
    What it allows depends on the tokens alone, so it goes with batches, sampling, beams and `use_mtp`, which tries
    tokens and takes them back. A text ends where nothing may follow, or where the model ends what may end there; with
    too few new tokens it stays a beginning (`follows` tells). `eos_token_id` are the ids that end a text, the
    tokenizer's own if left out; give those of `model.generation_config` where they differ.

    Beside recorded steps it computes while the device does, for it is told each token before the step that reads it.

    Raises ModuleNotFoundError without llguidance, ValueError for a grammar or tokenizer that it can't use.
    """

    stateless = True  # what its matchers have read is taken back where the ids ask for it

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        json_schema: dict | str | None = None,
        regex: str | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ):
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        if (json_schema is None) == (regex is None):
            raise ValueError("Guided decoding takes either a JSON schema or a regular expression.")
        ends = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
        if ends is None:
            raise ValueError("Guided decoding needs a token that ends a text, but the tokenizer has no eos_token.")
        ends = [ends] if isinstance(ends, int) else list(ends)
        self.ends, self.tokens = frozenset(ends), from_tokenizer(tokenizer, eos_token=ends)
        if regex is None:
            self.grammar = LLMatcher.grammar_from_json_schema(json_schema, overrides=JSON_STYLE)
        else:
            self.grammar = LLMatcher.grammar_from_regex(regex)
        failed, messages = LLMatcher.validate_grammar_with_warnings(self.grammar, self.tokens)
        if failed:
            kind = "JSON schema" if regex is None else f"regular expression {regex!r}"
            raise ValueError(f"The {kind} can't guide a text: {' '.join(messages[0].split())}")
        for message in messages:
            logger.warning(message)
        self.prompt_length: int | None = None
        self.matchers: list = []
        self.read: list[list[int]] = []  # what each matcher has consumed
        self.told = None, None, None  # by `chosen`

    def chosen(self, input_ids: torch.LongTensor) -> None:
        """The ids [B, N] that the next call will see, told by a loop that has not yet asked for the step between.

        Their copy to the host is so behind no step, and what may follow them is computed beside it.
        """
        new = input_ids[:, self.prompt_length :]
        copy = torch.empty(new.shape, dtype=new.dtype, pin_memory=new.is_cuda).copy_(new, non_blocking=new.is_cuda)
        arrived = torch.cuda.Event() if new.is_cuda else None
        if arrived is not None:
            arrived.record()
        self.told = input_ids, copy, arrived

    def texts(self, input_ids: torch.LongTensor) -> list[list[int]]:
        """The new tokens of each row of ids [B, N]."""
        told, copy, arrived = self.told
        if told is not input_ids:
            return input_ids[:, self.prompt_length :].tolist()
        if arrived is not None:
            arrived.synchronize()
        return copy.tolist()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [B, V] with minus infinity where a token may not follow ids [B, N]. The first call sees the prompt.

        Raises ValueError where the text has left the grammar, as a draft that was not guided does.
        """
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        rows, vocabulary = scores.shape
        # In pinned memory, and as bits: to copy them waits for nothing that the device still has to do.
        packed = torch.zeros(rows, -(-vocabulary // 8), dtype=torch.uint8, pin_memory=scores.is_cuda)
        for row, text in enumerate(self.texts(input_ids)):
            if not self.ends.isdisjoint(text):
                packed[row] = 255  # the text has ended: what fills the row is not ours
                continue
            bits = np.frombuffer(self.bitmask(row, text), dtype=np.uint8)[: packed.shape[1]]
            packed.numpy()[row, : len(bits)] = bits
        allowed = unpacked(packed.to(scores.device, non_blocking=scores.is_cuda), vocabulary)
        return scores.masked_fill(~allowed, float("-inf"))

    def bitmask(self, row: int, text: list[int]) -> bytes:
        """A bit a token, 1 where it may follow these. What the row's matcher read beyond the common beginning goes."""
        from llguidance import LLMatcher

        while len(self.matchers) <= row:
            self.matchers.append(LLMatcher(self.tokens, self.grammar, log_level=0))
            self.read.append([])
        matcher, read = self.matchers[row], self.read[row]
        common = len(read)
        if text[:common] != read:
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(read, text, strict=False)))
        matcher.rollback(len(read) - common)
        consumed = common + matcher.try_consume_tokens(text[common:])
        self.read[row] = text[:consumed]
        if consumed < len(text):
            raise ValueError(
                f"Row {row} leaves the grammar at token {consumed + 1} after the prompt: each call of generate needs "
                "a GuidedLogitsProcessor of its own, and no drafts that it has not guided (prompt lookup)."
            )
        bits = matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(f"The grammar stopped at token {consumed + 1}: {' '.join(matcher.get_error().split())}")
        return bits

    def follows(self, tokens: Sequence[int]) -> bool:
        """Whether these tokens after a prompt, with or without the end, are a whole text of the grammar."""
        from llguidance import LLMatcher

        text = list(takewhile(lambda token: token not in self.ends, tokens))
        matcher = LLMatcher(self.tokens, self.grammar, log_level=0)
        return matcher.try_consume_tokens(text) == len(text) and matcher.is_accepting()
