"""Whatever moves a token's scores, or ends a text, gives with drafts the text that it gives without, or is refused."""

import inspect
import re

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation import GenerationMixin, logits_process

from .test_multi_token import GREEDY, learned, sequences

NEW, END = 8, 13
ENDS = {"eos_token_id": END, "pad_token_id": 0}
SAMPLED = {"do_sample": True, "top_k": 1}  # one token is left: the text is certain, and the others' code runs
SYNTH_ID = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[7, 11, 13], context_history_size=8)

# Class -> options of generate() that build it.
BUILT = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": {"guidance_scale": -30.0},
    "SequenceBiasLogitsProcessor": {"sequence_bias": [[[4, 13], 3.0], [[7], -5.0]]},
    "EncoderRepetitionPenaltyLogitsProcessor": {"encoder_repetition_penalty": 1.7},
    "RepetitionPenaltyLogitsProcessor": {"repetition_penalty": 1.7},
    "NoRepeatNGramLogitsProcessor": {"no_repeat_ngram_size": 2},
    "EncoderNoRepeatNGramLogitsProcessor": {"encoder_no_repeat_ngram_size": 2},
    "NoBadWordsLogitsProcessor": {"bad_words_ids": [[4], [7, 22]], **ENDS},
    "MinLengthLogitsProcessor": {"min_length": 15, **ENDS},
    "MinNewTokensLengthLogitsProcessor": {"min_new_tokens": 9, **ENDS},
    "PrefixConstrainedLogitsProcessor": {
        "prefix_allowed_tokens_fn": lambda row, ids: list(range(1 + len(ids) % 2, 31, 2))
    },
    "ForcedBOSTokenLogitsProcessor": {"forced_bos_token_id": 5},
    "ForcedEOSTokenLogitsProcessor": {"forced_eos_token_id": END},
    "InfNanRemoveLogitsProcessor": {"remove_invalid_values": True},
    "ExponentialDecayLengthPenalty": {"exponential_decay_length_penalty": (3, 1.5), **ENDS},
    "SuppressTokensLogitsProcessor": {"suppress_tokens": [4, 13, 22]},
    "SuppressTokensAtBeginLogitsProcessor": {"begin_suppress_tokens": [4, 13, 22]},
    "TemperatureLogitsWarper": {"temperature": 0.7, **SAMPLED},
    "TopHLogitsWarper": {"top_h": 0.5, **SAMPLED},
    "TopKLogitsWarper": SAMPLED,
    "TopPLogitsWarper": {"top_p": 0.8, **SAMPLED},
    "MinPLogitsWarper": {"min_p": 0.1, **SAMPLED},
    "TypicalLogitsWarper": {"typical_p": 0.8, **SAMPLED},
    "EpsilonLogitsWarper": {"epsilon_cutoff": 0.01, **SAMPLED},
    "EtaLogitsWarper": {"eta_cutoff": 0.01, **SAMPLED},
    "WatermarkLogitsProcessor": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "SynthIDTextWatermarkLogitsProcessor": {"watermarking_config": SYNTH_ID},
    "LogitNormalization": {"renormalize_logits": True},
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return learned(2, num_hidden_layers=1, mlp_layer_types=["sparse"])


class CountsItsCalls(LogitsProcessor):
    """Another token each call is forbidden."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.index_fill(1, torch.tensor([self.calls * 7 % 31, self.calls * 3 % 31]), -torch.inf)


class OfTheLastToken(LogitsProcessor):
    stateless = True

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:] * 3 % 30 + 1, -torch.inf)


class ThirdOfAKind(StoppingCriteria):
    """Ends a row where it was asked so often after a certain token."""

    def __init__(self):
        self.seen = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.seen = self.seen + (input_ids[:, -1] % 2 == 0).long()
        return self.seen >= 3


OWN = {
    "own-with-a-state": lambda: {"logits_processor": LogitsProcessorList([CountsItsCalls()])},
    "own-without": lambda: {"logits_processor": LogitsProcessorList([OfTheLastToken()])},
    "own-criterion": lambda: {"stopping_criteria": StoppingCriteriaList([ThirdOfAKind()]), "pad_token_id": 0},
}


def options_of(name: str, ids: torch.Tensor) -> dict:
    """New ones each time, since they may hold a state."""
    given = OWN[name]() if name in OWN else BUILT[name]
    return {"max_new_tokens": NEW, "attention_mask": torch.ones_like(ids), **GREEDY, **given}


def test_all_that_generate_builds_is_tried():
    source = inspect.getsource(GenerationMixin._get_logits_processor)
    built = set(re.findall(r"processors\.append\(\s*(\w+)\(", source))
    assert len(built) > 20
    made = {
        type(BUILT[x]["watermarking_config"].construct_processor(31, "cpu")).__name__ for x in BUILT if "Water" in x
    }
    assert built | made == BUILT.keys()
    assert all(hasattr(logits_process, name) for name in BUILT)


@pytest.mark.parametrize("name", [*BUILT, *OWN])
def test_drafts_of_the_modules_change_no_text(model, name):
    ids = sequences(2, 6, seed=3)
    expected = model.generate(ids, **options_of(name, ids))
    out = model.generate(ids, use_mtp=True, return_dict_in_generate=True, **options_of(name, ids))
    assert torch.equal(out.sequences, expected)
    assert out.drafted_tokens > 0
    if name in ("UnbatchedClassifierFreeGuidanceLogitsProcessor", *OWN):  # else the test would say nothing
        plain = model.generate(ids, max_new_tokens=NEW, attention_mask=torch.ones_like(ids), **GREEDY)
        assert not torch.equal(expected, plain)


REFUSED = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor": "SynthIDTextWatermarkLogitsProcessor",
    "PrefixConstrainedLogitsProcessor": "PrefixConstrainedLogitsProcessor",
    "own-with-a-state": "CountsItsCalls",
    "own-criterion": "ThirdOfAKind",
}


@pytest.mark.parametrize("name", [*BUILT, *OWN])
def test_other_drafts_change_no_text_or_are_refused(model, name):
    ids = sequences(1, 9, seed=3)
    lookup = {"prompt_lookup_num_tokens": 3}
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"{REFUSED[name]} must see each token of the text once"):
            model.generate(ids, **lookup, **options_of(name, ids))
        return
    expected = model.generate(ids, **options_of(name, ids))
    assert torch.equal(model.generate(ids, **lookup, **options_of(name, ids)), expected)
