"""Rounds of drafts as recordings: their text and counts are those of the rounds that ask the host at each place.

Without a GPU the rounds run as they are, each noticed one late, as a recording's are.
"""

import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from transformers import MaxTimeCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hf_moe.model import decoding, recorded_drafts
from hf_moe.model.decoding import KEPT, HfMoeReservedCache
from hf_moe.model.recorded_drafts import Choice, RecordedRound
from hf_moe.model.verifying import draw, kept
from tests.conftest import tiny_model
from tests.model.test_multi_token import VARIANTS, chi_square_p_value, learned, mtp_model, sequences
from tests.recordings import record_on_cpu


@pytest.fixture
def unrecorded(monkeypatch):
    record_on_cpu(monkeypatch)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cpu":
        request.getfixturevalue("unrecorded")
    monkeypatch.setattr(decoding, "WORTH_RECORDING", 1)
    return request.param


@pytest.fixture
def rounds(monkeypatch):
    """Of each round how many drafts were kept, and whether the text goes on."""
    found, counted = [], recorded_drafts.kept

    def heard(tokens, same, unfinished, ends):
        number, before, after = counted(tokens, same, unfinished, ends)
        if tokens._base is not None:  # a part of what the host was told
            found.append((int(number), bool(after[:, number].any())))
        return number, before, after

    monkeypatch.setattr(recorded_drafts, "kept", heard)
    return found


CASES = [("gqa", 1), ("gqa", 3), ("mla", 2), ("window", 3), ("hash", 1), ("gemma", 2), ("llama4", 2), ("moa", 2)]


@pytest.fixture(scope="module", params=CASES, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def half_learned(request):
    torch.manual_seed(0)
    name, depth = request.param
    return learned(depth, **VARIANTS[name])


@pytest.fixture(scope="module")
def three():
    torch.manual_seed(0)
    return learned(3)


GREEDY = {"do_sample": False}
TOLD = {"return_dict_in_generate": True}


def inputs_of(batch, device, padding=0, seed=99):
    ids = sequences(batch, 7, seed=seed).to(device)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def counts(out):
    return out.forward_passes, out.drafted_tokens, out.accepted_tokens


@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (3, 3), (3, 0)], ids=["one", "padded rows", "rows"])
def test_text_and_counts_are_those_of_rounds_that_ask(half_learned, device, rounds, batch, padding):
    if device == "cuda" and half_learned.config.attention_type == "moa":
        pytest.skip("Transformers' grouped product of float32 waits for the device")
    model, inputs = half_learned.to(device), inputs_of(batch, device, padding)
    options = {"max_new_tokens": 23, **GREEDY, **inputs}
    plain = model.generate(**options, disable_compile=True)
    asked = model.generate(**options, **TOLD, use_mtp=True, disable_compile=True)
    out = model.generate(**options, **TOLD, use_mtp=True)
    assert rounds and torch.equal(out.sequences, plain)
    assert counts(out) == counts(asked)
    assert type(out.past_key_values) is HfMoeReservedCache and out.past_key_values.get_seq_length() == 29


def test_every_number_of_drafts_is_kept_and_taken_back(three, device, rounds):
    """Also where the longest text ends within accepted drafts."""
    model = three.to(device)
    for seed, new in itertools.product(range(9), (9, 10, 12, 13)):
        options = {"max_new_tokens": new, **GREEDY, **inputs_of(1, device, seed=seed)}
        asked = model.generate(**options, **TOLD, use_mtp=True, disable_compile=True)
        out = model.generate(**options, **TOLD, use_mtp=True)
        assert torch.equal(out.sequences, asked.sequences) and counts(out) == counts(asked)
    assert {number for number, _ in rounds} == {0, 1, 2, 3}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_text_ends_within_drafts(three, device, rounds, batch):
    model, inputs, found = three.to(device), inputs_of(batch, device), set()
    text = model.generate(**inputs, max_new_tokens=24, **GREEDY, disable_compile=True)[:, 7:]
    for place in range(1, 13):
        ends = text[:, place].tolist()
        options = {"max_new_tokens": 24, "eos_token_id": ends, "pad_token_id": 0, **GREEDY, **inputs}
        asked = model.generate(**options, **TOLD, use_mtp=True, disable_compile=True)
        rounds.clear()
        out = model.generate(**options, **TOLD, use_mtp=True)
        assert torch.equal(out.sequences, asked.sequences) and counts(out) == counts(asked)
        assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1
        found |= {number for number, goes_on in rounds if not goes_on}
    assert len(found) > 1  # as first of a round, and behind drafts


