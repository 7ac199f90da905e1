"""People's own conversations, in every stage: their dialects, their files, and what is wrong with them by its row."""

import gzip
import json
import shutil

import fsspec
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hf_moe.training.data.chat_templates import TEMPLATES
from hf_moe.training.data.mixture import mix
from hf_moe.training.data.rows import load_rows
from hf_moe.training.data.sources import load_sources
from hf_moe.training.data.token_cache import cached
from hf_moe.training.data.tokens import Encoder
from hf_moe.training.main import main, parse
from hf_moe.training.stages import dpo, grpo
from hf_moe.training.trainers.sft_trainer import MoeSFTConfig, MoeSFTTrainer

from hf_moe.chat import plain, unread

from .conftest import MODELS, tiny_tokenizer, write_rows

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
OTHER = {"role": "assistant", "content": "No"}
TALK = [{"messages": [USER, ANSWER | {"content": "Ho" * size}]} for size in (1, 2, 3, 4)]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}{{ kind }}"
)
STAGES = ("sft", "distil", "dpo", "grpo")


def row_of(stage: str, talk: list[dict]) -> dict:
    """A row of a stage whose conversation is `talk`, which ends with an answer."""
    if stage == "dpo":
        return {"prompt": talk[:-1], "chosen": talk[-1:], "rejected": [OTHER]}
    return {"prompt": talk[:-1], "answer": "#### 1"} if stage == "grpo" else {"messages": talk}


def refused(stage, rows, model, tmp_path, *extra) -> str:
    """What a run says of `rows`, in one line, before it writes or loads anything: its model does not exist."""
    path = rows if isinstance(rows, str) else str(write_rows(tmp_path / f"{stage}.jsonl", rows))
    given = {"model_name_or_path": model, "train_data": path, "output_dir": tmp_path / "out"}
    given |= {"teacher_model_name_or_path": "absent"} if stage == "distil" else {}
    words = [str(word) for key, value in given.items() for word in (f"--{key}", value)]
    with pytest.raises(ValueError) as error:
        main([f"tiny/{stage}", *words, *extra])
    assert not (tmp_path / "out").exists() and "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A tokenizer and no model: what is refused must be refused before a model is looked for."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


# ---- dialects ----


