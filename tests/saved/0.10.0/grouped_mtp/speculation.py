"""Self-speculation: the MTP modules draft tokens, one forward of the model verifies them all.

Shapes: B rows, N tokens known so far, C drafts, D hidden size, V vocabulary. The text has the distribution of plain
decoding, and is the same where that is greedy.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.utils import logging

from .attention import MASKS
from .decoding import HfMoeReservedCache, beyond, keep_for_the_next, recorded, sped_up
from .growing_text import GrowingText
from .host import QuantizedLayer, of_the_user
from .recorded_drafts import Choice, RecordedRound, reserve, watchers, write
from .rotary import position_embeddings
from .verifying import draw, follow

logger = logging.get_logger(__name__)

# The host's processors that count their calls, run the model, or call what a user gave.
STATEFUL = (
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)
# Criteria that need not see each token: the host's own loop of drafts cuts what is beyond an end or a length itself.
ASKED_SELDOM = (MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria)


@dataclass
class HfMoeSpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `use_mtp` and `return_dict_in_generate`.

    `forward_passes` counts those of the decoder, the prompt's included; `drafted_tokens` and `accepted_tokens` count
    over the rows that were not finished. A draft after one that any row rejected is not accepted.
    """

    forward_passes: int | None = None
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None

    @property
    def acceptance_rate(self) -> float:
        """Accepted drafts per draft, from 0 to 1; nan if there were none."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else float("nan")


class Drafter:
    """The MTP modules of `model`, with a cache of their own, from position `start` on."""

    def __init__(self, model: nn.Module, start: int, choose, cache: Cache | None = None):
        self.model, self.decoder, self.choose = model, model.model, choose
        self.start = self.cached = start  # positions from start to cached are in the cache
        self.cache = DynamicCache() if cache is None else cache
        self.hidden_states = None  # of the entries to come, [B, entries, D]

    def draft(
        self,
        ids: torch.Tensor,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        count: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens [B, C] after ids [B, N] and the distributions [B, C, V] they were drawn from, C = `count`.

        `hidden_states` are the decoder's for the positions it read since the last call. Module k reads token i + k at
        position i, so its last k - 1 entries read drafts: they are computed again once those tokens are known.
        """
        if self.hidden_states is not None:
            hidden_states = torch.cat((self.hidden_states, hidden_states), dim=1)
        known, window = ids.shape[1], slice(self.cached, ids.shape[1] - 1)
        embeds = self.decoder.scaled(self.decoder.embed_tokens(ids[:, self.cached + 1 :]))
        config, last = self.decoder.config, self.decoder.config.layer_types[-1]
        shared = {
            "attention_mask": MASKS[last](
                config,
                embeds,
                None if attention_mask is None else attention_mask[:, self.start : known - 1],
                self.cache,
            ),
            "position_ids": position_ids[:, window],
            "position_embeddings": position_embeddings(
                self.decoder.rotary_emb, embeds, position_ids[:, window], [last]
            )[last],
            "token_mask": None if attention_mask is None else attention_mask[:, window],
            "layer_cache": self.cache,
        }
        chain, distributions = hidden_states, []
        for depth, layer in enumerate(self.decoder.mtp_layers[:count], start=1):
            read = ids[:, self.cached + depth :]
            chain = layer(chain, self.decoder.scaled(self.decoder.embed_tokens(read)), input_ids=read, **shared)
            token, distribution = self.choose(ids, self.model.project(chain[:, -1]).float())
            ids = torch.cat((ids, token), dim=1)
            distributions.append(distribution)

        again = min(len(self.decoder.mtp_layers) - 1, hidden_states.shape[1])
        self.hidden_states = hidden_states[:, hidden_states.shape[1] - again :]
        self.cache.crop(-again)
        self.cached = known - 1 - again
        return ids[:, known:], None if distributions[0] is None else torch.stack(distributions, dim=1)


