"""Tokens of conversations: those of Transformers and TRL, whoever tokenises; cached by content; never half a cache."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset
from hf_moe.training.data import tokens
from hf_moe.training.data.chat_templates import shipped_templates
from hf_moe.training.data.token_cache import cached, can_tokenise, tokenised
from hf_moe.training.data.tokens import Encoder
from hf_moe.training.trainers.sft_trainer import MoeSFTConfig
from tokenizers import Tokenizer
from tokenizers.normalizers import NFC
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .conftest import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TALK = [
    [("user", "Hi?"), ("assistant", "Ho."), ("user", "And?"), ("assistant", "No.")],
    [("system", "Kürze!"), ("user", "¿Qué? 😀"), ("assistant", "日本語 123  \n\t x")],
    [("user", "</s> <|im_end|> <|user|>"), ("assistant", "")],
    [("user", "  "), ("assistant", " leading and trailing ")],
]
ROWS = Dataset.from_list([{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in TALK])


def expected(tokenizer, template: str, rows: Dataset = ROWS) -> list[list[list[int]]]:
    """Ids and labels by Transformers, one row after the other."""
    answer = []
    for row in rows:
        out = tokenizer.apply_chat_template(
            row["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        pairs = zip(out["input_ids"], out["assistant_masks"], strict=True)
        answer.append([out["input_ids"], [token if marked else -100 for token, marked in pairs]])
    return answer


def lists(table) -> list[list[list[int]]]:
    return [list(pair) for pair in zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), strict=True)]


@pytest.mark.parametrize("fast", [True, False], ids=["tokie", "transformers"])
@pytest.mark.parametrize("name", shipped_templates())
def test_tokens_are_those_of_transformers(name, fast, monkeypatch):
    tokenizer, template = tiny_tokenizer(), Path(shipped_templates()[name]).read_text(encoding="utf-8")
    if fast:
        assert Encoder(tokenizer, template, True).agrees_with_transformers(ROWS)
        monkeypatch.setattr(Encoder, "with_transformers", None)
    assert lists(Encoder(tokenizer, template, True, fast)(ROWS.with_format("arrow")[:])) == expected(
        tokenizer, template
    )


def test_rows_that_are_normalised_are_left_to_transformers(monkeypatch):
    """A letter and its accent become one character, of fewer bytes, in one row of four."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = NFC()
    template = Path(shipped_templates()["deepseek_v2"]).read_text(encoding="utf-8")
    rows = ROWS.to_list()
    rows[2]["messages"][1]["content"] = "e\u0301"
    rows, slow = Dataset.from_list(rows), []
    encoder = Encoder(tokenizer, template, True)
    assert encoder.agrees_with_transformers(rows)
    found = Encoder.with_transformers
    monkeypatch.setattr(Encoder, "with_transformers", lambda self, pieces: slow.append(pieces) or found(self, pieces))
    assert lists(encoder(rows.with_format("arrow")[:])) == expected(tokenizer, template, rows)
    assert ["e\u0301" in "".join(row) for (row,) in slow] == [True]


def test_vocabulary_that_lacks_a_byte():
    """On which tokie may panic."""
    described = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    del described["model"]["vocab"]["ĉ"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), bos_token="<s>", eos_token="</s>"
    )
    assert not Encoder(tokenizer, "{{ messages[0]['content'] }}", False).agrees_with_transformers(ROWS)