@pytest.mark.parametrize(
    ("kinds", "row", "expected"),
    [
        (None, {"conversations": [("human", "Hi"), ("gpt", "Ho")]}, {"messages": [USER, ANSWER]}),
        (None, {"messages": [("human", "Hi"), ("gpt", "Ho")]}, {"messages": [USER, ANSWER]}),
        (
            None,
            {"prompt": [("human", "Hi")], "completion": [("gpt", "Ho")]},
            {"prompt": [USER], "completion": [ANSWER]},
        ),
        (grpo.COLUMNS, {"conversations": [("human", "Hi"), ("gpt", "Ho")]}, {"messages": [USER, ANSWER]}),
        (
            dpo.COLUMNS,
            {"prompt": [("human", "Hi")], "chosen": [("gpt", "Ho")], "rejected": [("bot", "No")]},
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        ),
    ],
    ids=["conversations", "messages", "completion", "grpo", "dpo"],
)
def test_sharegpt(tmp_path, kinds, row, expected):
    row = {name: [{"from": who, "value": what} for who, what in talk] for name, talk in row.items()}
    path = write_rows(tmp_path / "rows.jsonl", [row] * 3)
    rows = load_rows([str(path)], split="train", kinds=kinds)
    assert rows[:] == {name: [talk] * 3 for name, talk in expected.items()}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_sharegpt_with_calls(tmp_path, kind):
    """Where only a later row has calls, too, and with the row's number where they are not JSON."""
    talk = [("human", "Sum?"), ("function_call", '[{"name": "f", "arguments": {"a": 1.5}}]'), ("observation", "42")]
    talks = [[("human", "Hi"), ("gpt", "Ho")], [*talk, ("gpt", "Ho")], [("human", "Hi"), ("function_call", "f(1)")]]
    rows = [{"conversations": [{"from": who, "value": what} for who, what in talk]} for talk in talks]

    def load(rows):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        if kind == "parquet":
            Dataset.from_list(rows).to_parquet(path := tmp_path / "rows.parquet")
        return load_rows([str(path)], split="train")

    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1.5}}}
    called = [{"role": "user", "content": "Sum?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert load(rows[:2])["messages"] == [[USER, ANSWER], [*called, {"role": "tool", "content": "42"}, ANSWER]]
    with pytest.raises(ValueError, match="row 2: conversations: a function_call is not JSON"):
        load(rows)


LONG = [{"messages": [{"role": "user", "content": "a" * 1_000_000}, {"role": "assistant", "content": "Ho"}]}] * 11
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
LATER = {
    "parts": ([USER, ANSWER], [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER]),
    "calls": ([USER, CALLING], [USER, CALLING]),
    "number": ("row 11: messages: role and content must be text", [USER, {"role": "assistant", "content": 3}]),
    "text": ("row 11: messages: must be a list of messages, but is str", "Hi"),
}


@pytest.mark.parametrize(("expected", "later"), LATER.values(), ids=LATER)
def test_what_comes_after_the_part_of_a_file_that_settles_its_columns(tmp_path, expected, later):
    path = write_rows(tmp_path / "rows.jsonl", [*LONG, {"messages": later}])
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            load_rows([str(path)], split="train")
    else:
        assert load_rows([str(path)], split="train")[-1]["messages"] == expected


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", LONG)
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(ValueError, match=r"cannot be read as rows: .*rows.jsonl: line 12 is no JSON: Expecting"):
        load_rows([str(path)], split="train")


def test_a_package_that_reads_zstd_is_named(tmp_path, monkeypatch):
    monkeypatch.delitem(fsspec.compression.compr, "zstd", raising=False)
    (tmp_path / "rows.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(ValueError, match="Compression type zstd not supported: pip install zstandard"):
        load_rows([str(tmp_path / "rows.jsonl.zst")], split="train")


def test_conversations_of_role_and_content(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"conversations": [USER, ANSWER]}])
    assert load_rows([str(path)], split="train")[0] == {"messages": [USER, ANSWER]}


@pytest.mark.parametrize("stage", STAGES)
def test_role_that_nobody_knows(stage, tokenizer_folder, tmp_path):
    rows = [row_of(stage, [{"role": who, "content": "Hi"}, ANSWER]) for who in ("user", "narrator")]
    assert "row 1 has the role 'narrator', which is none of system, " in refused(
        stage, rows, tokenizer_folder, tmp_path
    )


def test_role_that_the_template_names(tmp_path):
    _, tokens = sft_tokens(
        tmp_path, [{"messages": [{"role": "critic", "content": "Hi"}, ANSWER]}], "{# 'critic' #}" + TEMPLATE
    )
    assert tokens == ["<critic>Hi<assistant>Ho"]


@pytest.mark.parametrize("stage", STAGES)
def test_parts_of_text_and_of_images(stage, tokenizer_folder, tmp_path):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    kinds = {"dpo": dpo.COLUMNS, "grpo": grpo.COLUMNS}.get(stage)
    talk = [{"role": "user", "content": parts}, ANSWER]
    path = write_rows(tmp_path / "rows.jsonl", [row_of(stage, [USER, ANSWER]), row_of(stage, talk)])
    rows = load_rows([str(path)], split="train", kinds=kinds)
    assert rows[1] == rows[0] == row_of(stage, [USER, ANSWER])
    image = [{"role": "user", "content": [*parts, {"type": "image", "url": "a.png"}]}, ANSWER]
    message = refused(stage, [row_of(stage, [USER, ANSWER]), row_of(stage, image)], tokenizer_folder, tmp_path)
    assert "row 1: " in message and "a content has a part of type image, but models here read text alone" in message


@pytest.mark.parametrize(("name", "values"), [("images", ([], ["a.png"])), ("audio", (None, "a.wav"))])
def test_column_of_what_is_no_text(name, values, tokenizer_folder, tmp_path):
    rows = [{"messages": [USER, ANSWER], name: value} for value in values]
    message = refused("sft", rows, tokenizer_folder, tmp_path)
    assert message.endswith(
        f"row 1 has a value in the column {name}, but models here read text alone: leave out such rows."
    )


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"weight": 0}, "an answer with weight 0"),
        ({"train": False}, "an answer with train False"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, "tool_calls"),
    ],
    ids=["weight", "train", "calls"],
)
def test_what_a_template_would_leave_out_of_an_answer(more, what, tokenizer_folder, tmp_path):
    """And a template that has the name reads it; SlimOrca's weight 0 of questions is what training does anyway."""
    rows = [{"messages": [USER | {"weight": 0}, ANSWER | {"weight": 1}]}, {"messages": [USER, ANSWER | more]}]
    message = refused("sft", rows, tokenizer_folder, tmp_path)
    assert f"row 1 has {what}, which the chat template does not read: leave out such rows, or give" in message
    assert unread(rows[1]["messages"], "{# " + " ".join(more) + " #}") is None