def stateless(processor: LogitsProcessor) -> bool:
    """Whether its scores depend on the ids and scores that it is given alone, so that a draft may ask it, too.

    So do the host's own, but for what counts its calls, runs the model, or calls what a user gave. Any other processor
    says it by an attribute `stateless`.
    """
    own = type(processor).__module__ == LogitsProcessor.__module__ and not isinstance(processor, STATEFUL)
    return getattr(processor, "stateless", own)


def check_processors(logits_processor: LogitsProcessorList, stopping_criteria: StoppingCriteriaList) -> None:
    """Raise ValueError for what the host's own loop of drafts would ask too often, or too seldom.

    It asks processors about drafts that it takes back, and criteria once for several tokens.
    """
    unfit = [type(x).__name__ for x in logits_processor if not stateless(x)]
    unfit += [type(x).__name__ for x in stopping_criteria if not isinstance(x, ASKED_SELDOM)]
    if unfit:
        raise ValueError(
            f"{', '.join(unfit)} must see each token of the text once, unlike drafts by lookup or an assistant: "
            "leave one of them out, or use use_mtp; a processor of your own without a state says stateless = True."
        )


def take_back(cache: Cache, count: int) -> None:
    """Remove the last `count` tokens from every layer of `cache`."""
    for layer in cache.layers:
        if layer.is_croppable:
            layer.crop(-count)
        else:  # a static one: what is beyond its length is masked, and written over
            layer.cumulative_length.sub_(count)


def check_speculation(model: nn.Module, mode: str, config: GenerationConfig, mode_kwargs: dict) -> None:
    """Raise ValueError where `generate(use_mtp=True)` can't do what else is asked."""
    if not model.model.mtp_layers:
        raise ValueError("use_mtp needs MTP layers, but num_mtp_layers is 0: add some with model.add_mtp_layers().")
    asked = {
        "num_beams > 1": mode != "assisted_generation",
        "assistant_model": mode_kwargs.get("assistant_model") is not None,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        "assistant_early_exit": config.assistant_early_exit is not None,
        "assistant_ensemble_weight": config.assistant_ensemble_weight is not None,
        "prefill_chunk_size": config.prefill_chunk_size is not None,
        "use_cache=False": not config.use_cache,
        "output_attentions": config.output_attentions,
        "output_hidden_states": config.output_hidden_states,
        "synced_gpus (FSDP, ZeRO-3)": mode_kwargs.get("synced_gpus"),
    }
    if any(asked.values()):
        names = ", ".join(name for name, value in asked.items() if value)
        raise ValueError(f"use_mtp does not go with {names}: leave one of them out.")


def check_batches(config, mode: str, generation_config: GenerationConfig) -> None:
    """Raise ValueError where `generate` would read a text in other pieces than plain decoding, and experts count."""
    asked = {"drafts": mode == "assisted_generation", "prefill_chunk_size": generation_config.prefill_chunk_size}
    if config.limits_experts and any(asked.values()):
        names = ", ".join(name for name, value in asked.items() if value)
        raise ValueError(
            f"{names} would give another text with eval_capacity_factor {config.router_args['eval_capacity_factor']}, "
            "which counts the tokens of each forward: leave one of them out."
        )


def check_lengths(config, length: int, max_length: int) -> None:
    """Raise ValueError where RoPE's frequencies would change on the way from `length` to `max_length` tokens.

    Drafts would then be verified by other frequencies than those of plain decoding.
    """
    for rope in config.ropes:
        limits = {"longrope": rope.get("original_max_position_embeddings"), "dynamic": config.max_position_embeddings}
        limit = limits.get(rope["rope_type"])
        crosses = limit is not None and max_length > limit
        if crosses and (length <= limit or rope["rope_type"] == "dynamic"):
            raise ValueError(
                f"Drafts do not go with rope_type {rope['rope_type']!r} where a text outgrows {limit} tokens; this "
                f"one may have {max_length}: lower max_new_tokens, or leave out use_mtp and other drafts."
            )


