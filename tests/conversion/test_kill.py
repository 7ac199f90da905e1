"""A kill at any time loses nothing: each conversion goes on to the same bytes, and nothing else stays behind."""

import multiprocessing
import os
import random
import signal
import time

import pytest
from hf_moe.conversion import (
    exchange_experts,
    export_checkpoint,
    grow,
    import_checkpoint,
    output,
    prune,
    upcycle,
    verify,
)
from hf_moe.conversion.files import writer

from hf_moe.staging import journal_file, staging_folder
from tests.conversion.conftest import files_of
from tests.conversion.kill_worker import convert

# How often each of the conversions is killed; HF_MOE_KILL_POINTS=34 makes it more than 100 in all.
KILL_POINTS = int(os.environ.get("HF_MOE_KILL_POINTS", "6"))
FUNCTIONS = {"upcycle": upcycle, "import_checkpoint": import_checkpoint, "export_checkpoint": export_checkpoint}
FUNCTIONS |= {"graft": upcycle, "prune": prune, "grow": grow, "exchange_experts": exchange_experts}
PRELOADED = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mixtral")]
ARGUMENTS = {"max_shard_size": "25KB", "verify": False, "progress": False}


@pytest.fixture(scope="module")
def processes():
    """Processes forked from one that has everything imported and nothing computed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conversion.kill_worker", *PRELOADED])
    return context


@pytest.fixture(scope="module")
def sources(checkpoint, tmp_path_factory):
    """What each function converts, and how."""
    moe = tmp_path_factory.mktemp("hf_moe") / "moe"
    upcycle(checkpoint("llama"), moe, experts=3, top_k=2, verify=False, progress=False)
    return {
        "upcycle": {"src": checkpoint("llama", sharded=True), "experts": 3, "top_k": 2, "seed": 5},
        "import_checkpoint": {"src": checkpoint("mixtral", sharded=True)},
        "export_checkpoint": {"src": moe, "to": "mixtral"},
        "graft": {"src": checkpoint("llama", sharded=True), "experts": 3, "top_k": 2, "seed": 5, "graft": True},
        "prune": {"src": checkpoint("mixtral", sharded=True), "experts": 4, "by": "random"},
        "grow": {"src": checkpoint("mixtral", sharded=True), "experts": 10, "top_k": 6},
        "exchange_experts": {"src": moe, "add": [f"{moe}:0"]},
    }


def run(processes, case: str, *arguments) -> int:
    process = processes.Process(target=convert, args=(FUNCTIONS[case].__name__, *arguments))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_kill_at_any_line_loses_nothing(function, sources, processes, tmp_path):
    folder, counts = tmp_path / "folder", tmp_path / "counts"
    arguments = {**sources[function], **ARGUMENTS, "dst": folder / "out"}
    assert run(processes, function, arguments, None, counts) == 0
    expected = files_of(folder)
    assert sum(name.endswith(".safetensors") for name in expected) > 3
    before, lines = map(int, counts.read_text().split())
    points = random.Random(function)
    kept = 0
    for point in range(KILL_POINTS):
        dst = tmp_path / str(point) / "out"
        # Most kills where something is on the disk already.
        line = points.randint(before if point % 8 else 1, lines)
        assert run(processes, function, arguments | {"dst": dst}, line) == -signal.SIGKILL
        whole = {path: path.stat().st_mtime_ns for path in staging_folder(dst).glob("*.safetensors")}
        FUNCTIONS[function](**arguments | {"dst": dst, "resume": True})
        assert files_of(tmp_path / str(point)) == expected, f"killed before line {line} of {lines}"
        kept += sum((dst / path.name).stat().st_mtime_ns == written for path, written in whole.items())
    assert kept > KILL_POINTS  # more than one file a time was not written again


@pytest.mark.parametrize("function", FUNCTIONS)
def test_kill_after_kill(function, sources, processes, tmp_path):
    """Also what goes on can be killed, from outside too, at any time."""
    arguments = {**sources[function], **ARGUMENTS, "resume": True}
    start = time.perf_counter()
    assert run(processes, function, arguments | {"dst": tmp_path / "a" / "out"}, None) == 0
    duration = time.perf_counter() - start
    times = random.Random(function)
    for _ in range(4):
        process = processes.Process(
            target=convert, args=(FUNCTIONS[function].__name__, arguments | {"dst": tmp_path / "b" / "out"}, None)
        )
        process.start()
        process.join(times.uniform(0, duration))
        process.kill()
        process.join()
        if (tmp_path / "b" / "out").exists():
            break
    else:
        assert run(processes, function, arguments | {"dst": tmp_path / "b" / "out"}, None) == 0
    assert files_of(tmp_path / "b" / "out") == files_of(tmp_path / "a" / "out")


class Stop(Exception):
    pass


def stopping(monkeypatch, failure: BaseException, after: int) -> None:
    """Let the next conversion fail in its file number `after`."""
    write, written = writer.write_shard, []

    def failing(folder, shard, advance):
        written.append(shard)
        if len(written) > after:
            (folder / shard.file).write_bytes(shard.header)
            monkeypatch.setattr(writer, "write_shard", write)
            raise failure
        return write(folder, shard, advance)

    monkeypatch.setattr(writer, "write_shard", failing)


@pytest.fixture
def unfinished(sources, monkeypatch, tmp_path):
    """The arguments of an upcycling that Ctrl-C has stopped in its third file."""
    arguments = {**sources["upcycle"], **ARGUMENTS, "dst": tmp_path / "out"}
    stopping(monkeypatch, KeyboardInterrupt(), 2)
    with pytest.raises(KeyboardInterrupt, match=r"\.out\.partial, go on with --resume"):
        upcycle(**arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", ".out.partial.jsonl"]
    return arguments


def test_an_unfinished_conversion_is_named_and_not_touched(unfinished, tmp_path):
    before = files_of(tmp_path)
    for more in ({}, {"dry_run": True}):
        with pytest.raises(FileExistsError, match=r"unfinished.*\.out\.partial; go on with.*--resume.*start over"):
            upcycle(**unfinished, **more)
    assert files_of(tmp_path) == before


def test_starting_over(unfinished, tmp_path):
    for path in staging_folder(tmp_path / "out").iterdir():
        path.unlink()
    staging_folder(tmp_path / "out").rmdir()
    upcycle(**unfinished | {"seed": 8})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


OTHERS = {
    "experts": {"experts": 4},
    "seed": {"seed": 6},
    "layers": {"layers": "1"},
    "max_shard_size": {"max_shard_size": "24KB"},
}


@pytest.mark.parametrize(("name", "changes"), OTHERS.items(), ids=OTHERS)
def test_other_arguments_are_refused(name, changes, unfinished, tmp_path):
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=rf"begun with {name} .*now it is.*start over") as raised:
        upcycle(**unfinished | changes, resume=True)
    assert "\n" not in str(raised.value)
    assert files_of(tmp_path) == before
    upcycle(**unfinished, resume=True)


def test_another_source_is_refused(unfinished, checkpoint, tmp_path):
    """Of the same name and the same shapes, with other numbers in the middle of it."""
    source = tmp_path / "sources" / unfinished["src"].name
    source.mkdir(parents=True)
    for path in unfinished["src"].iterdir():
        content = bytearray(path.read_bytes())
        if path.name.startswith("model-00004"):
            content[-1] ^= 1
        (source / path.name).write_bytes(content)
    with pytest.raises(ValueError, match="begun with source_contents"):
        upcycle(**unfinished | {"src": source}, resume=True)


def test_a_file_that_changed_is_written_again(unfinished, tmp_path):
    staging = staging_folder(tmp_path / "out")
    first, second, *_ = sorted(staging.glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.unlink()
    upcycle(**unfinished, resume=True)
    upcycle(**unfinished | {"dst": tmp_path / "again" / "out"})
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again" / "out")


def test_only_one_process_writes(unfinished, processes, tmp_path):
    import fcntl

    with journal_file(tmp_path / "out").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=r"Another process is writing to .*\.out\.partial"):
            upcycle(**unfinished, resume=True)
    upcycle(**unfinished, resume=True)


def test_a_folder_without_its_journal_is_refused(unfinished, tmp_path):
    journal_file(tmp_path / "out").unlink()
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"\.out\.partial is in the way"):
            upcycle(**unfinished, resume=resume)


def test_resume_starts_where_nothing_is_begun(sources, tmp_path):
    arguments = {**sources["upcycle"], **ARGUMENTS}
    for name, resume in [("a", True), ("b", False)]:
        upcycle(**arguments, dst=tmp_path / name / "out", resume=resume)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    with pytest.raises(FileExistsError, match="not empty"):
        upcycle(**arguments, dst=tmp_path / "a" / "out", resume=True)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), Stop()], ids=["full disk", "fault"])
def test_an_error_while_writing_leaves_nothing(failure, sources, monkeypatch, tmp_path):
    stopping(monkeypatch, failure, 2)
    with pytest.raises(type(failure)):
        upcycle(**sources["upcycle"], **ARGUMENTS, dst=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_comparing_loses_nothing(sources, monkeypatch, tmp_path):
    def failing(a, b, **how):
        raise MemoryError

    arguments = {**sources["upcycle"], **ARGUMENTS, "dst": tmp_path / "out", "verify": True}
    monkeypatch.setattr(output, "verify", failing)
    with pytest.raises(MemoryError):
        upcycle(**arguments)
    monkeypatch.setattr(output, "verify", verify)
    report = upcycle(**arguments, resume=True)
    assert report["max_abs_diff"] <= 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
