"""Guided decoding: only tokens that lead to a text of the grammar, and every such text can be reached."""

import json
import re

import pytest
import torch

pytest.importorskip("llguidance")
from hf_moe.generation.guided import GuidedLogitsProcessor, unpacked
from hf_moe.model import decoding
from tests.recordings import decode_on_cpu

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["frog", "fox"]},
    },
    "required": ["name", "legs", "kind"],
    "additionalProperties": False,
}


def texts_of(sequences, prompt_length, tokenizer):
    return [tokenizer.decode(row[prompt_length:], skip_special_tokens=True) for row in sequences]


@pytest.mark.parametrize("language", [["cat", "dog", "do", "the end."], ["", "aa", "aaaa"]], ids=["words", "empty"])
def test_the_allowed_tokens_spell_the_language_and_nothing_else(language, tokenizer):
    """By walking every way there is, for languages small enough to list."""
    written = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    guide = GuidedLogitsProcessor(tokenizer, regex="|".join(map(re.escape, language)))
    prompt, width = [5, 6, 7], len(tokenizer) + 3
    ways, reached = [[]], set()  # breadth first: the matcher takes back what it read for the way before
    while ways:
        way = ways.pop(0)
        beginning = "".join(written[token] for token in way)
        scores = guide(torch.tensor([prompt + way]), torch.zeros(1, width))[0]
        assert set(scores.tolist()) == {0.0, float("-inf")}
        allowed = torch.where(scores == 0)[0].tolist()
        assert (tokenizer.eos_token_id in allowed) == (beginning in language)
        for token in allowed:
            if token == tokenizer.eos_token_id:
                reached.add(beginning)
            else:
                assert token not in tokenizer.all_special_ids
                assert any(text.startswith(beginning + written[token]) for text in language)
                ways.append([*way, token])
    assert reached == set(language)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("json", {"do_sample": False}),
        ("regex", {"do_sample": True, "num_return_sequences": 2}),
        ("regex", {"do_sample": False, "num_beams": 3}),
        ("json", {"do_sample": True, "use_mtp": True}),
    ],
    ids=["greedy", "sampled", "beams", "drafts"],
)
def test_every_row_follows_the_grammar(kind, settings, model, tokenizer):
    grammar = {"json_schema": SCHEMA} if kind == "json" else {"regex": r"[a-c]{2,4}(-[0-9]+)?\."}
    prompts = tokenizer(["Once upon a time", "The end"], padding=True, padding_side="left", return_tensors="pt")
    guide = GuidedLogitsProcessor(tokenizer, **grammar)
    output = model.generate(**prompts, max_new_tokens=60, logits_processor=[guide], **settings)
    start = prompts.input_ids.shape[1]
    assert len(output) == 2 * settings.get("num_return_sequences", 1)
    for row, text in zip(output, texts_of(output, start, tokenizer), strict=True):
        new = row[start:].tolist()
        if not guide.follows(new):  # digits may go on: then the text was cut, but is a beginning
            assert len(new) == 60 and kind == "regex" and re.fullmatch(r"[a-c]{2,4}-[0-9]+", text)
        elif kind == "json":
            value = json.loads(text)
            assert list(value) == list(SCHEMA["properties"])
            assert len(value["name"]) <= 5 and value["legs"] in range(100) and value["kind"] in ("frog", "fox")
            assert text == json.dumps(value, ensure_ascii=False)
        else:
            assert re.fullmatch(grammar["regex"], text)


