"""Remote files in a local directory: each fetched once, checked, kept while it is used, and then evicted.

The directory may be shared by any processes of one host. A file is downloaded under an exclusive lock; a process that
needs it for longer holds a shared lock on it, and only what nobody holds is evicted. The kernel releases the locks of a
process that ends, however it ends.
"""

import fcntl
import os
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import IO, NamedTuple

from pretrain.corpus.remote_files import file_system, with_retries
from pretrain.corpus.store import file_checksum
from pretrain.corpus.whole import exclusive

_THREADS = 4


def cache_directory() -> Path:
    """Where prepared sources and copies of remote corpora are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PRETRAIN_CACHE") or home / "pretrain")


class RemoteFile(NamedTuple):
    """A file beside others at one address.

    Attributes:
        name: Its name there, and in the cache.
        sha256: Its checksum.
        num_bytes: Its size.
    """

    name: str
    sha256: str
    num_bytes: int


class Cache:
    """Files of one address in a local directory.

    Args:
        url: The address: any that fsspec knows.
        directory: Where they are kept; what belongs to another content must have another directory.
        limit: Bytes to keep, if what is held leaves room; by default what nobody holds is evicted.
    """

    def __init__(self, url: str, directory: Path, limit: int | None = None) -> None:
        self.url, self.directory, self.limit = url, directory, limit
        self._held: dict[str, IO[bytes]] = {}
        self._coming: dict[str, Future[None]] = {}
        self._queue: queue.SimpleQueue[tuple[Future[None], RemoteFile]] | None = None
        self._process = os.getpid()

    def fetch(self, file: RemoteFile) -> Path:
        """The local copy of a file, downloaded if it is not there.

        Raises:
            UserError: If it is not at the address, or cannot be had in several attempts.
            OSError: If the disk is full, or not to be written to.
        """
        path = self.directory / file.name
        if not _is_there(path, file):
            self.directory.mkdir(parents=True, exist_ok=True)
            with exclusive(self.directory / f".{file.name}.lock"):
                if not _is_there(path, file):  # another process may have been faster
                    self._download(file, path)
        return path

    def bring(
        self, needed: Iterable[RemoteFile], next_ones: Iterable[RemoteFile], before: Iterable[RemoteFile]
    ) -> None:
        """Hold the files that are needed now, waiting for them; fetch the next ones meanwhile; evict what is neither.

        Args:
            needed: What must be there when this returns.
            next_ones: What will be needed next; it comes in the background.
            before: What was needed until now and may still be read.

        Raises:
            UserError: If one of those needed cannot be had.
        """
        self.after_fork()
        needed, next_ones, before = list(needed), list(next_ones), list(before)
        for file in (*needed, *next_ones):
            coming = self._coming.get(file.name)
            # One that has come may have been evicted by now, and one that has failed is worth another try.
            if file.name not in self._held and (coming is None or coming.done()):
                self._coming[file.name] = self._submit(file)
        for file in needed:
            if file.name not in self._held:
                self._coming.pop(file.name).result()
                self._hold(file)
        staying = {file.name for file in (*needed, *next_ones, *before)}
        for name in [name for name in self._held if name not in staying]:
            self._held.pop(name).close()
        self.evict({file.name for file in next_ones})

    def evict(self, keep: Iterable[str] = ()) -> None:
        """Remove what no process holds, the longest unused first, until the rest is within the limit."""
        files = []
        for path in self.directory.glob("*.arrow"):
            try:
                files.append((path.stat(), path))
            except FileNotFoundError:  # another process has evicted it
                continue
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda file: file[0].st_mtime):
            if total <= (self.limit or 0):
                return
            if path.name not in keep and path.name not in self._held and _remove_unless_held(path):
                total -= stat.st_size

    def _hold(self, file: RemoteFile) -> None:
        """Keep a file from being evicted, by a shared lock on it."""
        while True:
            path = self.fetch(file)
            try:
                lock = path.open("rb")
            except FileNotFoundError:  # evicted in between
                continue
            fcntl.flock(lock, fcntl.LOCK_SH)
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                os.utime(path)
                self._held[file.name] = lock
                return
            lock.close()

    def after_fork(self) -> None:
        """In a forked process, let go of what is the parent's: locks and threads."""
        if self._process != os.getpid():
            for lock in self._held.values():
                lock.close()  # this process's copy: the parent's lock stays
            self._held, self._coming, self._queue, self._process = {}, {}, None, os.getpid()

    def _submit(self, file: RemoteFile) -> "Future[None]":
        if self._queue is None:
            self._queue = queue.SimpleQueue()
            # Daemons, unlike an executor's threads: a process that ends does not wait for what it will not need.
            for _ in range(_THREADS):
                threading.Thread(target=_serve, args=(self._queue, self.fetch), daemon=True).start()
        future: Future[None] = Future()
        self._queue.put((future, file))
        return future

    def _download(self, file: RemoteFile, path: Path) -> None:
        partial = self.directory / f".{file.name}.partial"
        url = f"{self.url}/{file.name}"

        def attempt() -> None:
            files, remote = file_system(url)
            files.get_file(remote, str(partial))
            if (found := file_checksum(partial)) != file.sha256:
                raise _CorruptError(f"checksum {found[:12]}... instead of {file.sha256[:12]}...")

        try:
            with_retries(url, attempt)
            partial.replace(path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            partial.unlink(missing_ok=True)


class _CorruptError(Exception):
    """What came is not what was sent."""


def _is_there(path: Path, file: RemoteFile) -> bool:
    try:
        return path.stat().st_size == file.num_bytes
    except FileNotFoundError:
        return False


def _remove_unless_held(path: Path) -> bool:
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _serve(tasks: "queue.SimpleQueue[tuple[Future[None], RemoteFile]]", fetch: Callable[[RemoteFile], object]) -> None:
    while True:
        future, file = tasks.get()
        try:
            fetch(file)
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)
