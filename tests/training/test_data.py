import pytest
from datasets import Dataset
from hf_moe.training.data.rows import is_conversational, load_rows

from .conftest import write_rows

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
KINDS = {
    "messages": ({"messages": MESSAGES}, True),
    "conversations": ({"conversations": SHAREGPT}, True),
    "prompt-completion": ({"prompt": "Hi", "completion": "Ho"}, False),
    "prompt-completion-messages": ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, True),
    "text": ({"text": "Hi Ho"}, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_the_columns_that_trl_reads(tmp_path, kind):
    row, conversational = KINDS[kind]
    path = write_rows(tmp_path / "rows.jsonl", [row | {"id": "a", "source": "b"}] * 3)
    rows = load_rows([str(path)], split="train")
    assert (len(rows), rows[2]) == (3, {"messages": MESSAGES} if kind == "conversations" else row)
    assert is_conversational(rows) == conversational


def test_messages_come_before_a_prompt_without_completion(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hi", "messages": MESSAGES, "tools": "[]"}])
    assert load_rows([str(path)], split="train").column_names == ["messages", "tools"]


def test_message_of_a_tool_call_needs_no_content(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [MESSAGES[0], call, MESSAGES[1]]}])
    assert load_rows([str(path)], split="train")[0]["messages"][2] == MESSAGES[1]


def test_own_text_field(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"body": "Hi"}])
    assert load_rows([str(path)], split="train", text_field="body")[0] == {"body": "Hi"}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_several_files(tmp_path, suffix):
    for name in ("a", "b"):
        rows = Dataset.from_list([{"text": name}] * 3)
        write = rows.to_parquet if suffix == "parquet" else rows.to_json
        write(tmp_path / f"{name}.{suffix}")
    rows = load_rows([str(tmp_path / f"{name}.{suffix}") for name in ("a", "b")], split="train")
    assert rows["text"][:] == ["a"] * 3 + ["b"] * 3


def test_folder_has_splits(data_folder):
    assert len(load_rows([str(data_folder)], split="train")) == 41
    assert len(load_rows([str(data_folder)], split="validation")) == 7
    with pytest.raises(ValueError, match="has no split dev; its splits are train, validation"):
        load_rows([str(data_folder)], split="dev")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a", "answer": "b"}], "has the columns question, answer; expected messages or .*or text"),
        ([{"prompt": "a"}], "has the columns prompt; expected"),
        ([{"text": "a"}, {"text": None}], "row 1 has no text"),
        ([{"text": "a"}, {"id": 3}], "row 1 has no text"),
        ([{"messages": MESSAGES}, {"messages": []}], "row 1 has no messages"),
        ([{"messages": []}, {"messages": MESSAGES}], "row 0 has no messages"),
        ([{"messages": ["Hi"]}], "row 0: messages: each entry needs role and content; found 'Hi'"),
        ([{"messages": MESSAGES}, {"messages": [{"role": "user"}]}], "row 1: messages: each entry needs role and con"),
        ([{"messages": "Hi"}], "messages must be a list of messages, but is str"),
        ([{"text": 3}], "text must be text or a list of messages, but is int"),
        (
            [{"messages": MESSAGES}, {"messages": [{"content": "Hi"}]}],
            "needs role and content; found .'content': 'Hi'",
        ),
        (
            [{"messages": MESSAGES}, {"messages": [MESSAGES[0], {"role": "assistant", "content": 3}]}],
            "must be text; .*3",
        ),
        (
            [{"messages": [MESSAGES[0], {"role": None, "content": "Ho"}]}],
            "row 0: .*needs role and content; found .'content': 'Ho'",
        ),
        *(
            ([{"messages": [*before, {"role": role, "content": "Ho"}]}], f"row 0: messages: .* found .*{role}")
            for role in (3, 0.5, True, ["user"], {"name": "user"})
            for before in ([], MESSAGES)
        ),
        ([{"prompt": "Hi", "completion": MESSAGES[1:]}], "prompt is text and completion is messages, but all must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_that_trl_cannot_read(tmp_path, rows, message):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message) as error:
        load_rows([str(path)], split="train", what="eval_data")
    assert str(error.value).startswith(f"eval_data {path}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"not json\n", "cannot be read as rows"), (b"\xff\xfe\x00", "cannot be read as rows")],
    ids=["empty", "text", "binary"],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.xz"])
def test_file_without_rows(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_rows([str(tmp_path / name)], split="train")
    assert "\n" not in str(error.value)


def test_data_set_without_rows(tmp_path):
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"cannot be read as rows: .*no data"):
        load_rows([str(tmp_path / "rows.parquet")], split="train")


def test_absent_and_mixed_files(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    (tmp_path / "rows.xls").write_text("text\na\n")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent.jsonl"):
        load_rows([str(tmp_path / "absent.jsonl")], split="train")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_rows([str(rows), str(tmp_path)], split="train")
    with pytest.raises(ValueError, match=r"must all end in one of .jsonl, .json, .*, but end in \['.xls'\]"):
        load_rows([str(tmp_path / "rows.xls")], split="train")


def test_hub_data_set(monkeypatch):
    """A name that is no path goes to the Hub as it is, with its configuration."""
    asked = []

    def load_dataset(*args):
        asked.append(args)
        return {"train_sft": Dataset.from_list([{"messages": MESSAGES}])}

    monkeypatch.setattr("hf_moe.training.data.rows.load_dataset", load_dataset)
    rows = load_rows(["owner/name"], split="train_sft", config="en")
    assert asked == [("owner/name", "en")] and rows[0] == {"messages": MESSAGES}


def test_absent_folder_or_hub_data_set(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="owner/absent") as error:
        load_rows(["owner/absent"], split="train")
    assert "\n" not in str(error.value)
