"""A text as `generate()` writes it, token by token: shared by the loops that decode faster than Transformers' own.

Shapes: B rows, N tokens so far, V vocabulary.
"""

import torch
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from .host import CACHE, pad_token


class GrowingText:
    """ids [B, N]; `unfinished` [B]; `scores` and `raw_logits`: a [B, V] for each new token, where they are asked for.

    Processors and criteria are asked once a token, in order, as by Transformers' `_sample`. A processor with a method
    `chosen` is told the ids that it will be asked about next before the step that gives their logits, so that what it
    has to know of them does not wait for that.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer=None,
    ):
        self.ids, self.config, self.streamer = ids, config, streamer
        self.processors, self.criteria = logits_processor, stopping_criteria
        self.told = [processor for processor in logits_processor if hasattr(processor, "chosen")]
        self.limit = stopping_criteria.max_length
        self.ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        # A length alone is known without asking the device.
        self.watched = any(not isinstance(criterion, MaxLengthCriteria) for criterion in stopping_criteria)
        self.unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.scores = self.raw_logits = ()

    def process(self, logits: torch.Tensor) -> torch.Tensor:
        """The processed scores [B, V] of the next token, from its `logits` [B, V], which may be overwritten."""
        if self.config.output_logits:
            self.raw_logits += (logits.clone(),)
        scores = self.processors(self.ids, logits)
        if self.config.output_scores:
            self.scores += (scores.clone(),)
        return scores

    def add(self, token: torch.Tensor) -> torch.Tensor:
        """Append the tokens [B], padding in rows that have ended; returns what was appended."""
        if self.ends:
            token = torch.where(self.unfinished, token, pad_token(self.config).to(token))
        self.ids = torch.cat((self.ids, token.unsqueeze(1)), dim=1)
        for processor in self.told:
            processor.chosen(self.ids)
        if self.streamer is not None:
            self.streamer.put(token.cpu())
        if self.watched:
            self.unfinished = self.unfinished & ~self.criteria(self.ids, self.scores or None)
        return token

    def take_back(self) -> None:
        """Remove the last token."""
        self.ids, self.scores, self.raw_logits = self.ids[:, :-1], self.scores[:-1], self.raw_logits[:-1]

    @property
    def full(self) -> bool:
        """Whether it is as long as it may be."""
        return self.limit is not None and self.ids.shape[1] >= self.limit

    @property
    def read(self) -> torch.Tensor | None:
        """[B], false in rows of which nobody reads what comes; None where all are read: until the text's end where its
        scores or its cache are given, too."""
        return self.unfinished if self.watched and not self.config.return_dict_in_generate else None

    @property
    def ended(self) -> torch.Tensor:
        """Whether no row goes on, but for the length; a scalar on the device."""
        return ~self.unfinished.any()

    def output(self, cache, kind: type = GenerateDecoderOnlyOutput, **further):
        """What `generate` returns: the ids, or where the config asks for it a `kind` of output."""
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        return kind(
            sequences=self.ids,
            scores=self.scores if self.config.output_scores else None,
            logits=self.raw_logits if self.config.output_logits else None,
            **{CACHE: cache},
            **further,
        )