@pytest.mark.parametrize("padding", [0, 2])
def test_a_rounds_logits_are_those_of_reading_everything_again(half_learned, unrecorded, rounds, monkeypatch, padding):
    """The model's at all places that are kept, and each module's at the last entry."""
    read, ahead, verify, draft = [], [], Choice.verify, Choice.draft

    def heard_verifying(choice, logits, drafts, distributions):
        read.append(logits)
        ahead.append([])
        return verify(choice, logits, drafts, distributions)

    def heard_drafting(choice, logits):
        ahead[-1].append(logits)
        return draft(choice, logits)

    monkeypatch.setattr(Choice, "verify", heard_verifying)
    monkeypatch.setattr(Choice, "draft", heard_drafting)
    model, inputs, new = half_learned.to("cpu"), inputs_of(2, "cpu", padding), 24
    text, known = model.generate(**inputs, max_new_tokens=new, use_mtp=True, **GREEDY), 8
    assert len(rounds) > 4
    for logits, drafted, (number, _) in zip(read, ahead, rounds, strict=False):  # the last one was not noticed
        drafts = torch.stack([x.argmax(-1) for x in drafted], dim=1)
        begin, known = known - 1, known + number + 1
        if known > text.shape[1]:
            break
        whole = torch.cat((text[:, :known], drafts), dim=1)
        mask = nn.functional.pad(inputs["attention_mask"], (0, whole.shape[1] - 7), value=1)
        with torch.no_grad():
            outputs = model.model(
                whole,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
                output_mtp_hidden_states=True,
                use_cache=False,
            )
            expected = model.project(outputs.last_hidden_state[:, begin : known - 1])
            of_modules = [model.project(x[:, known - 2]) for x in outputs.mtp_hidden_states]
        torch.testing.assert_close(logits[:, : number + 1], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(torch.stack(drafted), torch.stack(of_modules), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", ["gqa", "mla"])
def test_kernels_write_the_same_text(unrecorded, rounds, monkeypatch, variant):
    pytest.importorskip("triton")
    from hf_moe.kernels.decode import fused

    monkeypatch.setattr(decoding, "SPEEDUPS", [fused])
    model = tiny_model(num_mtp_layers=1, num_hidden_layers=1, mlp_layer_types=["dense"], **VARIANTS[variant])
    options = {"max_new_tokens": 4, **GREEDY, **inputs_of(1, "cpu", padding=2)}
    asked = model.generate(**options, **TOLD, use_mtp=True, disable_compile=True)
    out = model.generate(**options, **TOLD, use_mtp=True)
    assert torch.equal(out.sequences, asked.sequences) and counts(out) == counts(asked)
    assert rounds


def test_sampled_text_has_the_models_distribution(unrecorded, rounds):
    """Also of the likeliest tokens alone, which the host's processors leave, at one place or at all."""
    small = {"vocab_size": 4, "num_hidden_layers": 1, "mlp_layer_types": ["dense"], "initializer_range": 0.1}
    model, prompt, rows = tiny_model(num_mtp_layers=2, **small), torch.tensor([[1, 2]]), 3
    texts = torch.tensor(list(itertools.product(range(4), repeat=4)))
    with torch.no_grad():
        logits = model(torch.cat((prompt.expand(len(texts), -1), texts), dim=1)).logits[:, 1:5] / 0.7
    logits = logits.masked_fill(logits < logits.topk(3).values[..., -1:], -torch.inf)
    p = logits.log_softmax(-1).gather(-1, texts.unsqueeze(-1)).sum(dim=(1, 2)).exp()
    options = {"do_sample": True, "temperature": 0.7, "top_k": 3, "max_new_tokens": 8, "use_mtp": True, **TOLD}
    options |= {"input_ids": prompt.expand(rows, -1), "attention_mask": torch.ones(rows, 2, dtype=torch.long)}
    observed, accepted = torch.zeros(len(texts)), 0
    for _ in range(250):
        out = model.generate(**options)
        places = (out.sequences[:, 2:6] * torch.tensor([64, 16, 4, 1])).sum(dim=1)
        observed += torch.bincount(places, minlength=len(texts))
        accepted += out.accepted_tokens
    assert len(rounds) > 250 and accepted > 250
    possible = p > 0
    assert observed[~possible].sum() == 0 and chi_square_p_value(observed[possible], p[possible]) > 1e-3


@pytest.mark.gpu
def test_the_seed_decides_a_sampled_text():
    model = tiny_model(num_mtp_layers=2, vocab_size=31).cuda()
    options = {"do_sample": True, "max_new_tokens": 40, "use_mtp": True, **inputs_of(2, "cuda")}
    texts = []
    for seed in (1, 1, 2):  # the first records, too
        torch.manual_seed(seed)
        texts.append(model.generate(**options))
    assert type(KEPT[model].step) is RecordedRound
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["gqa", "mla", "v3-router"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_in_bf16_each_token_is_the_likeliest_or_nearly(rounds, variant, batch):
    """One way of products for few tokens, another for more; which may choose other experts than the eager model."""
    model, inputs = learned(2, **VARIANTS[variant]).cuda().to(torch.bfloat16), inputs_of(batch, "cuda")
    text = model.generate(**inputs, max_new_tokens=60, use_mtp=True, **GREEDY)
    assert rounds and type(KEPT[model].step) is RecordedRound
    with torch.no_grad():
        logits = model(text).logits[:, 6:-1].float()
    chosen = logits.gather(-1, text[:, 7:, None]).squeeze(-1)
    assert (logits.amax(-1) - chosen).mean() <= 0.02 * logits.abs().amax()


@pytest.mark.parametrize("options", [{}, {"use_mtp": True}], ids=["plain", "drafts"])
def test_a_model_is_not_kept_by_its_last_text(device, options):
    """Which it keeps, for the next one."""
    model = learned(1).to(device)
    model.generate(**options, max_new_tokens=20, **GREEDY, **inputs_of(1, device))
    assert KEPT[model].step is not None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_next_text_takes_the_same_round(three, device):
    model = three.to(device)
    KEPT.pop(model, None)
    options = {"use_mtp": True, **GREEDY, **inputs_of(2, device)}
    first = model.generate(**options, max_new_tokens=20)
    step = KEPT[model].step
    assert type(step) is RecordedRound
    other = inputs_of(2, device, seed=5)
    expected = model.generate(**GREEDY, **other, max_new_tokens=30, disable_compile=True)
    assert torch.equal(model.generate(**{**options, **other}, max_new_tokens=30), expected)
    assert torch.equal(model.generate(**options, max_new_tokens=20), first) and KEPT[model].step is step
    model.generate(**options, max_new_tokens=20, eos_token_id=3)  # the round knows the ends
    assert KEPT[model].step is not step
    plain = model.generate(**GREEDY, **inputs_of(2, device), max_new_tokens=20)  # and a step of one token is another
    assert torch.equal(plain, first) and torch.equal(model.generate(**options, max_new_tokens=20), first)
    longer = model.generate(**options, max_new_tokens=300)
    assert torch.equal(longer[:, :27], first)


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value.flatten())

    def end(self):
        self.tokens = torch.cat(self.tokens)


def test_a_text_is_streamed(three, device, rounds):
    heard = Heard()
    text = three.to(device).generate(**inputs_of(1, device), max_new_tokens=17, use_mtp=True, streamer=heard, **GREEDY)
    assert rounds and torch.equal(heard.tokens, text[0].cpu())


WATCHERS = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "output_scores": {"output_scores": True, **TOLD},
    "a criterion": {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1e6)])},
}


