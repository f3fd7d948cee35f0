"""One process at a time in a directory, or at a file: a lock that ends with its owner, however it ends."""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pretrain.errors import UserError

_held: set[int] = set()


def _forget_in_child() -> None:
    """Close the locks in a forked process: a loader worker outlives a killed parent by seconds, its lock must not."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


class Lock:
    """A lock that is held, on a file that says who holds it.

    Args:
        path: The file.
        descriptor: Where it is open.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    def in_place(self) -> bool:
        """Whether the locked file is still the one at its path, rather than deleted or replaced."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False


@contextmanager
def locked(path: Path) -> Iterator[Lock]:
    """Hold a ``flock`` for as long as this lasts.

    Not a POSIX lock, which a process loses as soon as it closes *any* descriptor of the file, such as one that it only
    read the owner from.

    Raises:
        BlockingIOError: If another process holds it; its message is what the file says about the owner.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        lock = Lock(path, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 1000, 0).decode("utf-8", "replace").strip()
            raise BlockingIOError(error.errno, owner or "another process") from error
        if not lock.in_place():
            raise UserError(f"{path}: was removed or replaced meanwhile; give the command again")
        with suppress(OSError):  # on a full disk nobody is told who holds it
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        _held.add(descriptor)
        yield lock
    finally:
        _held.discard(descriptor)
        os.close(descriptor)
