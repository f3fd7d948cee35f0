"""Files from afar in a local directory: each fetched once, checked, kept while it is used, and then evicted.

The directory may be shared by any processes of one host. A file is downloaded under an exclusive lock; a process that
needs it for longer holds a shared lock on it, and only what nobody holds is evicted. The kernel releases the locks of a
process that ends, however it ends.
"""

import errno
import fcntl
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from pretrain.corpus.store import file_checksum
from pretrain.corpus.whole import exclusive
from pretrain.errors import UserError, disk_is_full, how_to_install

ATTEMPTS = 9
"""Downloads of one file before giving up: about four minutes, with what `_wait` waits in between."""

_THREADS = 4


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

    def fetch(self, file: RemoteFile, attempts: int = ATTEMPTS) -> Path:
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
                    self._download(file, path, attempts)
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

    def _download(self, file: RemoteFile, path: Path, attempts: int) -> None:
        partial = self.directory / f".{file.name}.partial"
        url = f"{self.url}/{file.name}"

        def attempt() -> None:
            files, remote = file_system(url)
            files.get_file(remote, str(partial))
            if (found := file_checksum(partial)) != file.sha256:
                raise _CorruptError(f"checksum {found[:12]}... instead of {file.sha256[:12]}...")

        try:
            with_retries(url, attempt, attempts)
            partial.replace(path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            partial.unlink(missing_ok=True)


class _CorruptError(Exception):
    """What came is not what was sent."""


def with_retries(url: str, attempt: Callable[[], None], attempts: int = ATTEMPTS, action: str = "read") -> None:
    """Try something with an address until it succeeds, waiting longer each time; each failure is told on stderr.

    Raises:
        UserError: If there is no such file, or the last attempt fails.
        OSError: If the local disk is full, or not to be written to.
    """
    for number in range(1, attempts + 1):
        try:
            return attempt()
        except (FileNotFoundError, PermissionError) as error:
            if error.errno == errno.EACCES and error.filename and str(error.filename) not in url:  # a file of ours
                raise
            raise UserError(f"{url}: {_said(error)}; check the address and your rights there") from error
        except ImportError as error:
            raise UserError(f"{url}: {_said(error)}; s3:// needs {how_to_install('s3')}") from error
        except Exception as error:  # each protocol's library has exceptions of its own
            if isinstance(error, OSError) and (disk_is_full(error) or error.errno == errno.EROFS):
                raise
            if number == attempts:
                raise UserError(
                    f"{url}: cannot be {action} ({_said(error)}) in {attempts} attempts; check the address and the "
                    "network, and give the same command again"
                ) from error
            seconds = min(2.0 ** (number - 1), 60.0)
            print(f"pretrain: warning: {url}: {_said(error)}; again in {seconds:.0f} s", file=sys.stderr, flush=True)
            _wait(seconds)


def _wait(seconds: float) -> None:
    time.sleep(seconds)


def _said(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return said[:300] or type(error).__name__


def file_system(url: str) -> tuple[Any, str]:
    """What reads and writes an address, and the path there."""
    import fsspec

    files, path = fsspec.core.url_to_fs(url)
    files.invalidate_cache()  # a listing of before must not say that the file is missing
    return files, path


_BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}
"""Where there are no directories to make, and a mistyped bucket should not come to be."""


def put_file(file: Path, url: str, attempts: int = ATTEMPTS) -> None:
    """Copy a local file to an address, in several attempts if need be.

    Raises:
        UserError: If it cannot be written there.
    """

    def attempt() -> None:
        files, remote = file_system(url)
        size = file.stat().st_size  # a file of lines may grow meanwhile
        if not _BUCKETS.intersection([files.protocol] if isinstance(files.protocol, str) else files.protocol):
            files.makedirs(str(PurePosixPath(remote).parent), exist_ok=True)
        files.put_file(str(file), remote)
        files.invalidate_cache()
        if (stored := files.size(remote)) < size:
            raise OSError(f"{stored} of {size} bytes are there")

    with_retries(url, attempt, attempts, "written")


def get_file(url: str, file: Path) -> bool:
    """Copy a file from an address, in several attempts if need be; False if there is none.

    Raises:
        UserError: If it cannot be read.
    """

    def attempt() -> None:
        files, remote = file_system(url)
        if files.exists(remote):
            files.get_file(remote, str(file))

    with_retries(url, attempt)
    return file.is_file()


def remove_file(url: str) -> None:
    """Remove a file at an address, if it is there."""

    def attempt() -> None:
        files, remote = file_system(url)
        if files.exists(remote):
            files.rm_file(remote)

    with_retries(url, attempt, action="removed")


def written_at(url: str) -> float | None:
    """When a file at an address was written, in seconds since 1970 (0 if that is not told); None if there is none.

    Object stores tell whole seconds, rounded down: it is the end of that second, before which it was surely written.

    Raises:
        UserError: If that cannot be found out.
    """
    found: list[float | None] = []

    def attempt() -> None:
        files, remote = file_system(url)
        if not files.exists(remote):
            found.append(None)
            return
        try:
            found.append(math.floor(files.modified(remote).timestamp()) + 1.0)
        except NotImplementedError:
            found.append(0.0)

    with_retries(url, attempt, 3)
    return found[0]


def read_remote(url: str, attempts: int = 3) -> bytes:
    """A small file from afar.

    Raises:
        UserError: If it is not there, or cannot be had in so many attempts.
    """
    content: list[bytes] = []

    def attempt() -> None:
        files, path = file_system(url)
        content.append(files.cat_file(path))

    with_retries(url, attempt, attempts)
    return content[0]


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