def test_columns_that_are_not_read_are_named(tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [USER, ANSWER], "system": "Be kind.", "id": 1}])
    load_rows([str(path)], split="train")
    assert f"train_data {path}: rows are messages; not read: system, id\n" in capsys.readouterr().err
    load_rows([str(write_rows(path, [{"messages": [USER, ANSWER], "tools": None}]))], split="train")
    assert "not read" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rows [1].jsonl", "a*b?.jsonl", "rows.JSONL"])
def test_names_of_files_are_no_patterns(name, tmp_path):
    write_rows(tmp_path / "ab.jsonl", [{"text": "other"}])
    rows = load_rows([str(write_rows(tmp_path / name, [{"text": "Hi"}]))], split="train")
    assert rows["text"][:] == ["Hi"]


def test_text_in_another_encoding(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"messages": [USER | {"content": "café"}, ANSWER]}
    path.write_bytes(json.dumps(row, ensure_ascii=False).encode("cp1252"))
    with pytest.raises(ValueError, match=r"rows.jsonl has text that is not UTF-8 \(.*\): save it as UTF-8"):
        load_rows([str(path)], split="train")


def test_folder_without_rows(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"train_data .*empty holds no files that end in .jsonl, .json"):
        load_rows([str(tmp_path / "empty")], split="train")


def test_pairs_of_texts_have_their_prompt_once(tokenizer_folder, tmp_path):
    pair = {"prompt": "Say ", "chosen": "Say yes", "rejected": "Say no"}
    once = dpo.with_prompts(Dataset.from_list([pair]), "train_data")
    assert once[:] == {"prompt": ["Say "], "chosen": ["yes"], "rejected": ["no"]}
    other = {"prompt": "y", "chosen": "yes", "rejected": "no"}  # by chance
    assert dpo.with_prompts(Dataset.from_list([pair, other]), "train_data")[:]["chosen"] == ["Say yes", "yes"]
    rows = [{"chosen": "Q: a", "rejected": "Q: b"}, {"question": "Q", "chosen": "a", "rejected": "b"}]
    message = refused("dpo", rows, tokenizer_folder, tmp_path)
    assert "row 1: chosen and rejected do not begin with the same text, the prompt: give it a column" in message


# ---- objects, whose keys Arrow mixes ----


def call(name: str, **arguments) -> dict:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def tool(name: str, **properties) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


TOOLS = [
    {
        "messages": [
            {"role": "user", "content": "42"},
            call("add", a=-0.3, b=2.5),
            {"role": "tool", "content": "2.2"},
        ],
        "tools": [tool("add", a={"type": "number"}), tool("say", text={"type": "string", "enum": ["x"]})],
    },
    {"messages": [USER, call("say", text="Ho"), call("stop")], "tools": [tool("stop")]},
    {"messages": [USER, ANSWER | {"name": "bot"}], "tools": None},
    {"messages": [USER, ANSWER], "tools": [tool("add", a={"type": "number"})]},
]


def as_parquet(rows, path):
    pq.write_table(pa.Table.from_pylist(rows), path / "rows.parquet")
    return path / "rows.parquet"


def as_arrow(rows, path):
    feather.write_feather(pa.Table.from_pylist(rows), path / "rows.arrow", compression="uncompressed")
    return path / "rows.arrow"