@pytest.mark.parametrize("options", WATCHERS.values(), ids=WATCHERS)
def test_what_sees_token_after_token_still_does(three, device, rounds, options):
    model, options = three.to(device), {"max_new_tokens": 20, **GREEDY, **inputs_of(2, device), **options}
    expected = model.generate(**options, disable_compile=True)
    out = model.generate(**options, use_mtp=True)
    assert not rounds
    if "output_scores" in options:
        expected, out = expected.sequences, out.sequences
    assert torch.equal(out, expected)


def test_a_prompt_shorter_than_the_modules_reach(unrecorded, rounds):
    model = mtp_model(4, vocab_size=31)
    for length in (1, 2, 3):
        ids = sequences(1, length)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 21, **GREEDY}
        expected = model.generate(ids, **options, disable_compile=True)
        assert torch.equal(model.generate(ids, **options, use_mtp=True), expected)
        assert bool(rounds) == (length == 3)


# ---- what a round is made of ----


def slowly_kept(tokens, same, unfinished, ends):
    """Place by place, row by row."""
    rows, places = tokens.shape
    unfinished, before = unfinished.tolist(), []
    for place in range(places):
        before.append(list(unfinished))
        rejected = any(unfinished[row] and not same[row, place] for row in range(rows))
        unfinished = [unfinished[row] and int(tokens[row, place]) not in ends for row in range(rows)]
        if rejected or not any(unfinished) or place == places - 1:
            return place + 1, torch.tensor(before).T, unfinished


def test_kept_equals_the_rule_written_out():
    numbers = set()
    for _ in range(300):
        tokens = torch.randint(0, 7, (3, 4))
        same = nn.functional.pad(torch.rand(3, 3) < 0.8, (0, 1))
        ends = torch.tensor([2, 5]) if torch.rand(()) < 0.7 else None
        unfinished = (torch.rand(3) < 0.8) | torch.tensor(ends is None)
        unfinished[torch.randint(0, 3, ())] = True
        number, before, after = kept(tokens, same, unfinished, ends)
        added, expected, left = slowly_kept(tokens, same, unfinished, [] if ends is None else [2, 5])
        assert int(number) + 1 == added and torch.equal(before[:, :added], expected)
        assert after[:, number].tolist() == left
        numbers.add(int(number))
    assert numbers == {0, 1, 2, 3}


def test_drawn_as_multinomial_draws():
    p = torch.rand(5, 31)
    torch.manual_seed(3)
    expected = torch.multinomial(p, num_samples=1).squeeze(1)
    torch.manual_seed(3)
    assert torch.equal(draw(p), expected)
    p[2, 7] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        draw(p)
