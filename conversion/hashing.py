"""What a checkpoint was made of: SHA-256 of its weight files, worked out while the conversion writes."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

from .checkpoint import Checkpoint


class Hashing:
    """A context in which another thread reads the files. Leaving it early stops the thread."""

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
        buffer, digests = memoryview(bytearray(1 << 22)), {}
        for name in self._checkpoint.files:
            digest = hashlib.sha256()
            with (self._checkpoint.folder / name).open("rb", buffering=0) as file:
                while not self._stop.is_set() and (count := file.readinto(buffer)):
                    digest.update(buffer[:count])
            digests[name] = digest.hexdigest()
        return digests
