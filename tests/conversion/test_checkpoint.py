"""Reading: the right bytes, and one clear line for every way in which a checkpoint can be damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_moe.conversion import upcycle
from hf_moe.conversion.files.checkpoint import DTYPES, INDEX_FILE, Checkpoint
from safetensors.torch import load_file, save_file

SHARD = "model-00002-of-"


@pytest.fixture
def sharded(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint("llama", sharded=True), tmp_path / "llama"))


def shard_of(folder: Path) -> Path:
    return next(folder.glob(f"{SHARD}*.safetensors"))


def edit_index(folder: Path, edit) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def edit_header(path: Path, edit) -> None:
    """Rewrite the header and keep the data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = edit(json.loads(raw[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def first(header: dict) -> str:
    return next(name for name in header if name != "__metadata__")


def with_first(**changes):
    return lambda header: header | {first(header): header[first(header)] | changes}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_tensors_are_what_safetensors_reads(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (7, 5), "scalar": (), "empty": (0, 3), "cube": (2, 3, 5)}
    weights = {
        name: torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
        .view(dtype)
        .reshape(shape)
        for name, shape in shapes.items()
    }
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.entries.keys() == weights.keys()
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        assert checkpoint.tensor(name).dtype == dtype
        assert checkpoint.tensor(name).shape == weight.shape
        assert checkpoint.tensor(name).reshape(-1).view(torch.uint8).tolist() == (
            weight.reshape(-1).view(torch.uint8).tolist()
        )


def truncate(folder: Path) -> None:
    path = shard_of(folder)
    path.write_bytes(path.read_bytes()[:-1])


def cut_to_nothing(folder: Path) -> None:
    shard_of(folder).write_bytes(b"")


def append(folder: Path) -> None:
    path = shard_of(folder)
    path.write_bytes(path.read_bytes() + b"\0")


def in_header(edit):
    return lambda folder: edit_header(shard_of(folder), edit)


def overlap(header: dict) -> dict:
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    begin, end = header[last]["data_offsets"]
    return header | {last: header[last] | {"data_offsets": [begin - 4, end - 4]}}


def twice(header: dict) -> bytes:
    name = first(header)
    entry = json.dumps(header[name])
    return f'{{"{name}": {entry}, "{name}": {entry}}}'.encode()


def point_to(file):
    def edit(weight_map: dict) -> None:
        weight_map[next(iter(weight_map))] = file

    return lambda folder: edit_index(folder, edit)


def repeat_tensor(folder: Path) -> None:
    donor = load_file(next(folder.glob("model-00001-of-*.safetensors")))
    save_file(load_file(shard_of(folder)) | donor, shard_of(folder))


def unlist(folder: Path) -> None:
    """Leave one tensor of a shard with several out of the index."""

    def edit(weight_map: dict) -> None:
        files = list(weight_map.values())
        del weight_map[next(name for name, file in weight_map.items() if files.count(file) > 1)]

    edit_index(folder, edit)


def swap(folder: Path) -> None:
    """Two shards under each other's names."""
    one, other = sorted(folder.glob("*.safetensors"))[:2]
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)


def rename(folder: Path) -> None:
    shard_of(folder).rename(folder / "model-2-of-2.safetensors")


def duplicate(folder: Path) -> None:
    """One shard under another's name."""
    shard_of(folder).write_bytes(next(folder.glob("model-00001-of-*.safetensors")).read_bytes())


def list_twice(folder: Path) -> None:
    """The index names one tensor twice, with two files."""
    text = (folder / INDEX_FILE).read_text()
    name, file = next(iter(json.loads(text)["weight_map"].items()))
    (folder / INDEX_FILE).write_text(text.replace(f'"{name}": "{file}"', f'"{name}": "x", "{name}": "{file}"'))


def of_another_model(folder: Path) -> None:
    """A shard with the right names, whose tensors have other sizes."""
    weights = load_file(shard_of(folder))
    save_file({name: torch.cat([weight, weight]) for name, weight in weights.items()}, shard_of(folder))


def in_another_dtype(folder: Path) -> None:
    save_file({name: weight.to(torch.int8) for name, weight in load_file(shard_of(folder)).items()}, shard_of(folder))


def overflow(header: dict) -> dict:
    """2^64 numbers, which 64 bits count as none, at a place that holds none."""
    begin = max(header[name]["data_offsets"][1] for name in header if name != "__metadata__")
    return header | {"giant": {"dtype": "U8", "shape": [2**62, 4], "data_offsets": [begin, begin]}}


DAMAGE = {
    "swapped shards": (swap, "but that file lacks it"),
    "renamed shard": (rename, f"{SHARD}.*does not exist"),
    "duplicate shard": (duplicate, "is twice in"),
    "shard of another model": (of_another_model, "has shape .* but the config calls for"),
    "shard of codes": (in_another_dtype, "is torch.int8"),
    "index that lists a tensor twice": (list_twice, "is not valid JSON.*appears twice"),
    "index that names a folder": (point_to("."), "does not exist"),
    "header with too many numbers": (in_header(overflow), f"{SHARD}.*giant has shape"),
    "header with a giant size": (in_header(with_first(shape=[10**30])), f"{SHARD}.*which take"),
    "header with endless brackets": (in_header(lambda header: b"[" * 10**5), f"{SHARD}.*no valid safetensors header"),
    "header that is not text": (in_header(lambda header: b"\xff\xfe{}"), f"{SHARD}.*no valid safetensors header"),
    "missing shard": (lambda folder: shard_of(folder).unlink(), f"{SHARD}.*does not exist"),
    "truncated shard": (truncate, f"{SHARD}.*is truncated"),
    "empty shard": (cut_to_nothing, f"{SHARD}.*truncated or no safetensors"),
    "longer shard": (append, f"{SHARD}.*bytes that no tensor owns"),
    "header of nonsense": (in_header(lambda header: b"{nonsense"), f"{SHARD}.*no valid safetensors header"),
    "header that is a list": (in_header(lambda header: []), f"{SHARD}.*it is a list"),
    "header names a tensor twice": (in_header(twice), f"{SHARD}.*appears twice"),
    "header with a wrong shape": (in_header(with_first(shape=[3, 5, 7])), f"{SHARD}.*105|420"),
    "header with a negative size": (in_header(with_first(shape=[-1])), f"{SHARD}.*malformed"),
    "header with a wrong dtype": (in_header(with_first(dtype="F64")), f"{SHARD}.*which take"),
    "header with an unknown dtype": (in_header(with_first(dtype="F3")), f"{SHARD}.*'F3'"),
    "header with one offset": (in_header(with_first(data_offsets=[0])), f"{SHARD}.*malformed"),
    "header with no entry": (in_header(lambda header: header | {first(header): 5}), f"{SHARD}.*malformed"),
    "overlapping tensors": (in_header(overlap), f"{SHARD}.*begins at byte"),
    "absent file in the index": (point_to("model-99.safetensors"), "model-99.safetensors does not exist"),
    "index that leaves the folder": (point_to("../x.safetensors"), "outside the folder.*'../x.safetensors'"),
    "index with an absolute path": (point_to("/x.safetensors"), "outside the folder.*'/x.safetensors'"),
    "index with a Windows path": (point_to("..\\x.safetensors"), "outside the folder"),
    "index with no file name": (point_to(7), "7, not a name"),
    "tensor in another shard": (lambda folder: point_to(shard_of(folder).name)(folder), "but that file lacks it"),
    "tensor in two shards": (repeat_tensor, "is twice in"),
    "tensor that the index leaves out": (unlist, "does not list it"),
    "index without a map": (lambda folder: (folder / INDEX_FILE).write_text("{}"), "has no weight_map"),
    "index of nonsense": (lambda folder: (folder / INDEX_FILE).write_text("{"), "is not valid JSON"),
    "index that is a list": (lambda folder: (folder / INDEX_FILE).write_text("[]"), "JSON object"),
    "no weights": (lambda folder: (folder / INDEX_FILE).unlink(), "reads safetensors only"),
}


@pytest.mark.parametrize(("damage", "match"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_one_clear_line_and_no_output(damage, match, sharded, tmp_path):
    upcycle(sharded, tmp_path / "moe", experts=2, top_k=1, dry_run=True)
    damage(sharded)
    with pytest.raises((ValueError, FileNotFoundError), match=match) as raised:
        upcycle(sharded, tmp_path / "moe", experts=2, top_k=1, progress=False)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [sharded]


def test_weights_through_links_as_in_the_hub_cache(checkpoint, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    shutil.copytree(checkpoint("llama", sharded=True), blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    report = upcycle(snapshot, tmp_path / "moe", experts=2, top_k=1, progress=False)
    assert report["max_abs_diff"] <= 1e-4
