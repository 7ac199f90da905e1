"""The page of messages says them as the code does: each is provoked here, or stands in the source."""

import ast
import io
import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import typer
from hf_moe.conversion import upcycle
from hf_moe.conversion.verify import check_memory, unusable
from hf_moe.training.output.saving import check_room
from hf_moe.training.trainers.refusals import check_finite
from hf_moe_cli import main
from hf_moe_cli.convert import finish
from hf_moe_cli.errors import one_line
from transformers import GenerationConfig

from hf_moe.demo import DEMO_MODEL
from hf_moe.generation_settings import mend_generation_config
from hf_moe.model import host
from tests.docs.conftest import DOCS

ROOT = DOCS.parent
PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^```text\n(.+)\n```$", PAGE, flags=re.MULTILINE)
HOLE = "\0"  # what differs each time, in a message of the source


def pattern(entry: str) -> str:
    """What an entry of the page matches: `<...>` is at least one character."""
    return ".+".join(re.escape(part) for part in re.split(r"<[^<>]+>", entry))


def entries_of(message: str) -> list[str]:
    """The entries that say what `hf-moe` printed, one line."""
    return [entry for entry in ENTRIES if re.fullmatch(pattern(entry), message)]


# ---- messages of the commands ----

ASK, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A fox."}
ROWS = {
    "chats": {"messages": [ASK, ANSWER]},
    "columns": {"instruction": "a", "output": "b"},
    "roles": {"messages": [ASK, {"role": "narrator", "content": "A fox."}]},
    "images": {"messages": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}, ANSWER]},
    "questions": {"messages": [ASK]},
    "texts": {"text": "Once upon a time."},
}
SFT = "train tiny/sft --model_name_or_path dense --output_dir new --train_data"
RESUMED = "--resume_from_checkpoint true --output_dir"
EXPERTS = "--experts 4 --top-k 2"
# What is typed in the folder that `work` makes. Each is one line of the page, and none reads a weight.
COMMANDS = {
    "columns": f"{SFT} columns.jsonl",
    "role": f"{SFT} roles.jsonl",
    "part": f"{SFT} images.jsonl",
    "template": f"{SFT} chats.jsonl --chat_template_path strict.jinja",
    "no-template": f"{SFT} chats.jsonl --model_name_or_path untold --chat_template_path null",
    "no-marks": f"{SFT} chats.jsonl --chat_template_path unmarked.jinja --assistant_only_loss true",
    "long-row": f"{SFT} chats.jsonl --max_length 8 --on_long_rows error",
    "nothing-learnt": f"{SFT} questions.jsonl --assistant_only_loss true",
    "not-empty": f"{SFT} chats.jsonl --output_dir full",
    "no-checkpoint": f"{SFT} chats.jsonl {RESUMED} full",
    "checkpoint": f"{SFT} chats.jsonl {RESUMED} begun --learning_rate 0.5",
    "unknown-argument": f"{SFT} chats.jsonl --learning_rat 0.5",
    "offloading": f"{SFT} chats.jsonl --activation_offloading true",
    "from-scratch": "train tiny/pretrain --model_name_or_path dense --output_dir new --train_data texts.jsonl",
    "generation-config": f"upcycle ungenerated new {EXPERTS}",
    "pad": f"upcycle padded new {EXPERTS} --dry-run",
    "folder": f"upcycle dense full {EXPERTS}",
    "unfinished": f"upcycle dense stopped {EXPERTS}",
    "family": "import unread new",
    "network": f"upcycle unread new {EXPERTS}",
    "field": f"upcycle carried new {EXPERTS}",
    "cannot-hold": "export moe new --to olmoe",
    "adapter": f"upcycle adapter new {EXPERTS}",
    "tokens": "verify dense swapped",
    "dense": "trace dense --data texts.jsonl --out new",
    "no-model": "generate nobody/nothing --prompt a",
    "code": "generate coded --prompt a",
}


# ---- messages of functions ----


def no_package() -> None:
    raise ModuleNotFoundError(name="trl")


def newer_host() -> None:
    with mock.patch.object(host, "differences", return_value=["Cache.update is gone"]):
        host.check_version("6.0.0")


def said(text: str) -> None:
    raise ValueError(text)


