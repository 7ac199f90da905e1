"""Writing: files that safetensors and Transformers read, and a folder that appears whole or not at all."""

import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hf_moe.conversion.files import writer
from hf_moe.conversion.files.writer import Output, check_space, plan_shards, write_shards
from safetensors.torch import load_file

from hf_moe.staging import Journal, staged


def write(folder: Path, shards: list, advance) -> None:
    (folder / "files").mkdir()
    with (folder / "journal").open("ab+", buffering=0) as file:
        journal = Journal(file, folder / "files")
        journal.begin({})
        write_shards(folder / "files", shards, advance, journal)


def outputs_of(weights: dict[str, torch.Tensor], cut: int = 1) -> list[Output]:
    return [
        Output(name, weight.dtype, tuple(weight.shape), lambda weight=weight: weight.split(cut) if cut else [weight])
        for name, weight in weights.items()
    ]


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {
        "b": torch.randn(7, 5).to(torch.bfloat16),
        "a": torch.randn(3, 5, 2),
        "odd": torch.randint(0, 9, (3,), dtype=torch.uint8),
        "d": torch.randn(9, 4, dtype=torch.float64),
        "turned": torch.randn(5, 6).T,
        "none": torch.empty(0, 4),
    }


@pytest.mark.parametrize("limit", ["1GB", "0.3KB", 100, 1], ids=str)
def test_written_is_read_back(limit, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", 13)
    shards, heard = plan_shards(outputs_of(weights), limit), []
    write(tmp_path, shards, heard.append)
    read, tmp_path = {}, tmp_path / "files"
    for shard in shards:
        read |= load_file(tmp_path / shard.file)
        assert (tmp_path / shard.file).stat().st_size == shard.nbytes
        assert len(shard.header) % 8 == 0
    assert sum(heard) == sum(shard.nbytes for shard in shards)
    assert read.keys() == weights.keys()
    for name, weight in weights.items():
        assert read[name].dtype == weight.dtype
        assert torch.equal(read[name], weight)
    assert (tmp_path / "model.safetensors").exists() == (limit == "1GB")
    if limit != "1GB":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
        assert index["weight_map"] == {output.name: shard.file for shard in shards for output in shard.outputs}


def test_every_tensor_lies_at_a_multiple_of_its_item_size(weights):
    (shard,) = plan_shards(outputs_of(weights), "1GB")
    header = json.loads(shard.header[8:])
    for name, weight in weights.items():
        assert header[name]["data_offsets"][0] % weight.element_size() == 0


def test_pieces_must_fill_the_tensor(tmp_path):
    short = Output("x", torch.float32, (3, 2), lambda: [torch.ones(2, 2)])
    with pytest.raises(AssertionError, match="x: 16 bytes instead of 24"):
        write(tmp_path, plan_shards([short], "1GB"), lambda count: None)


@pytest.mark.parametrize("exists", [False, True], ids=["absent", "empty"])
def test_staged_appears_at_the_end(exists, tmp_path):
    target = tmp_path / "deep" / "out"
    if exists:
        target.mkdir(parents=True)
    with staged(target) as folder:
        assert folder.parent == target.parent
        (folder / "file").write_text("content")
        assert not (target / "file").exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "file").read_text() == "content"


def test_staged_keeps_what_somebody_else_put_there_meanwhile(tmp_path):
    target = tmp_path / "out"

    def ours_and_theirs():
        with staged(target) as folder:
            (folder / "file").write_text("ours")
            target.mkdir()
            (target / "file").write_text("theirs")

    with pytest.raises(FileExistsError, match="not empty"):
        ours_and_theirs()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "file").read_text() == "theirs"


def test_staged_refuses_a_file(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileExistsError, match="out is a file"), staged(tmp_path / "out"):
        pass


def test_a_full_disk_is_seen_before(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: Usage(10, 5, 5))
    check_space(tmp_path / "absent" / "out", 5)
    with pytest.raises(OSError, match=r"takes 0\.00 GB"):
        check_space(tmp_path / "absent" / "out", 6)
