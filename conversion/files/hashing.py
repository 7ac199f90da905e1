"""Digests of a checkpoint: of its weight files, worked out while the conversion writes, and of what tells it apart."""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .checkpoint import Checkpoint

BUFFER = 1 << 22  # bytes that are read at a time
BEGINNING = 4096  # bytes of each tensor that go into a fingerprint


def file_digest(path: Path, stopped: Callable[[], bool] = lambda: False) -> str:
    buffer, digest = memoryview(bytearray(BUFFER)), hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while not stopped() and (count := file.readinto(buffer)):
            digest.update(buffer[:count])
    return digest.hexdigest()


def fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of every tensor's name, dtype, shape, place and first bytes: other weights hardly ever share it."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.entries):
        entry, file = checkpoint.entries[name], checkpoint.file_of[name]
        digest.update(f"{name} {entry} {file}\n".encode())
        with (checkpoint.folder / file).open("rb", buffering=0) as opened:
            opened.seek(entry.begin)
            digest.update(opened.read(min(entry.nbytes, BEGINNING)))
    return digest.hexdigest()


class Hashing:
    """A context in which another thread reads a checkpoint's files. Leaving it early stops the thread."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint, self._stop, self._pool = checkpoint, threading.Event(), ThreadPoolExecutor(1)

    def __enter__(self) -> "Hashing":
        self._future = self._pool.submit(self._read)
        return self

    def __exit__(self, *exception) -> None:
        self._stop.set()
        self._pool.shutdown()

    def digests(self) -> dict[str, str]:
        """File -> SHA-256, the Hub's own name for a large file. Waits for the thread."""
        return self._future.result()

    def _read(self) -> dict[str, str]:
        folder = self._checkpoint.folder
        return {name: file_digest(folder / name, self._stop.is_set) for name in self._checkpoint.files}
