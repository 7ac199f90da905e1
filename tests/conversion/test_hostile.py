"""Inputs that mean harm and disks that are full: one clear error each, and no output."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hf_moe.conversion import export_checkpoint, import_checkpoint, upcycle
from hf_moe.conversion.files.checkpoint import DTYPES, read_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

OPTIONS = {"verify": False, "progress": False}


@pytest.fixture
def llama(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "llama"))


def assert_refused(tmp_path: Path, match: str, error: type[Exception], convert, *arguments, **options) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=match) as raised:
        convert(*arguments, **OPTIONS, **options)
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer_config.json", "LICENSE", "chat_template.jinja"])
@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "relative"])
def test_a_link_that_leaves_the_folder_is_refused(file, absolute, llama, tmp_path):
    """Else a checkpoint that somebody sent could publish a private file as a part of the result."""
    outside = tmp_path / "blobs" / "outside"
    outside.parent.mkdir()
    if (llama / file).exists():
        (llama / file).rename(outside)
    else:
        outside.write_text("{}")
    (llama / file).symlink_to(outside if absolute else "../blobs/outside")
    match = f"{file} is a link that leaves the folder, to .*outside"
    assert_refused(tmp_path, match, ValueError, upcycle, llama, tmp_path / "moe", experts=2, top_k=1)


def test_a_link_within_the_folder_is_read(llama, tmp_path):
    (llama / "kept").mkdir()
    (llama / "model.safetensors").rename(llama / "kept" / "weights")
    (llama / "model.safetensors").symlink_to("kept/weights")
    upcycle(llama, tmp_path / "moe", experts=2, top_k=1, **OPTIONS)
    assert not any(path.is_symlink() for path in (tmp_path / "moe").rglob("*"))


def test_an_index_through_a_linked_folder_is_refused(checkpoint, tmp_path):
    sharded = Path(shutil.copytree(checkpoint("llama", sharded=True), tmp_path / "llama"))
    index = sharded / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    file = next(iter(said["weight_map"].values()))
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(sharded / file, tmp_path / "elsewhere" / file)
    (sharded / "sub").symlink_to(tmp_path / "elsewhere")
    said["weight_map"] = {n: f"sub/{f}" if f == file else f for n, f in said["weight_map"].items()}
    index.write_text(json.dumps(said))
    match = f"sub/{file} is a link that leaves the folder"
    assert_refused(tmp_path, match, ValueError, upcycle, sharded, tmp_path / "moe", experts=2, top_k=1)


def test_code_beside_the_weights_is_not_run(llama, tmp_path):
    path = llama / "config.json"
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    (llama / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    upcycle(llama, tmp_path / "moe", experts=2, top_k=1, progress=False)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "moe" / "evil.py").exists()


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("shard") / "model.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.ones(7, dtype=torch.bfloat16), "none": torch.ones(0, 2)}, path)
    return path.read_bytes()


numbers = st.one_of(st.integers(-(2**70), 2**70), st.integers(-3, 90))
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F3", "", None]),
        "shape": st.lists(numbers, max_size=4),
        "data_offsets": st.lists(numbers, max_size=3),
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_file_says_it_is_read_or_refused(data, shard, tmp_path):
    """And what is read lies within the file, without a gap or an overlap."""
    length = int.from_bytes(shard[:8], "little")
    kind = data.draw(st.sampled_from(["bytes", "entries", "length"]))
    if kind == "bytes":
        raw = bytearray(shard)
        for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)))):
            raw[place] = value
    elif kind == "entries":
        header = json.loads(shard[8 : 8 + length]) | data.draw(st.dictionaries(st.sampled_from("abc"), entries))
        text = json.dumps(header).encode()
        raw = len(text).to_bytes(8, "little") + text + shard[8 + length :]
    else:
        raw = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + shard[8 : data.draw(st.integers(8, 300))]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    try:
        found = read_header(path)
    except ValueError:
        return
    assert sum(entry.nbytes for entry in found.values()) == len(raw) - 8 - int.from_bytes(raw[:8], "little")
    for entry in found.values():
        assert torch.empty(entry.shape, dtype=entry.dtype, device="meta").nbytes == entry.nbytes
        assert entry.begin + entry.nbytes <= len(raw)


@pytest.fixture
def small_disk():
    """The system refuses to let a file grow beyond 60 KB, as it does where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


CONVERSIONS = {
    "upcycle": (upcycle, "llama", {"experts": 3, "top_k": 2}),
    "import": (import_checkpoint, "mixtral", {}),
    "export": (export_checkpoint, "hf_moe", {"to": "mixtral"}),
}


@pytest.mark.parametrize(("convert", "case", "options"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_disk_that_fills_up(convert, case, options, checkpoint, tmp_path, request):
    source = tmp_path / "source"
    if case == "hf_moe":
        upcycle(checkpoint("llama"), source, experts=3, top_k=2, **OPTIONS)
    else:
        shutil.copytree(checkpoint(case), source)
    request.getfixturevalue("small_disk")
    match = r"File too large, while writing: .*\.partial/model"
    assert_refused(tmp_path, match, OSError, convert, source, tmp_path / "out", **options)


def test_no_permission(llama, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    assert_refused(tmp_path, "closed", OSError, upcycle, llama, tmp_path / "closed" / "moe", experts=2, top_k=1)
