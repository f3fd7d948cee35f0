"""Files that are there whole or not at all, also after a killed process, a full disk or a power cut."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pretrain.errors import UserError

_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What a write that fails says, but not where."""


def refuse_existing(out: Path) -> None:
    """Raises `UserError` if there is something at ``out``."""
    if out.exists():
        raise UserError(f"{out}: exists already; choose another name, or remove it first")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside ``path`` for a file that becomes ``path`` when the block ends, and vanishes when it fails."""
    _make_parent(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        if error.errno not in _OF_WRITING and error.filename != str(partial):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[str]]:
    """As `atomic_path`, a text file that is open."""
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        yield file


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` that becomes ``out`` when the block ends, and vanishes when it fails."""
    _make_parent(out)
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        sync_directory(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_directory(out.absolute().parent)


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # what Python says where the parent is a file
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


def write_whole(path: Path, text: str) -> None:
    """Write a small file."""
    with atomic_file(path) as file:
        file.write(text)


def append_line(path: Path, line: str) -> None:
    """Add a line, given without its end, and wait for the disk; what a killed process left half-written goes first."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def link(path: Path, target: str) -> None:
    """Let a symbolic link point to a file beside it, in one step."""
    aside = path.with_name(f".{path.name}.partial")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.rename(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Wait until the disk has a directory's entries: a rename in it, or a link."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
