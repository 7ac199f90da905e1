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


class GuidedLogitsProcessor(LogitsProcessor):
    """Keeps the text after the prompt within a JSON schema (a dict, or its JSON) or a regular expression.

    One for each call: `model.generate(**inputs, logits_processor=[GuidedLogitsProcessor(tokenizer, regex="yes|no")])`.
    What it allows depends on the tokens alone, so it goes with batches, sampling, beams and `use_mtp`, which tries
    tokens and takes them back. A text ends where nothing may follow, or where the model ends what may end there; with
    too few new tokens it stays a beginning (`follows` tells). `eos_token_id` are the ids that end a text, the
    tokenizer's own if left out; give those of `model.generation_config` where they differ.

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
        self.ends = [ends] if isinstance(ends, int) else list(ends)
        self.tokens = from_tokenizer(tokenizer, eos_token=self.ends)
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

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [B, V] with minus infinity where a token may not follow ids [B, N]. The first call sees the prompt.

        Raises ValueError where the text has left the grammar, as a draft that was not guided does.
        """
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        allowed = np.zeros(tuple(scores.shape), dtype=bool)
        for row, text in enumerate(input_ids[:, self.prompt_length :].tolist()):
            if any(token in self.ends for token in text):
                allowed[row] = True  # the text has ended: what fills the row is not ours
                continue
            bits = np.frombuffer(self.bitmask(row, text), dtype=np.uint8)
            known = np.unpackbits(bits, bitorder="little")[: min(self.tokens.vocab_size, scores.shape[1])]
            allowed[row, : len(known)] = known
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), float("-inf"))

    def bitmask(self, row: int, text: list[int]) -> bytes:
        """A bit a token, 1 where it may follow these. What the row's matcher read beyond the common beginning goes."""
        from llguidance import LLMatcher

        while len(self.matchers) <= row:
            self.matchers.append(LLMatcher(self.tokens, self.grammar, log_level=0))
            self.read.append([])
        matcher, read = self.matchers[row], self.read[row]
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