def test_vocabulary_of_pieces_of_words(shared_data):
    """Not byte-level, so that no row's bytes add up."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260K-hf")
    template = Path(shipped_templates()["plain"]).read_text(encoding="utf-8")
    encoder = Encoder(tokenizer, template, True)
    assert not encoder.agrees_with_transformers(ROWS)
    assert lists(encoder(ROWS.with_format("arrow")[:])) == expected(tokenizer, template)


def talking(name: str = "plain"):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = Path(shipped_templates()[name]).read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture
def args(tmp_path):
    def arguments(**changes):
        given = {"max_length": 40, "assistant_only_loss": True}
        return MoeSFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, **given | changes)

    return arguments


@pytest.fixture
def counted(monkeypatch):
    """How many batches were tokenised."""
    calls, encode = [], Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, *given: calls.append(len(given[0])) or encode(self, *given))
    return calls


def test_cache_is_used_until_something_changes(args, counted):
    first = tokenised(ROWS, "rows", talking(), args(max_length=None))
    again = tokenised(Dataset.from_list(ROWS.to_list()), "rows", talking(), args(max_length=None))
    assert counted == [4] and again[:] == first[:] and again._fingerprint == first._fingerprint
    tokenised(ROWS, "rows", talking(), args(max_length=70))  # which the cache does not depend on
    assert counted == [4]
    changed = ROWS.to_list()
    changed[3]["messages"][1]["content"] += "!"
    larger = talking()
    larger.add_tokens(["Ho"])
    tokenised(Dataset.from_list(changed), "rows", talking(), args())
    tokenised(ROWS, "rows", larger, args())
    tokenised(ROWS, "rows", talking(), args(assistant_only_loss=False))
    tokenised(ROWS, "rows", talking("olmoe"), args())
    assert counted == [4] * 5


def test_disagreement_on_the_sample_leaves_it_to_transformers(args, monkeypatch, capsys):
    right = tokenised(ROWS, "rows", talking(), args(max_length=None))
    found = Encoder.with_tokie
    monkeypatch.setattr(
        Encoder, "with_tokie", lambda self, pieces: (found(self, pieces)[0] + 1, *found(self, pieces)[1:])
    )
    assert tokenised(ROWS, "rows", talking(), args(max_length=None))[:] == right[:]
    assert "rows: tokie does not read this tokenizer; Transformers tokenises, more slowly\n" in capsys.readouterr().err


# Two processes; all are killed in the middle of the second half, once the first is whole.
DRIVER = """
import os, signal, sys, time
from pathlib import Path
import datasets
from hf_moe.training.data.tokens import Encoder
from hf_moe.training.data.token_cache import cached
from tests.training.conftest import tiny_tokenizer
from tests.training.test_tokens import many

datasets.config.HF_DATASETS_CACHE = sys.argv[1]
encode = Encoder.__call__
def kill(self, table, rows):
    result = encode(self, table, rows)
    if "stop" in table["messages"].to_pylist()[-1][0]["content"]:
        while not list(Path(sys.argv[1]).glob("hf_moe/*_00000_of_00002.arrow")):
            time.sleep(0.01)
        os.killpg(0, signal.SIGKILL)
    return result
Encoder.__call__ = kill
cached(many(), Encoder(tiny_tokenizer(), open(sys.argv[2]).read(), True), "rows", 2)
"""


def many() -> Dataset:
    """4,000 rows, and the last of the third thousand says stop."""
    texts = [f"number {number}" + " stop" * (number == 2999) for number in range(4000)]
    return Dataset.from_list(
        [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]} for text in texts]
    )


def test_kill_in_the_middle_of_a_cache(tmp_path, monkeypatch):
    template = shipped_templates()["plain"]
    arguments = [sys.executable, "-c", DRIVER, str(tmp_path), template]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, timeout=120, start_new_session=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (part,) = (tmp_path / "hf_moe").glob("*_of_00002.arrow")
    written = part.stat().st_mtime_ns
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    encoder = Encoder(tiny_tokenizer(), Path(template).read_text(encoding="utf-8"), True)
    whole = encoder(many().with_format("arrow")[:])
    assert cached(many(), encoder, "rows", 2).with_format("arrow")[:].equals(whole)
    assert part.stat().st_mtime_ns == written


def test_what_is_left_to_trl(args):
    tokenizer = tiny_tokenizer()
    assert can_tokenise([ROWS], tokenizer, args())
    for row in (
        {"text": "Hi"},
        {"prompt": "Hi", "completion": "Ho"},
        {"messages": [{"role": "user", "content": "Hi", "tool_calls": [1]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        {"messages": ROWS[0]["messages"], "tools": "[]"},
    ):
        assert not can_tokenise([ROWS, Dataset.from_list([row])], tokenizer, args()), row
    assert not can_tokenise([ROWS], tokenizer, args(chat_template_path="owner/tokenizer"))


@pytest.mark.parametrize(
    ("template", "talk", "reason"),
    [
        ("mixtral", [("user", "a"), ("user", "b")], "user and assistant in turn"),
        ("plain", [("user", None), ("assistant", "b")], "NoneType"),
    ],
    ids=["refused", "no-content"],
)
def test_conversation_that_the_template_refuses(args, template, talk, reason):
    rows = Dataset.from_list([{"messages": [{"role": who, "content": what} for who, what in talk]}])
    rows = rows.cast(ROWS.features)
    with pytest.raises(
        ValueError, match=rf"^rows: row 0: the chat template refuses .*\(.*{reason}.*\), so .*: \[\{{'role'"
    ) as error:
        tokenised(rows, "rows", talking(template), args())
    assert "\n" not in str(error.value)


def test_spans_are_the_odd_pieces_that_are_not_empty():
    assert tokens.spans([3, 2, 4, 0, 1, 5]) == [(3, 5), (10, 15)]
    assert np.array_equal(tokens.spans([7]), [])
