"""Models that become one, or read each other's ids, have tokenizers that mean the same by them."""

import shutil

import pytest
from hf_moe.conversion import upcycle, verify

from hf_moe.same_tokens import check_same_tokens

from ..training.conftest import remade, swapped, tiny_tokenizer
from .conftest import build

CHAT = (
    "{% for message in messages %}{% generation %}[{{ message['role'] }}] {{ message['content'] }}"
    "{% endgeneration %}{% endfor %}"
)
SAME_CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"


def tokenizer(**changes):
    made = tiny_tokenizer()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def more():
    made = tiny_tokenizer()
    made.add_tokens(["[PAD]"])
    return made


def lower():
    """The same ids, for letters that were made small first."""
    return remade(lambda said: said.update(normalizer={"type": "Lowercase"}))


OTHER = {
    "ids": (swapped, r"token (\d+) is 'a' in one, 'b' in two \(1 more differ\)"),
    "split": (lower, r"the tokenizers split a text in other ways: its token 0 is .'M'. in one, .'m'. in two"),
    "end": (lambda: tokenizer(eos_token="<s>"), r"eos_token is '</s>' \(2\) in one, '<s>' \(1\) in two"),
    "chat": (
        lambda: tokenizer(chat_template="{{ messages[0].content }}"),
        r"the chat template writes '\[user\] Hello",
    ),
}
ALIKE = {
    "padding": lambda: tokenizer(pad_token="</s>"),
    "marks": lambda: tokenizer(chat_template=SAME_CHAT),
    "no-template": tokenizer,
    "beyond": more,
}


def first():
    return tokenizer(chat_template=CHAT)


@pytest.mark.parametrize(("other", "message"), OTHER.values(), ids=OTHER)
def test_what_differs_is_named(other, message):
    with pytest.raises(ValueError, match=f"{message}.*: why") as error:
        check_same_tokens(first(), other(), ("one", "two"), 259, "why")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", ALIKE.values(), ids=ALIKE)
def test_what_means_the_same(other):
    check_same_tokens(first(), other(), ("one", "two"), 259, "why")


@pytest.fixture
def siblings(tmp_path):
    def make(*tokenizers):
        build("llama", vocab_size=259).save_pretrained(tmp_path / "s0")
        for index in range(1, len(tokenizers)):
            shutil.copytree(tmp_path / "s0", tmp_path / f"s{index}")
        folders = [tmp_path / f"s{index}" for index in range(len(tokenizers))]
        for folder, made in zip(folders, tokenizers, strict=True):
            if made is not None:
                made.save_pretrained(folder)
        return folders

    return make


def merge(folders, output, **options):
    upcycle(folders, output, experts=len(folders), top_k=1, strategy="merge", progress=False, verify=False, **options)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(("other", "message"), OTHER.values(), ids=OTHER)
def test_merge_refuses_siblings_that_read_otherwise(other, message, dry_run, siblings, tmp_path):
    folders = siblings(first(), first(), other())
    named = message.replace("in one", "in s0").replace("in two", "in s2")
    with pytest.raises(ValueError, match=f"{named}.*: experts are merged from siblings of one model") as error:
        merge(folders, tmp_path / "moe", dry_run=dry_run)
    assert "\n" not in str(error.value) and not (tmp_path / "moe").exists()


def test_merge_says_who_cannot_tell(siblings, tmp_path, capsys):
    merge(siblings(first(), None, tokenizer()), tmp_path / "moe")
    said = capsys.readouterr().err
    assert "s1: no tokenizer to compare" in said and "s1, s2: no chat template to compare" in said


def test_verify_refuses_other_ids_and_takes_other_chats(siblings):
    folders = siblings(first(), tokenizer(eos_token="<s>", chat_template="{{ messages[0].content }}"), swapped())
    assert verify(folders[0], folders[1])["max_abs_diff"] == 0
    with pytest.raises(ValueError, match=r"token .* is 'a' in .*s0, 'b' in .*s2 .*: a text is not the same to both"):
        verify(folders[0], folders[2])