FUNCTIONS = {
    "flags": lambda: said(mend_generation_config(GenerationConfig(temperature=0.5), 512)),
    "logits": lambda: finish({"max_abs_diff": 0.5}, False),
    "loss": lambda: check_finite([torch.tensor(1.0), torch.tensor(float("nan"))], 3),
    "memory": lambda: check_memory(10**18),
    "newer-host": newer_host,
    "no-package": no_package,
    "older-host": lambda: host.check_version("5.0.0"),
    "room": lambda: check_room(ROOT, 10**18, None),
    "unusable": lambda: said(unusable({"kl": 1.0, "top1_agreement": 0.5})),
    "with-a-cache": lambda: finish({"cached_text_equal": False, "cache_max_abs_diff": 0.5}, False),
}


def remade(name: str, **changes) -> None:
    """The demo's dense model in a folder `name`, with these changes of its config.json."""
    shutil.copytree(DEMO_MODEL, name)
    config = Path(name, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with inputs that are each wrong in one way."""
    folder = tmp_path_factory.mktemp("messages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, row in ROWS.items():
            Path(f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        Path("unmarked.jinja").write_text("{{ messages[-1].content }}", encoding="utf-8")
        Path("strict.jinja").write_text("{{ raise_exception('only a system message') }}", encoding="utf-8")
        for name in ("dense", "untold", "ungenerated", "swapped"):
            remade(name)
        remade("padded", pad_token_id=512)
        remade("unread", model_type="mamba")
        remade("carried", model_type="phi3", resid_pdrop=0.1)
        remade("coded", model_type="own", auto_map={"AutoConfig": "configuration.Config"})
        Path("coded", "configuration.py").touch()
        Path("untold", "chat_template.jinja").unlink()
        Path("ungenerated", "generation_config.json").write_text("[]", encoding="utf-8")
        tokenizer = Path("swapped", "tokenizer.json")
        words = json.loads(tokenizer.read_text(encoding="utf-8"))
        vocab = words["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        tokenizer.write_text(json.dumps(words), encoding="utf-8")
        upcycle("dense", "moe", experts=4, top_k=2, verify=False, progress=False)
        for name in ("full", "adapter", ".stopped.partial", "begun/checkpoint-1"):
            Path(name).mkdir(parents=True)
        Path(".stopped.partial.jsonl").touch()
        Path("full", "notes").touch()
        Path("adapter", "adapter_config.json").write_text("{}", encoding="utf-8")
        for name, text in {"trainer_state.json": "{}", "run.json": '{"arguments": {"seed": 7}}'}.items():
            Path("begun", "checkpoint-1", name).write_text(text, encoding="utf-8")
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.save({}, Path("begun", "checkpoint-1", name))
        yield folder


@pytest.fixture(scope="module")
def printed(work):
    """Of each of COMMANDS and FUNCTIONS, the last line on the standard error without the program's name."""
    found = {}
    runs = {name: partial(main, words.split()) for name, words in COMMANDS.items()} | FUNCTIONS
    for name, run in runs.items():
        with redirect_stderr(io.StringIO()) as error, redirect_stdout(io.StringIO()):
            try:
                run()
            except typer.Exit:
                pass
            except (ValueError, OSError, ImportError) as cause:
                print(one_line(cause), file=error)
        found[name] = error.getvalue().splitlines()[-1].removeprefix("hf-moe: ")
    return found


# ---- the page ----


@pytest.mark.parametrize("name", [*COMMANDS, *FUNCTIONS])
def test_what_is_printed_is_an_entry_of_the_page(name, printed):
    assert len(entries_of(printed[name])) == 1, printed[name]


def test_what_is_refused_leaves_nothing_behind(printed, work):
    assert not Path(work, "new").exists()


def messages_in_the_source() -> set[str]:
    """All strings of the package's source, with HOLE for what is put into them."""
    found = set()
    for folder in ("hf_moe", "conversion", "training", "cli"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
                    found.add("".join(parts))
    return found


def test_each_entry_is_printed_once_here_or_stands_in_the_source(printed):
    assert len(ENTRIES) == len(set(ENTRIES)) == PAGE.count("```text\n")
    entries = [entry for line in printed.values() for entry in entries_of(line)]
    assert len(entries) == len(set(entries)) > len(ENTRIES) / 2
    source = messages_in_the_source()
    for entry in set(ENTRIES) - set(entries):
        assert any(re.fullmatch(pattern(entry), text) for text in source), entry
