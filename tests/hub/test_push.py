"""`hf-moe push` to a Hub on loopback, through the real client: what arrives loads, what fails says so in one line."""

import errno
import hashlib
import json
import logging
import pickle
import shutil
import warnings

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard

from hf_moe.hub import push
from hf_moe.hub.redaction import redacted_messages
from tests.conftest import tokens

from .server import TOKEN, Refusal

REPO = "tester/model"


def test_what_was_pushed_loads_elsewhere_with_the_same_logits(hub, command, folder, model, logits_from_hub):
    code, out, err = command("push", folder, REPO, "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["private"], report["url"]) == (True, f"{hub.url}/{REPO}")
    assert hub.repos[REPO].private
    sent = hub.files(REPO)
    assert sent.keys() - {".gitattributes"} == report["files"].keys()
    assert {name: len(sent[name]) for name in report["files"]} == report["files"]
    card = ModelCard((folder / "README.md").read_text())
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in card.text
    assert sent["README.md"] == (folder / "README.md").read_bytes()
    # The same weights, which lie otherwise in another process's memory: other kernels.
    torch.testing.assert_close(logits_from_hub(REPO), model(tokens(vocab_size=259)).logits, rtol=1e-4, atol=1e-5)
    assert TOKEN not in out + err


def test_a_dry_run_says_all_and_touches_nothing(hub, command, folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    report = json.loads(command("push", folder, REPO, "--dry-run", "--json").out)
    assert hub.requests == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    out = command("push", folder, REPO, "--dry-run").out
    assert f"{report['bytes']:,}  in {len(report['files'])} files" in out
    real = json.loads(command("push", folder, REPO, "--json").out)
    assert real["files"] == report["files"]


def test_templates_are_sent_without_the_marks_of_training(hub, command, folder):
    """Of a folder that an earlier release saved, and of a checkpoint in it."""
    marked = "{% generation %}{{ messages }}{% endgeneration %}"
    (folder / "chat_template.jinja").write_text(marked)
    shutil.copytree(folder, folder / "merged")
    json.loads(command("push", folder, REPO, "--dry-run", "--json").out)
    assert (folder / "chat_template.jinja").read_text() == marked
    json.loads(command("push", folder, REPO, "--json").out)
    names = [name for name in hub.files(REPO) if name.endswith("chat_template.jinja")]
    assert "chat_template.jinja" in names
    for name in names:
        assert hub.files(REPO)[name] == b"{# generation #}{{ messages }}{# endgeneration #}"


def test_after_an_interruption_no_shard_is_sent_twice(hub, command, folder):
    arrived = []

    def refuse(method, path):
        if method == "PUT" and len(arrived) == 2:
            return Refusal(507, "the disk is full")
        if method == "PUT":
            arrived.append(path)

    hub.refuse = refuse
    code, _, err = command("push", folder, REPO)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"hf-moe: {REPO} was not pushed at Error while uploading 'model-0000")
    assert "507" in err and "what has arrived is not sent again" in err
    assert len(hub.objects) == 2 and hub.repos[REPO].messages == ["initial commit"]
    hub.refuse, hub.requests = (lambda method, path: None), []
    assert command("push", folder, REPO).code == 0
    assert len(hub.uploads()) == 3 and not set(hub.uploads()) & set(arrived)
    assert sum(name.endswith(".safetensors") for name in hub.files(REPO)) == 5
    hub.requests = []
    assert command("push", folder, REPO).code == 0
    assert hub.uploads() == [] and len(hub.repos[REPO].messages) == 2


def test_large_shards_go_in_parts_to_a_branch(hub, folder):
    hub.part_bytes = 40_000
    report = push(folder, REPO, revision="half-done", private=False)
    assert (report["private"], hub.repos[REPO].private) == (False, False)
    assert "config.json" not in hub.files(REPO)
    for shard in folder.glob("*.safetensors"):
        assert hub.files(REPO, "half-done")[shard.name] == shard.read_bytes()
    assert any(path.endswith("/3") for path in hub.uploads())
    assert report["commit"] == hub.repos[REPO].branches["half-done"]


def test_with_xet_too_no_shard_is_sent_twice(hub, command, folder, monkeypatch, tmp_path):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_XET_CACHE", str(tmp_path / "xet"))

    hub.refuse = lambda method, path: Refusal(403, "enough") if "shards" in path and len(hub.xorbs) > 2 else None
    code, _, err = command("push", folder, REPO)
    assert code == 2 and err.splitlines()[-1].startswith(f"hf-moe: {REPO} was not pushed: ") and "403" in err
    arrived = dict(hub.xorbs)
    hub.refuse, hub.requests = (lambda method, path: None), []
    assert command("push", folder, REPO).code == 0
    assert len(arrived) == 3 and len([path for _, path in hub.requests if "/xorbs/" in path]) == 3
    shards = {path.name: path for path in folder.glob("*.safetensors")}
    listed = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
    assert {name: listed[name].oid for name in shards} == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in shards.items()
    }


