"""Directories that appear whole or not at all, made by one process at a time."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.errors import UserError, disk_is_full


def make_whole(out: Path, is_made: Callable[[Path], bool], fill: Callable[[Path], Path]) -> None:
    """Make a directory, or wait for whoever is making it; it is renamed to its place as the last act.

    Args:
        out: Where it appears.
        is_made: Whether what is at ``out`` is what is wanted.
        fill: Works in the directory beside ``out`` that it is given, and returns the one to rename: that, or one in
            it. What a killed call left there is there again, as long as a shard is.

    Raises:
        UserError: If something else is at ``out``, or the disk is full.
    """
    if is_made(out):  # perhaps where nothing can be written to
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{out}: cannot be made, as {error.filename} is a file; choose another place") from error
    partial = out.absolute().parent / f".{out.name}.partial"  # processes elsewhere may have another working directory
    with exclusive(out.parent / f".{out.name}.lock"):
        if is_made(out):  # by whoever had the lock
            return
        if out.exists():
            raise UserError(f"{out}: exists already and is no corpus; give another --out, or move it away")
        try:
            partial.mkdir(exist_ok=True)
            fill(partial).rename(out)
            shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            if not disk_is_full(error):
                raise
            raise UserError(
                f"{error.filename or partial}: {error.strerror}; make room and give the same command again: it "
                "continues where it stopped"
            ) from error
        finally:
            if not any(partial.glob("shard-*.arrow")):  # nothing that would be worth keeping
                shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait for the lock file at ``path``, hold it, and remove it."""
    while True:
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                ours = os.path.samestat(os.fstat(lock.fileno()), path.stat())
            except FileNotFoundError:
                ours = False
            if not ours:  # the one that held it removed it, so it protects nothing: try again with the present one
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                fcntl.flock(lock, fcntl.LOCK_UN)  # closing leaves it to a process that was forked meanwhile
            return
