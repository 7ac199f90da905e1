"""Reading texts: what is read, how it is cut, and what is refused."""

import copy
import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from hf_moe.telemetry.texts import Domain, named_sources
from hf_moe.texts import texts

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def as_lines(*rows):
    return "\n".join(map(json.dumps, rows))


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("a.txt", "one\ntwo\n", ["one\ntwo\n"]),
        ("a.jsonl", as_lines({"text": "one"}, {"text": "two"}) + "\n\n", ["one", "two"]),
        ("a.jsonl", as_lines({"prompt": "one ", "completion": "two"}), ["one two"]),
        ("a.json", json.dumps([{"text": "one"}, {"text": "two"}]), ["one", "two"]),
        ("a.csv", "id,text\n1,one\n2,two\n", ["one", "two"]),
    ],
    ids=["text", "jsonl", "prompt-completion", "json", "csv"],
)
def test_what_is_read(tmp_path, tokenizer, name, content, read):
    assert list(texts(write(tmp_path, name, content), tokenizer)) == read


def test_conversations_go_through_the_chat_template(tmp_path, tokenizer):
    path = write(tmp_path, "a.jsonl", as_lines({"messages": CHAT}))
    assert list(texts(path, tokenizer)) == [tokenizer.apply_chat_template(CHAT, tokenize=False)]


def talking(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_conversations_as_people_have_them(tmp_path, tokenizer):
    """ShareGPT's, parts of text, tool calls that Arrow has mixed; compressed, and saved to the disk."""
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": [{"type": "text", "text": "Ho"}]}]
    calls = [[{"role": "assistant", "content": "Ho", "tool_calls": [{"arguments": {x: 1}}]}] for x in ("a", "b")]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.tool_calls or '' }};{% endfor %}"
    )
    lines = gzip.compress(as_lines({"conversations": sharegpt}).encode())
    assert list(texts(write(tmp_path, "a.jsonl.gz", lines), tokenizer)) == ["user:Hi;assistant:Ho;"]
    assert list(texts(write(tmp_path, "a.txt.gz", gzip.compress(b"one")), tokenizer)) == ["one"]
    rows = Dataset.from_list([{"messages": talk} for talk in calls])
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "all")
    expected = [f"assistant:Ho[{{'arguments': {{'{x}': 1}}}}];" for x in ("a", "b")]
    for name in ("a.parquet", "one", "all"):
        assert list(texts(str(tmp_path / name), tokenizer)) == expected


def test_a_role_that_nobody_knows_is_one_line(tmp_path, tokenizer):
    tokenizer = talking(tokenizer, "{% for m in messages %}{{ m.role }}{% endfor %}")
    rows = ({"messages": CHAT}, {"messages": [{"role": "narrator", "content": ""}]})
    path = write(tmp_path, "a.jsonl", as_lines(*rows))
    with pytest.raises(
        ValueError, match=r"a.jsonl, row 2 has the role 'narrator', which is none of system, developer"
    ):
        list(texts(path, tokenizer))


def test_a_mistake_of_the_chat_template_is_one_line(tmp_path, tokenizer):
    tokenizer = talking(tokenizer, "{{ messages[0].content + 1 }}")
    with pytest.raises(ValueError, match=r"a.jsonl, row 1: the chat template refuses a conversation \(TypeError: can"):
        list(texts(write(tmp_path, "a.jsonl", as_lines({"messages": CHAT})), tokenizer))