def refuse(status: int, of: str):
    return lambda method, path: Refusal(status, f"no, Bearer {TOKEN}") if of in path else None


REFUSALS = {
    "token": (refuse(401, "/api/repos/create"), "401, the Hub does not take this token"),
    "rights": (refuse(403, "/api/repos/create"), "403, this token may not write there"),
    "rights-to-write": (refuse(403, "/commit/"), "403, this token may not write there"),
    "too-large": (refuse(413, "/lfs/"), "413, the Hub takes no files or requests of this size"),
    "server": (refuse(500, "/lfs/"), "500, the Hub failed"),
    "gateway": (refuse(502, "/preupload/"), "502, the Hub failed"),
    "too-many": (refuse(429, "/api/models"), "429, too many requests"),
    "metadata": (refuse(400, "validate-yaml"), "README.md: {"),
    "something-else": (refuse(418, "objects/batch"), "418, the Hub refused"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_one_line_without_the_token(hub, command, folder, case):
    hub.refuse, words = REFUSALS[case]
    code, out, err = command("push", folder, REPO)
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("hf-moe: ") and words in line
    assert "Traceback" not in err and TOKEN not in out + err
    assert "[token]" in line or case == "metadata"


def test_what_stands_in_the_way_before_the_upload_is_one_line(hub, command, folder, monkeypatch):
    def says(*words):
        code, out, err = command("push", *words)
        assert (code, out) == (2, "") and err.count("\n") == 1
        return err

    assert "does not exist" in says(folder / "none", REPO)
    assert "Repo id" in says(folder, "a/b/c") and "'no spaces'" in says(folder, "no spaces")
    assert "You don't have the rights" in says(folder, "somebody/model")
    push(folder, REPO, private=False)
    assert f"{REPO} is public already; say that it may be (--public" in says(folder, REPO)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        huggingface_hub.close_session()
        assert "unset HF_HUB_OFFLINE" in says(folder, REPO)
    huggingface_hub.close_session()
    with monkeypatch.context() as patch:
        patch.setattr("hf_moe.hub.upload.get_token", lambda: None)
        assert "There is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN." in says(folder, REPO)
    hub.stop()
    assert "cannot be reached" in says(folder, REPO)


def test_logs_and_warnings_of_the_client_lose_their_tokens(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-kind")
    stream = logging.StreamHandler()
    messages = []
    monkeypatch.setattr(stream, "emit", lambda record: messages.append(record.getMessage()))
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(stream)
    try:
        with redacted_messages():
            logging.getLogger("huggingface_hub.x").error("Bearer %s", TOKEN)
            warnings.warn("a-token-of-another-kind was used", stacklevel=1)
    finally:
        logger.removeHandler(stream)
    assert messages == ["Bearer [token]"]
    assert capsys.readouterr().err == "warning: [token] was used\n"


def write(name: str, content: bytes):
    def break_it(folder):
        (folder / name).write_bytes(content)

    return break_it


def cut_short(folder):
    with (folder / "model-00002-of-00005.safetensors").open("r+b") as file:
        file.truncate(30_000)


def link_out(folder):
    (folder.parent / "private.txt").write_text("mine")
    (folder / "notes.txt").symlink_to(folder.parent / "private.txt")


def changed_config(**fields):
    def break_it(folder):
        config = json.loads((folder / "config.json").read_text()) | fields
        config = {name: value for name, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))

    return break_it


def torch_archive(folder):
    torch.save({"x": torch.zeros(3)}, folder / "weights.dat")


def adapter_of_a_folder(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))


BROKEN = {
    "pickle-by-name": (write("data.pkl", b"x"), "data.pkl is a pickle"),
    "pickle-by-content": (write("data.txt", pickle.dumps({"a": 1})), "data.txt is a pickle"),
    "pickle-of-torch": (torch_archive, "weights.dat is a pickle"),
    "token": (
        write("run.log", b"\nlogin " + b"hf_" + b"aBcDeF" * 6),
        "run.log holds what looks like a secret, in line 2",
    ),
    "own-token": (write("run.log", TOKEN.encode()), "run.log holds what looks like a secret, in line 1"),
    "token-far-in": (
        write("run.log", b"x\n" * 524_280 + b"AKIA" + b"A1B2C3D4" * 2),
        "run.log holds what looks like a secret, in line 524281",
    ),
    "link": (link_out, "notes.txt is a link to"),
    "shard-missing": (lambda folder: (folder / "model-00003-of-00005.safetensors").unlink(), "does not exist, but"),
    "shard-cut": (cut_short, "model-00002-of-00005.safetensors is cut short"),
    "code-missing": (lambda folder: (folder / "modeling_hf_moe.py").unlink(), "modeling_hf_moe.py does not exist"),
    "import-missing": (lambda folder: (folder / "routing.py").unlink(), "routing.py does not exist, but auto_map"),
    "no-auto-map": (changed_config(auto_map=None), "has no auto_map"),
    "another-shape": (changed_config(vocab_size=300), "but the config calls for [300, 48]"),
    "tensor-missing": (changed_config(attention_bias=True), "bias is missing from the weights"),
    "no-config": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    "bad-metadata": (write("README.md", b"---\na: [\n---\n# Mine\n"), "README.md has metadata that cannot be read"),
    "local-base": (adapter_of_a_folder, "a folder of this machine"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_should_not_go_is_refused_before_any_request(hub, command, folder, case):
    break_it, words = BROKEN[case]
    break_it(folder)
    code, _, err = command("push", folder, REPO)
    assert code == 2 and err.count("\n") == 1 and words in err
    assert TOKEN not in err and hub.requests == []


def test_what_only_training_needs_is_left_out_and_said(hub, command, folder):
    torch.save({"lr": 1}, folder / "training_args.bin")
    (folder / ".cache").mkdir()
    (folder / "checkpoint-7").mkdir()
    for name in ("config.json", "trainer_state.json", "optimizer.pt", "rng_state_0.pth"):
        (folder / "checkpoint-7" / name).write_text("{}")
    shutil.copytree(folder, folder.parent / "copy")
    shutil.move(folder.parent / "copy", folder / "merged")
    code, out, _ = command("push", folder, REPO)
    assert code == 0
    said = {line.split("left out")[1].strip() for line in out.splitlines() if "left out" in line}
    assert said == {
        "training_args.bin (for resuming)",
        ".cache/ (hidden)",
        "checkpoint-7/ (a checkpoint)",
        "merged/ (another model)",
    }
    assert not [name for name in hub.files(REPO) if "/" in name or name.endswith(".bin")]
    assert command("push", folder, REPO, "--checkpoints").code == 0
    sent = {name for name in hub.files(REPO) if name.startswith("checkpoint-7/")}
    assert sent == {"checkpoint-7/config.json", "checkpoint-7/trainer_state.json"}


def test_a_readme_of_ones_own_is_sent_as_it_is(hub, folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push(folder, REPO)
    assert hub.files(REPO)["README.md"] == b"---\nlicense: mit\n---\n# Mine\n"


def test_a_full_disk_is_one_line_and_leaves_the_last_card(hub, command, folder, monkeypatch):
    assert command("card", folder, "--license", "mit").code == 0
    before = (folder / "README.md").read_bytes()

    def full(source, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    for words in (("card", folder), ("push", folder, REPO)):
        code, _, err = command(*words)
        assert (code, err) == (2, f"hf-moe: {folder}/README.md could not be written: No space left on device.\n")
    assert (folder / "README.md").read_bytes() == before and hub.requests == []
    assert not list(folder.glob("*.partial"))