def as_saved(rows, path):
    Dataset.from_list(rows).save_to_disk(path / "rows")
    return path / "rows"


def as_json(rows, path):
    (path / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path / "rows.json"


def as_compressed(rows, path):
    with gzip.open(path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path / "rows.jsonl.gz"


FILES = {"parquet": as_parquet, "arrow": as_arrow, "saved": as_saved, "json": as_json, "compressed": as_compressed}
FILES["lines"] = lambda rows, path: write_rows(path / "rows.jsonl", rows)


def written(rows: list[dict], template: str = TEMPLATE) -> list[str]:
    """The template's text of rows as Python has them."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return [
        tokenizer.apply_chat_template(
            row["messages"], tools=row.get("tools"), tokenize=False, **(row.get("chat_template_kwargs") or {})
        )
        for row in rows
    ]


def sft_tokens(tmp_path, rows, template: str = TEMPLATE, file: str = "lines") -> tuple[MoeSFTTrainer, list[str]]:
    """What the trainer of sft learns from, as text."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    args = MoeSFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, max_length=None, report_to="none")
    found = load_rows([str(FILES[file](rows, tmp_path))], split="train")
    trainer = MoeSFTTrainer(model=MODELS["hf_moe"](), args=args, processing_class=tokenizer, train_dataset=found)
    return trainer, [tokenizer.decode(ids) for ids in trainer.train_dataset["input_ids"]]


@pytest.mark.parametrize("file", FILES)
def test_tools_and_calls_are_what_they_were_whatever_the_file(file, tmp_path):
    trainer, tokens = sft_tokens(tmp_path, TOOLS, file=file)
    assert isinstance(trainer.train_dataset, Dataset) and tokens == written(TOOLS)
    assert "null" not in "".join(tokens) and '{"a": -0.3, "b": 2.5}' in tokens[0]


def test_pairs_and_prompts_with_calls(tmp_path):
    talk = TOOLS[0]["messages"]
    pairs = [{"prompt": talk, "chosen": [ANSWER], "rejected": [call("stop", now=True)]}] * 2
    rows = load_rows([str(as_parquet(pairs, tmp_path))], split="train", kinds=dpo.COLUMNS)
    assert dpo.with_prompts(rows, "train_data")[1] == pairs[1]
    rows = load_rows([str(as_parquet(TOOLS, tmp_path))], split="train", kinds=grpo.COLUMNS)
    asked = grpo.questions(rows, [], "train_data")
    assert asked["prompt"][:] == [row["messages"][:-1] for row in TOOLS]


@pytest.mark.parametrize("file", ["lines", "json"])
def test_a_null_and_a_number_that_somebody_wrote_stay_in_json(file, tmp_path):
    rows = [
        {"messages": [USER, call("add", a=None, b=[None, 1.2345678901234567], c="{}")]},
        {"messages": [USER, call("add", a={"deep": None}, b=[], c="7")]},
    ]
    assert sft_tokens(tmp_path, rows, file=file)[1] == written(rows)


def test_texts_that_look_like_json_beside_parts(tmp_path):
    """`datasets` would make a number of 42 and an object of {}."""
    contents = ["42", '{"a": 1}', "null", "[1]", '"quoted"']
    rows = [{"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}, ANSWER]} for text in contents]
    rows += [{"messages": [{"role": "user", "content": text}, ANSWER]} for text in contents]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = load_rows([str(path)], split="train")["messages"]
    assert [talk[0]["content"] for talk in found] == contents * 2


def test_tools_as_text_and_variables_of_the_template(tmp_path):
    rows = [
        {"messages": [USER], "tools": json.dumps([tool("stop")]), "chat_template_kwargs": {"kind": "!"}},
        {"messages": [USER], "tools": None, "chat_template_kwargs": {"other": 1}},
        {"messages": [USER], "tools": None, "chat_template_kwargs": None},
    ]
    expected = written([row | {"tools": json.loads(row["tools"] or "null")} for row in rows])
    assert sft_tokens(tmp_path, rows)[1] == sft_tokens(tmp_path, rows, file="parquet")[1] == expected


def test_tools_that_are_not_json(tokenizer_folder, tmp_path):
    rows = [{"messages": [USER, ANSWER], "tools": "[]"}, {"messages": [USER, ANSWER], "tools": "[,"}]
    assert "row 1: tools is text that is not JSON" in refused("sft", rows, tokenizer_folder, tmp_path)


# ---- what a template does not take ----


@pytest.mark.parametrize("stage", STAGES)
def test_a_mistake_of_the_template_is_said_with_its_row(stage, tokenizer_folder, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content if m.content != 'Odd' else m.content + 1 }}{% generation %}"
        "{% endgeneration %}{% endfor %}",
        encoding="utf-8",
    )
    rows = [row_of(stage, [{"role": "user", "content": text}, ANSWER]) for text in ("Hi", "Hi", "Odd", "Odd")]
    message = refused(stage, rows, tokenizer_folder, tmp_path, "--chat_template_path", str(template))
    assert message.startswith("train_data: row 2: the chat template refuses a conversation (TypeError: can only con")


def test_a_mistake_in_one_of_several_processes():
    rows = Dataset.from_list([{"messages": [USER | {"content": str(number)}]} for number in range(40)])
    encoder = Encoder(
        tiny_tokenizer(), "{{ messages[0].content + (1 if messages[0].content == '31' else '') }}", False
    )
    with pytest.raises(ValueError, match=r"^train_data: row 31: the chat template refuses .*TypeError"):
        cached(rows, encoder, "train_data", 2)


@pytest.mark.parametrize("values", [("Hi", [USER]), ([USER], "Hi")], ids=["text-first", "messages-first"])
@pytest.mark.parametrize("stage", ["grpo", "dpo", "sft"])
def test_texts_among_messages(values, stage, tokenizer_folder, tmp_path):
    rest = {"grpo": {"answer": "#### 1"}, "dpo": {"chosen": "Ho", "rejected": "No"}, "sft": {"completion": "Ho"}}[
        stage
    ]
    if stage != "grpo" and isinstance(values[0], list):
        rest = {name: [ANSWER | {"content": text}] for name, text in rest.items()}
    message = refused(stage, [{"prompt": value} | rest for value in values], tokenizer_folder, tmp_path)
    first, second = ("text", "a list of messages") if isinstance(values[0], str) else ("a list of messages", "text")
    assert f"row 1 has {second} as its prompt, but the rows before it have {first}." in message


# ---- templates that are saved ----


def test_saved_folders_hold_plain_templates_and_are_trained_on(model_folder, tmp_path):
    """Also one that goes on from a checkpoint, and where TRL looks for the marks."""
    (tmp_path / "recipe.yaml").write_text("{use_cpu: true, bf16: false, report_to: none, assistant_only_loss: true}")
    tools = [row | {"tools": [tool("stop")]} for row in TALK]
    rows = {name: write_rows(tmp_path / f"{name}.jsonl", talk) for name, talk in (("plain", TALK), ("tools", tools))}

    def train(model, output, data="plain", *extra):
        given = {"model_name_or_path": model, "train_data": rows[data], "output_dir": tmp_path / output}
        given |= {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
        words = [str(word) for key, value in given.items() for word in (f"--{key}", value)]
        return main([str(tmp_path / "recipe.yaml"), *words, *extra])["train_loss"]

    marked = (TEMPLATES / "plain.jinja").read_text(encoding="utf-8")
    first = train(model_folder, "first", "plain", "--chat_template_path", "plain", "--ema_decay", "0.5")
    folders = [tmp_path / "first" / name for name in (".", "checkpoint-1", "checkpoint-2", "ema")]
    for folder in folders:
        assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == plain(marked) != marked
    shutil.copytree(tmp_path / "first" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    again = ["--resume_from_checkpoint", "true", "--chat_template_path", "plain", "--ema_decay", "0.5"]
    train(model_folder, "again", "plain", *again)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again")]
    assert weights[0] == weights[1]
    assert 0 < train(tmp_path / "first", "next") < first
    assert train(tmp_path / "first", "tools", "tools") > 0
    adapter = ["--lora_parts", "attention", "--lora_r", "2", "--lora_merge", "float32"]
    train(tmp_path / "first", "adapter", "plain", *adapter)
    for folder in (tmp_path / "next", tmp_path / "tools", tmp_path / "adapter", tmp_path / "adapter" / "merged"):
        assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == plain(marked)


# ---- layouts and files ----


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, ([USER], [ANSWER], [OTHER])),
        ({"prompt": "Hi", "chosen": [ANSWER], "rejected": [OTHER]}, ([USER], [ANSWER], [OTHER])),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, ([USER], [ANSWER], [OTHER])),
        ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, ([USER], [ANSWER], [OTHER])),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, ([USER], [ANSWER], [ANSWER])),
        ({"prompt": "Hi", "chosen": "Ho", "rejected": "No"}, ("Hi", "Ho", "No")),
    ],
    ids=["ultrafeedback", "answers-alone", "implicit", "repeated", "equal", "text"],
)
def test_pairs_of_every_layout(row, expected, tmp_path):
    path = as_parquet([row | {"score_chosen": 8.5, "messages": [USER, ANSWER]}] * 2, tmp_path)
    rows = dpo.with_prompts(load_rows([str(path)], split="train", kinds=dpo.COLUMNS), "train_data")
    assert rows[1] == dict(zip(("prompt", "chosen", "rejected"), expected, strict=True))