def test_drafts_don_t_change_the_guided_greedy_text(model, tokenizer):
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    plain, drafted = (
        model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=60,
            logits_processor=[GuidedLogitsProcessor(tokenizer, json_schema=json.dumps(SCHEMA))],
            **settings,
        )
        for settings in ({}, {"use_mtp": True})
    )
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize("count", [1, 8, 13, 64])
def test_bits_are_unpacked_from_the_lowest(count):
    bits = torch.randint(0, 256, (3, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = [[row[place // 8] >> (place % 8) & 1 for place in range(count)] for row in bits.tolist()]
    assert unpacked(bits, count).tolist() == torch.tensor(expected).bool().tolist()


def test_a_recorded_step_runs_beside_what_may_follow_it(model, tokenizer, monkeypatch):
    """The guide hears of a token before the step that reads it, and is asked after that has begun; the text stays."""
    prompts = tokenizer(["Once upon a time", "The end"], padding=True, padding_side="left", return_tensors="pt")
    happened, begin = [], decoding.EagerStep.__call__

    class Heard(GuidedLogitsProcessor):
        def chosen(self, input_ids):
            happened.append("told")
            super().chosen(input_ids)

        def __call__(self, input_ids, scores):
            happened.append("asked")
            return super().__call__(input_ids, scores)

    def written(**settings):
        settings |= {"logits_processor": [Heard(tokenizer, json_schema=SCHEMA)], "do_sample": False}
        return model.generate(**prompts, max_new_tokens=60, **settings)

    expected = written(disable_compile=True)
    assert set(happened) == {"asked"}
    happened.clear()
    monkeypatch.setattr(decoding.EagerStep, "__call__", lambda step, *x: happened.append("step") or begin(step, *x))
    decode_on_cpu(monkeypatch)
    assert torch.equal(written(), expected)
    steps = happened.count("step")
    assert steps > 5 and happened == ["asked", "told", *["step", "asked", "told"] * steps]


def test_what_it_was_told_is_what_follows(tokenizer):
    """A copy: what becomes of the ids meanwhile is not read."""
    letter = tokenizer("a", add_special_tokens=False).input_ids
    told, plain = (GuidedLogitsProcessor(tokenizer, regex="ab") for _ in range(2))
    ids, scores = torch.tensor([[5, *letter]]), torch.zeros(1, len(tokenizer))
    for guide in (told, plain):
        guide(ids[:, :1], scores)
    told.chosen(ids)
    expected = plain(ids, scores)
    ids.fill_(7)
    assert torch.equal(told(ids, scores), expected)
    with pytest.raises(ValueError, match="leaves the grammar"):  # other ids are not those that it was told
        told(ids.clone(), scores)


@pytest.mark.gpu
def test_what_may_follow_does_not_wait_for_the_device(tokenizer):
    letter = tokenizer("a", add_special_tokens=False).input_ids
    guide, plain = (GuidedLogitsProcessor(tokenizer, regex="ab") for _ in range(2))
    ids, scores = torch.tensor([[5, *letter]], device="cuda"), torch.zeros(1, len(tokenizer), device="cuda")
    for x in (guide, plain):
        x(ids[:, :1], scores)
    guide.chosen(ids)
    guide(ids, scores)  # kernels are loaded
    guide.chosen(ids)
    torch.cuda._sleep(10**9)  # about half a second in a step's place
    ended = torch.cuda.Event()
    ended.record()
    allowed = guide(ids, scores)
    assert not ended.query()
    assert torch.equal(allowed, plain(ids, scores))


def test_any_of_the_models_ends_ends_a_text(tokenizer):
    other = tokenizer("|", add_special_tokens=False).input_ids[-1]
    guide = GuidedLogitsProcessor(tokenizer, regex="a", eos_token_id=[tokenizer.eos_token_id, other])
    guide(torch.tensor([[5]]), torch.zeros(1, len(tokenizer)))
    letter = tokenizer("a", add_special_tokens=False).input_ids
    assert len(letter) == 1
    scores = guide(torch.tensor([[5, *letter]]), torch.zeros(1, len(tokenizer)))[0]
    assert set(torch.where(scores == 0)[0].tolist()) == {tokenizer.eos_token_id, other}
    assert guide.follows(letter) and guide.follows([*letter, other]) and not guide.follows([])
    # After the end the row is no longer the grammar's.
    assert (guide(torch.tensor([[5, *letter, other, 0]]), torch.zeros(1, len(tokenizer))) == 0).all()


def test_a_second_prompt_needs_a_second_processor(tokenizer):
    guide = GuidedLogitsProcessor(tokenizer, regex="[0-9]+")
    guide(torch.tensor([[5, 6]]), torch.zeros(1, len(tokenizer)))
    with pytest.raises(ValueError, match="token 1 after the prompt: each call of generate needs"):
        guide(torch.tensor([[5, 6, *tokenizer("xyz", add_special_tokens=False).input_ids]]), torch.zeros(1, 512))


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ({}, "either a JSON schema or a regular expression"),
        ({"regex": "a", "json_schema": {}}, "either a JSON schema or a regular expression"),
        ({"regex": "(?=a)b"}, r"expression '\(\?=a\)b' can't guide a text: .*look-ahead"),
        ({"json_schema": {"type": "objekt"}}, "JSON schema can't guide a text: Invalid type: objekt"),
        ({"json_schema": {"uniqueItems": True}}, "JSON schema can't guide a text: .*uniqueItems"),
    ],
    ids=["neither", "both", "look-ahead", "unknown-type", "unknown-key"],
)
def test_what_can_t_guide_is_refused(grammar, message, tokenizer):
    with pytest.raises(ValueError, match=message) as refused:
        GuidedLogitsProcessor(tokenizer, **grammar)
    assert "\n" not in str(refused.value)
