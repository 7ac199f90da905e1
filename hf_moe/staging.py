"""Folders that appear whole or not at all, and conversions that go on where something has stopped them.

While `NAME` is being made, its files lie beside it in `.NAME.partial`. The first line of `.NAME.partial.jsonl`, the
journal, says what is being made, and each further line which weights file is complete and on the disk. What exists
tells how far it came. The journal alone: nothing is written yet. With `.NAME.partial`: unfinished. With `NAME`: all is
done but to remove the journal.
"""

import contextlib
import fcntl
import json
import os
import reprlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


def staging_folder(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.partial"


def journal_file(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.partial.jsonl"


def check_destination(folder: Path, resume: bool = False) -> Path:
    """The destination, absolute. Raises FileExistsError unless it is absent or an empty folder.

    Also where a conversion to it is unfinished, unless that one is to `resume`.
    """
    folder = folder.expanduser().resolve()
    staging, journal = staging_folder(folder), journal_file(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"The output {folder} is a file; name a folder that does not exist or is empty.")
    only_the_journal_is_left = resume and journal.exists() and not staging.exists()
    if folder.exists() and any(folder.iterdir()) and not only_the_journal_is_left:
        raise FileExistsError(f"The output folder {folder} is not empty; name another or empty it.")
    if staging.exists() and not journal.exists():
        raise FileExistsError(f"The folder {staging} is in the way, and no journal says what it holds; remove it.")
    if staging.exists() and not resume:
        raise FileExistsError(
            f"An unfinished conversion is in {staging}; go on with resume=True (--resume), or remove that folder to "
            "start over."
        )
    return folder


class Journal:
    """What a conversion makes, and which of its weights files are complete: the lines of a file.

    `complete` says that everything is written, so that an error does not undo it any more.
    """

    def __init__(self, file: BinaryIO, staging: Path):
        self._file, self._staging, self._lines, self.complete = file, staging, [], False
        end = 0
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                break
            self._lines.append(json.loads(line))
            end += len(line)
        file.truncate(end)  # a kill may have cut the last line

    def begin(self, plan: dict[str, Any]) -> None:
        self._file.truncate(0)
        self._lines = []
        self._append(plan)

    def compare(self, plan: dict[str, Any]) -> None:
        """Raise a ValueError unless the conversion was begun with this plan."""
        begun = self._lines[0] if self._lines else {}
        for name, value in json.loads(json.dumps(plan)).items():
            if begun.get(name) != value:
                raise ValueError(
                    f"The unfinished conversion in {self._staging} was begun with {name} "
                    f"{reprlib.repr(begun.get(name))}, now it is {reprlib.repr(value)}; remove that folder to start "
                    "over."
                )

    def record(self, name: str) -> None:
        """The file `name` is complete and on the disk."""
        flush(self._staging)
        self._append({name: self._state(name)})

    def holds(self, name: str) -> bool:
        """Whether the file `name` was completed earlier and has not been touched since."""
        known = {name: state for line in self._lines[1:] for name, state in line.items()}
        return name in known and (self._staging / name).is_file() and self._state(name) == known[name]

    def _state(self, name: str) -> list[int]:
        """What tells a file from the same one after a change, at no cost even for hundreds of gigabytes."""
        said = (self._staging / name).stat()
        return [said.st_size, said.st_mtime_ns]

    def _append(self, said: dict[str, Any]) -> None:
        self._file.write(json.dumps(said).encode() + b"\n")
        os.fsync(self._file.fileno())
        self._lines.append(said)


@contextlib.contextmanager
def resumable(folder: Path, plan: dict[str, Any], resume: bool) -> Iterator[tuple[Path, Journal]]:
    """A folder beside `folder`, which takes its name when the block ends well, and the journal of what is in it.

    A kill or an interrupt leaves both, and `resume` goes on with them if `plan` is what it was. An error removes them,
    unless the journal is `complete`.
    """
    folder = check_destination(folder, resume)
    staging, path = staging_folder(folder), journal_file(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a kill releases it
        except BlockingIOError:
            raise BlockingIOError(f"Another process is writing to {staging}; wait for it.") from None
        journal = Journal(file, staging)
        if staging.exists():
            journal.compare(plan)
        elif folder.exists() and any(folder.iterdir()):
            journal.compare(plan)
            os.replace(folder, staging)
        else:
            journal.begin(plan)
            flush(folder.parent)
            staging.mkdir()
        try:
            yield staging, journal
            publish(staging, folder)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; what is done is in {staging}, go on with --resume.") from None
        except Exception:
            if not journal.complete:
                shutil.rmtree(staging, ignore_errors=True)
                path.unlink()
            raise
        path.unlink()


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its name when the block ends well and goes when it does not.

    A kill leaves at most the new folder, `.NAME.*.partial`; what has the final name is complete and on the disk.
    """
    folder = check_destination(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
    staging.mkdir()
    try:
        yield staging
        publish(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which has its name once it is whole."""
    aside = path.with_name(f".{path.name}.partial")
    yield aside
    os.replace(aside, path)


def publish(staging: Path, folder: Path) -> None:
    """Give `staging`, once it is on the disk, the name `folder`."""
    for path in [*staging.rglob("*"), staging]:
        flush(path)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"The output folder {folder} is not empty any more: somebody has filled it meanwhile.")
    os.replace(staging, folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