def test_texts_in_memory(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    given = {"files": path, "more": str(path), "lists": ["one", {"text": "two"}, {"messages": CHAT}]}
    assert named_sources(given) == {"files": str(path), "more": str(path), "lists": given["lists"]}
    conversation = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert list(texts(given["lists"], tokenizer)) == ["one", "two", conversation]
    domain = Domain("lists", given["lists"], tokenizer, 16, None)
    assert domain.said == "lists (3 texts)" and domain.count(512).sum() > 10
    for rows, said in (([], r"empty \(0 texts\) holds no text"), (["one", 2], "Row 2 has the columns of no object")):
        with pytest.raises(ValueError, match=said):
            Domain("empty", rows, tokenizer, 16, None).count(512)


def test_parquet(tmp_path, tokenizer):
    Dataset.from_dict({"text": ["one", "two"]}).to_parquet(tmp_path / "a.parquet")
    assert list(texts(str(tmp_path / "a.parquet"), tokenizer)) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": ', "line 2 is no JSON"),
        ("a.jsonl", as_lines({"body": "one"}), "row 1 has the columns body; expected text, messages"),
        ("a.jsonl", "[1]", "row 1 has the columns of no object"),
        ("a.csv", "id,body\n1,one\n", "row 1 has the columns id, body"),
        ("a.json", "[{", "cannot be read as rows"),
        ("a.json", "", "a JSON file there is empty"),
        ("a.jsonl", as_lines({"messages": [1]}), "row 1: each entry needs role and content; found 1"),
        ("a.jsonl", as_lines({"messages": [{"text": "one"}]}), "row 1: each entry needs role and content"),
        ("a.jsonl", as_lines({"messages": [{"role": "user"}]}), "row 1: each entry needs role and content"),
        ("a.parquet", "no parquet", "cannot be read as rows"),
        ("a.txt", b"one \xff\xfe two", "is no text in UTF-8"),
        ("a.txt", " \n", "holds no text"),
        ("a.jsonl", as_lines({"text": ""}), "holds no text"),
        ("a.jsonl", as_lines({"text": None}), "row 1 has None in the column text, which is no text"),
    ],
    ids=[
        "cut",
        "column",
        "no-object",
        "csv-column",
        "json",
        "empty-json",
        "no-message",
        "no-role",
        "no-content",
        "parquet",
        "binary",
        "blank",
        "empty-rows",
        "null",
    ],
)
def test_broken_texts_are_refused_in_one_line(tmp_path, tokenizer, name, content, said):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=said) as error:
        Domain("a", path, tokenizer, 16, None).count(512)
    assert path in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["no/such/file.txt", "./nothing", "nothing", "name="])
def test_what_is_not_there(source, tokenizer):
    with pytest.raises(FileNotFoundError, match=source):
        list(texts(*named_sources([source]).values(), tokenizer))


def test_windows_stay_within_a_text_and_the_limit(tmp_path, tokenizer):
    rows = ["A dog ran far away.", "Hi.", "The cat sat on the mat and slept."]
    path = write(tmp_path, "a.jsonl", as_lines(*({"text": text} for text in rows)))
    whole = [tokenizer(text).input_ids for text in rows]
    windows = list(Domain("a", path, tokenizer, 7, None).windows())
    assert [token for ids in windows for token in ids] == [token for ids in whole for token in ids]
    assert windows == [ids[i : i + 7] for ids in whole for i in range(0, len(ids), 7)]
    limited = Domain("a", path, tokenizer, 7, 10)
    assert sum(map(len, limited.windows())) == 10 and int(limited.count(512).sum()) == 10
    batches = list(Domain("a", path, tokenizer, 7, None).batches(21))
    assert len(batches) > 1 and all(batch.ids.numel() <= 21 for batch in batches)
    rows = [row[mask.bool()].tolist() for ids, mask in batches for row, mask in zip(ids, mask, strict=True)]
    assert sorted(rows) == sorted(windows)


def test_names_of_domains(tmp_path):
    (tmp_path / "a=b.txt").write_text("x")
    assert named_sources(["x/a.txt", "y/a.txt", "b.jsonl"]) == {"x/a": "x/a.txt", "y/a": "y/a.txt", "b": "b.jsonl"}
    assert named_sources(["code=x/a.txt", "owner/name"]) == {"code": "x/a.txt", "name": "owner/name"}
    assert named_sources([str(tmp_path / "a=b.txt")]) == {"a=b": str(tmp_path / "a=b.txt")}


@pytest.mark.parametrize(
    ("data", "said"),
    [([], "no text to trace"), (["a.txt", "a.txt"], "given twice"), (["x=a.txt", "x=b.txt"], "called x")],
)
def test_names_that_clash(data, said):
    with pytest.raises(ValueError, match=said):
        named_sources(data)