def check_cache(cache: Cache) -> None:
    if any(isinstance(layer, StaticLayer) and layer.is_sliding for layer in cache.layers):
        raise ValueError("use_mtp can't take tokens back from a static sliding-window cache: use a dynamic one.")
    # A quantized layer says that it can be cropped, but that takes nothing from what it has quantized.
    quantized = any(isinstance(layer, QuantizedLayer) for layer in cache.layers)
    if quantized or not all(layer.is_croppable or isinstance(layer, StaticLayer) for layer in cache.layers):
        raise ValueError(
            f"use_mtp can't take tokens back from this {type(cache).__name__}: use a dynamic or static one."
        )


class Speculation:
    """The state of speculative decoding between two forwards of the decoder."""

    def __init__(
        self,
        model: nn.Module,
        text: GrowingText,
        cache: Cache,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        inputs: dict,
    ):
        self.model, self.text, self.cache, self.inputs = model, text, cache, inputs
        self.position_ids, self.attention_mask = position_ids.expand(len(text.ids), -1), attention_mask
        self.seen = int(cache.get_seq_length())  # tokens that the cache holds, and that are kept
        self.sample = text.config.do_sample
        self.processors = LogitsProcessorList(filter(stateless, text.processors))
        # One that `generate` has reserved, as it does where a step can be recorded.
        self.ours = isinstance(cache, HfMoeReservedCache) and not of_the_user(cache)
        own = reserve(model, cache, len(text.ids), text.config.max_length) if self.ours else None
        self.drafter = Drafter(model, self.seen, self.choose, own)
        self.drafts, self.distributions = text.ids[:, :0], None
        self.passes = self.drafted = self.accepted = 0

    def choose(self, ids: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A draft [B, 1] after ids [B, N] and, if sampling, its distribution [B, V]."""
        logits = self.processors(ids, logits)
        if not self.sample:
            return logits.argmax(dim=-1, keepdim=True), None
        distribution = logits.softmax(dim=-1)
        return draw(distribution).unsqueeze(1), distribution

    def positions(self, count: int) -> torch.Tensor:
        """Those of the text and of `count` more tokens."""
        ahead = torch.arange(1, count + 1, device=self.position_ids.device)
        return torch.cat((self.position_ids, self.position_ids[:, -1:] + ahead), dim=1)

    def mask(self, count: int) -> torch.Tensor | None:
        """That of the text and of `count` more tokens."""
        return None if self.attention_mask is None else nn.functional.pad(self.attention_mask, (0, count), value=1)

    def round(self) -> None:
        """Read, verify, and draft anew if the text goes on."""
        outputs = self.read()
        added = self.keep(outputs.logits.to(dtype=torch.float32, device=self.text.ids.device))
        self.take_back(added)
        if not self.done:
            self.draft(outputs.hidden_states[-1], added)

    def read(self):
        """The decoder's outputs for what it hasn't read of the text, and for the drafts."""
        count = self.drafts.shape[1]
        outputs = self.model(
            input_ids=torch.cat((self.text.ids, self.drafts), dim=1)[:, self.seen :],
            attention_mask=self.mask(count),
            position_ids=self.positions(count)[:, self.seen :],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=count + 1,
            output_hidden_states=-1,  # the last ones
            **self.inputs,
        )
        if self.passes == 0:
            self.cache.activate_past_recording()  # now that the prompt is read: it keeps what windows would drop
        self.passes += 1
        self.drafted += count * int(self.text.unfinished.sum())
        return outputs

    def keep(self, logits: torch.Tensor) -> int:
        """Add to the text what each place's logits [B, C + 1, V] give, up to a draft that a row rejects; returns how
        many tokens."""
        text, count = self.text, self.drafts.shape[1]
        for place in range(count + 1):
            draft = self.drafts[:, place] if place < count else None
            distribution = self.distributions[:, place] if self.sample and place < count else None
            token, same = follow(text.process(logits[:, place]), draft, distribution, self.sample)
            agreed = int(same[text.unfinished].sum())
            rejected = agreed < int(text.unfinished.sum())
            self.accepted += agreed
            text.add(token)
            if rejected or self.done:
                return place + 1
        return count + 1

    @property
    def done(self) -> bool:
        return self.text.full or bool(self.text.ended)

    def take_back(self, added: int) -> None:
        """Remove from the cache the drafts that the text has not taken: those beyond its last `added` tokens."""
        if self.passes > 1:
            take_back(self.cache, self.drafts.shape[1] + 1 - added)

    def draft(self, hidden_states: torch.Tensor, added: int) -> None:
        """New drafts behind the `added` tokens, from the decoder's `hidden_states` for what it read last."""
        text = self.text
        self.attention_mask, self.position_ids = self.mask(added), self.positions(added)
        known = text.ids.shape[1]
        hidden_states, self.seen = hidden_states[:, : known - 1 - self.seen], known - 1
        self.drafts, self.distributions = text.ids[:, :0], None
        count = min(len(self.model.model.mtp_layers), text.config.max_length - known - 1)
        if count > 0:
            self.drafts, self.distributions = self.drafter.draft(
                text.ids, hidden_states, self.position_ids, self.attention_mask, count
            )

    def write_recorded(self) -> None:
        """The rest of the text by recorded rounds, where they may be recorded, and a text is long enough for it."""
        model, text, cache, count = self.model, self.text, self.cache, len(self.model.model.mtp_layers)
        names = watchers(text) + [name for name, value in self.inputs.items() if value is not None]
        if names:
            logger.warning_once(f"use_mtp decodes without CUDA graphs: {', '.join(names)} must see token after token.")
        again = self.drafter.hidden_states
        if names or text.limit is None or self.drafts.shape[1] < count or again.shape[1] < count - 1:
            return
        cache.drafts = self.drafter.cache
        for layer in (*cache.layers, *cache.drafts.layers):
            layer.reserve(text.limit + beyond(count))
        steps = (text.limit - text.ids.shape[1]) // (count + 1)
        padded = self.attention_mask is not None and not bool(self.attention_mask.all())
        step = recorded(RecordedRound, model, cache, steps, len(text.ids), padded, Choice(text))
        if step is not None:
            step.begin_with(text, self.drafts, self.distributions, again, self.position_ids, self.attention_mask)
            passes, drafted, accepted = write(step, text)
            self.passes += passes
            self.drafted += drafted
            self.accepted += accepted


def speculative_decoding(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria,
    generation_config: GenerationConfig,
    cache: Cache,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    streamer=None,
    **kwargs,
) -> HfMoeSpeculativeOutput | torch.Tensor:
    """Generate, `num_mtp_layers` drafts at a time, and keep of them what every unfinished row accepts.

    Place by place, up to the first where a row rejects its draft; the others keep theirs there. Processors and
    criteria are asked once a token, in order, as in plain decoding, so those with a state are right; drafts ask those
    without one.
    """
    length, seen = input_ids.shape[1], int(cache.get_seq_length())
    if kwargs.get("inputs_embeds") is not None or position_ids.shape[1] != length or seen >= length:
        raise ValueError("use_mtp needs input_ids of the whole sequence, also of what past_key_values holds.")
    check_cache(cache)
    own = ("logits_to_keep", "use_cache", "inputs_embeds", "output_hidden_states")
    inputs = {name: value for name, value in kwargs.items() if name not in own}

    text = GrowingText(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    speculation = Speculation(model, text, cache, position_ids, attention_mask, inputs)
    with torch.cuda.device(model.device) if speculation.ours else nullcontext():  # where kernels and streams go
        with sped_up(model, input_ids.numel()) if speculation.ours else nullcontext():
            speculation.round()
        if speculation.ours and not speculation.done:
            speculation.write_recorded()
        while not speculation.done:
            speculation.round()
    if speculation.ours:
        keep_for_the_next(model, cache, generation_config)
    return text.output(
        cache,
        HfMoeSpeculativeOutput,
        forward_passes=speculation.passes,
        drafted_tokens=speculation.drafted,
        accepted_tokens=speculation.accepted,
    )