def test_pairs_without_a_prompt(tokenizer_folder, tmp_path):
    rows = [{"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, {"chosen": [ANSWER], "rejected": [OTHER]}]
    message = refused("dpo", rows, tokenizer_folder, tmp_path)
    assert message == "train_data: row 1: chosen and rejected do not begin with the same message, the prompt."
    rows = [{"prompt": [USER], "chosen": "Ho", "rejected": "No"}]
    assert "prompt is messages and chosen is text" in refused("dpo", rows, tokenizer_folder, tmp_path)


def test_ultrafeedback_trains(model_folder, tmp_path):
    rows = [{"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}] * 8
    given = {"model_name_or_path": model_folder, "train_data": as_parquet(rows, tmp_path), "max_steps": 1}
    given |= {"output_dir": tmp_path / "out", "per_device_train_batch_size": 2, "save_strategy": "no"}
    metrics = main(["tiny/dpo", *(str(word) for key, value in given.items() for word in (f"--{key}", value))])
    assert metrics["train_loss"] > 0


def test_folders_of_save_to_disk(tmp_path):
    parts = {name: Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    DatasetDict(parts).save_to_disk(tmp_path / "all")
    parts["test"].save_to_disk(tmp_path / "one")
    assert load_rows([str(tmp_path / "all")], split="test")[0] == {"text": "test"}
    assert load_rows([str(tmp_path / "one")], split="train")[0] == {"text": "test"}
    with pytest.raises(ValueError, match="has no split dev; its splits are train, test"):
        load_rows([str(tmp_path / "all")], split="dev")


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.csv.gz", "a.txt.gz", "a.ndjson", "a.json.gz", "a.jsonl.xz"])
def test_files_of_text(name, tmp_path):
    content = {"csv": "text\nHi\n", "txt": "Hi\n"}.get(name.split(".")[1], '{"text": "Hi"}\n')
    with fsspec.open(tmp_path / name, "wt", compression="infer") as file:
        file.write(content)
    assert load_rows([str(tmp_path / name)], split="train")[:] == {"text": ["Hi"]}


def test_mixed_sources_of_other_forms(tmp_path):
    """Plain rows beside some with tools: each as it was."""
    first = write_rows(tmp_path / "plain.jsonl", [{"messages": [USER, ANSWER]}] * 4)
    given = {"train_data": f"{first} {as_parquet(TOOLS, tmp_path)}", "train_weights": "1 1", "output_dir": "out"}
    words = [word for key, value in given.items() for word in (f"--{key}", *value.split())]
    _, data, args, *_ = parse(["tiny/sft", "--model_name_or_path", "absent", *words])
    rows = list(mix(load_sources(data, args)[0], [1, 1], 0))
    assert all(row in rows for row in [*TOOLS, {"messages": [USER, ANSWER], "tools": None}])
