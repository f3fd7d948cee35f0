"""Files that are there whole or not at all, also after a killed process, a full disk or a power cut."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import IO

from pretrain.errors import UserError
from pretrain.lock import locked

_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What a write that fails says, but not where."""


def refuse_existing(out: Path) -> None:
    """Raises `UserError` if there is something at ``out``."""
    if out.exists():
        raise UserError(f"{out}: exists already; choose another name, or remove it first")


def check_suffix(path: Path, suffix: str) -> None:
    """Keep a file of another kind from being replaced by what is written.

    Raises:
        UserError: If the name does not end in ``suffix``.
    """
    if path.suffix != suffix:
        raise UserError(f"{path}: the name must end in {suffix}, which is what is written")


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Keep other commands from writing ``path`` for as long as this lasts; makes its directory.

    Raises:
        UserError: If another process writes it.
    """
    _make_parent(path)
    lock = path.with_name(f".{path.name}.lock")
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock))
        except BlockingIOError as error:
            raise UserError(f"{path}: {error.strerror} is writing it; wait for it, or choose another name") from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        held.callback(lock.unlink, missing_ok=True)
        yield


@contextmanager
def atomic_path(path: Path, replace: bool = False) -> Iterator[Path]:
    """A path beside ``path`` for a file that becomes ``path`` when the block ends, and vanishes when it fails.

    Args:
        path: The file.
        replace: Whether it may be there already. Then the caller sees to it that no other process writes it: the lock
            of a run or a corpus does, or `only_writer`.

    Raises:
        UserError: If it is there and may not be, or another process writes it.
    """
    with nullcontext() if replace else only_writer(path):
        if not replace:
            refuse_existing(path)
        _make_parent(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            yield partial
            _sync(partial)
            partial.rename(path)
        except OSError as error:
            if error.errno not in _OF_WRITING and error.filename != str(partial):
                raise
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            partial.unlink(missing_ok=True)
        _sync(path.parent)


@contextmanager
def atomic_file(path: Path, replace: bool = False) -> Iterator[IO[str]]:
    """As `atomic_path`, a text file that is open."""
    with atomic_path(path, replace) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        yield file


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` that becomes ``out`` when the block ends, and vanishes when it fails.

    Raises:
        UserError: If ``out`` is there and not empty, or another process writes it.
    """
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    with only_writer(out):
        if not out.is_dir() or any(out.iterdir()):
            refuse_existing(out)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            _sync_tree(partial)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _sync(out.parent)


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # what Python says where the parent is a file
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


def write_whole(path: Path, text: str, replace: bool = False) -> None:
    """Write a small file; see `atomic_path`."""
    with atomic_file(path, replace) as file:
        file.write(text)


def append_line(path: Path, line: str) -> None:
    """Add a line, given without its end, and wait for the disk; what a killed process left half-written goes first."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def link(path: Path, target: str) -> None:
    """Let a symbolic link point to a file beside it, in one step."""
    aside = path.with_name(f".{path.name}.partial")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.rename(path)
    _sync(path.parent)


def _sync_tree(directory: Path) -> None:
    """Wait until the disk has all files of a directory, and their names."""
    for parent, _, names in os.walk(directory):
        for name in names:
            if not os.path.islink(file := os.path.join(parent, name)):
                _sync(file)
        _sync(parent)


def _sync(path: Path | str) -> None:
    """Wait until the disk has a file's content, or a directory's entries: a rename in it, or a link."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
