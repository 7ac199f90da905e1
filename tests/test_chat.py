"""Conversations in one form, and chat templates that any Jinja engine reads and that write the same text."""

from importlib.util import find_spec
from pathlib import Path

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from hf_moe.chat import conversation, marked, plain, render, unknown_role, write_plain_templates

from .training.conftest import tiny_tokenizer

ROOT = Path(__file__).parents[1]
TEMPLATES = ROOT / "training" / "data" / "templates"
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"from": "human", "value": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"from": "gpt", "value": "Hi"}, {"role": "assistant", "content": "Hi"}),
        ({"from": "ChatGPT", "value": "Hi"}, {"role": "assistant", "content": "Hi"}),
        ({"from": "system", "value": "Hi", "weight": 1.0}, {"role": "system", "content": "Hi", "weight": 1.0}),
        ({"from": "tool", "value": "42"}, {"role": "tool", "content": "42"}),
        ({"role": "Human", "content": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"role": "Critic", "content": "Hi"}, {"role": "Critic", "content": "Hi"}),
        ({"role": "user", "content": "Hi", "tool_calls": None}, {"role": "user", "content": "Hi"}),
        ({"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, "Hi"),
        ({"role": "user", "content": ["H", {"text": "i", "image": None}]}, "Hi"),
        ({"from": "observation", "value": "42"}, {"role": "tool", "content": "42"}),
        ({"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'}, CALL | {"content": ""}),
        ({"role": "tool_call", "content": {"name": "f", "arguments": {"a": 1}}}, CALL | {"content": ""}),
        (CALL, CALL),
        (CALL | {"content": None}, CALL | {"content": None}),
    ],
    ids=str,
)
def test_message(entry, expected):
    if isinstance(expected, str):
        expected = {"role": "user", "content": expected}
    assert conversation([entry]) == [expected]


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ("Hi", "must be a list of messages, but is str"),
        (["Hi"], "needs role and content; found 'Hi'"),
        ([{"role": "user"}], "needs role and content; found"),
        ([{"from": "human", "value": None}], "needs from and value; found"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "needs role and content; found"),
        ([{"from": "function_call", "value": "f(1)"}], r"a function_call is not JSON \(Expecting value: .*'f\(1\)'"),
        ([{"from": "function_call", "value": "[]"}], r"a function_call needs name and arguments, .*found '\[\]'"),
        ([{"from": "tool_call", "value": '{"name": "f"}'}], "a tool_call needs name and arguments, or a list of such"),
        ([{"role": 1, "content": "Hi"}], "role and content must be text"),
        ([{"role": "tool", "content": {"a": 1}}], "role and content must be text"),
        ([{"role": "user", "content": [{"type": "image", "url": "a.png"}]}], "a part of type image, but models here"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "a part of type input_audio"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a part without text: {'type': 'text'}"),
        ([{"role": "user", "content": [3]}], "a part without text: 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_message(entries, reason):
    with pytest.raises(ValueError, match=reason) as error:
        conversation(entries)
    assert "\n" not in str(error.value)


def test_roles_are_those_of_chat_templates_or_of_this_one():
    talk = [{"role": role, "content": ""} for role in ("system", "user", "tool", "critic")]
    assert unknown_role(talk, "{{ messages }}") == "critic"
    assert unknown_role(talk, "{% if message['role'] == 'critic' %}") is None
    assert unknown_role(talk, "criticism 'critics'") == "critic"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0].content + 1 }}", r"TypeError: can only concatenate str \(not \"int\"\) to str"),
        ("{{ messages[0].name.first }}", "'dict object' has no attribute 'name'"),
        ("{{ messages[0].items(3) }}", "TypeError: .*takes"),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{{ raise_exception('not\\nthis') }}", r"refuses a conversation \(not this\)"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[9].content | tojson }}", "TypeError|no element 9"),
    ],
)
def test_whatever_a_template_raises_is_one_line(template, reason):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=reason) as error:
        render(tokenizer, [{"role": "user", "content": "Hi"}], "rows: row 7")
    assert str(error.value).startswith("rows: row 7: the chat template refuses a conversation (")
    assert str(error.value).endswith("[{'role': 'user', 'content': 'Hi'}]") and "\n" not in str(error.value)


MARKED = sorted(
    path for folder in (TEMPLATES, ROOT / "hf_moe" / "demo" / "storyteller") for path in folder.glob("*.jinja")
)
# Those of TRL that take a text for a content.
TRL = sorted((Path(find_spec("trl").origin).parent / "chat_templates").glob("*_training.jinja"))
FOR_TRAINING = [path for path in TRL if not path.stem.startswith("llava")]
TALK = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": " Ho.\n"}]


@pytest.mark.parametrize("path", [*MARKED, *FOR_TRAINING], ids=lambda path: path.stem)
def test_plain_template_writes_the_same_text_in_any_engine(path):
    """Jinja itself, which knows no {% generation %}, reads it; marks come back where they were."""
    template = path.read_text(encoding="utf-8")
    tokenizer = tiny_tokenizer()
    written = []
    for text in (template, plain(template), marked(plain(template))):
        tokenizer.chat_template = text
        asked = render(tokenizer, TALK[:1], "row 0", add_generation_prompt=True)
        mask = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
        written.append((asked, render(tokenizer, TALK, "row 0"), mask["assistant_masks"]))
    first, second, third = written
    assert first[0] and first[:2] == second[:2] and first == third and any(first[2]) and not any(second[2])
    assert "generation %}" not in plain(template).replace("add_generation", "") and plain(template) != template
    assert plain(marked(plain(template))) == plain(template)
    engine = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    engine.parse(plain(template))
    with pytest.raises(jinja2.TemplateSyntaxError, match="generation"):
        engine.parse(template)


def test_every_file_that_holds_a_template_is_made_plain(tmp_path):
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    text = (TEMPLATES / "plain.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = {"default": text, "tool_use": text + "{# tools #}"}
    tokenizer.save_pretrained(tmp_path / "new")
    tokenizer.save_pretrained(tmp_path / "old", save_jinja_files=False)
    for name, files in (("new", {"chat_template.jinja", "tool_use.jinja"}), ("old", {"tokenizer_config.json"})):
        folder = tmp_path / name
        paths = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.name for path in paths if "generation -%}" in path.read_text(encoding="utf-8")} == files
        write_plain_templates(folder)
        assert not any("generation -%}" in path.read_text(encoding="utf-8") for path in paths)
        loaded = PreTrainedTokenizerFast.from_pretrained(folder)
        assert marked(loaded.chat_template["tool_use"]) == tokenizer.chat_template["tool_use"]
        assert len(list(folder.rglob("*"))) == len(paths) + sum(path.parent != folder for path in paths)
