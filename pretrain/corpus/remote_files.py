"""Files at fsspec URLs: read, written and removed, in several attempts if need be."""

import contextlib
import errno
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pretrain.errors import UserError, disk_is_full, how_to_install, one_line

Found = TypeVar("Found")

ATTEMPTS = 9
"""Tries with one file before giving up: about three minutes, with what `_wait` waits in between."""


def with_retries(url: str, attempt: Callable[[], Found], attempts: int = ATTEMPTS, action: str = "read") -> Found:
    """Try something with an address until it succeeds, waiting longer each time; each failure is reported on stderr.

    Returns:
        What the attempt that succeeds returns.

    Raises:
        UserError: If there is no such file, or the last attempt fails.
        OSError: If the local disk is full, or not to be written to.
    """
    number = 0
    while True:
        number += 1
        try:
            return attempt()
        except (FileNotFoundError, PermissionError) as error:
            if error.errno == errno.EACCES and error.filename and str(error.filename) not in url:  # a file of ours
                raise
            raise UserError(f"{url}: {one_line(error, 300)}; check the address and your rights there") from error
        except ImportError as error:
            remedy = f"s3:// needs {how_to_install('s3')}" if url.startswith("s3") else "install it"
            raise UserError(f"{url}: {one_line(error, 300)}; {remedy}") from error
        except Exception as error:  # each protocol's library has exceptions of its own
            if isinstance(error, OSError) and (disk_is_full(error) or error.errno == errno.EROFS):
                raise
            said = one_line(error, 300)
            if number == attempts:
                raise UserError(
                    f"{url}: cannot be {action} ({said}) in {attempts} attempts; check the address and the network, "
                    "and give the same command again"
                ) from error
            seconds = min(2.0 ** (number - 1), 60.0)
            print(f"pretrain: warning: {url}: {said}; again in {seconds:.0f} s", file=sys.stderr, flush=True)
            _wait(seconds)


def _wait(seconds: float) -> None:
    time.sleep(seconds)


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

    def attempt() -> bool:
        files, remote = file_system(url)
        try:  # `exists` would say no of a lost connection, too
            files.get_file(remote, str(file))
        except FileNotFoundError:
            return False
        return True

    return with_retries(url, attempt)


def remove_file(url: str, attempts: int = ATTEMPTS) -> None:
    """Remove a file at an address, if it is there, in several attempts if need be.

    Raises:
        UserError: If it cannot be removed.
    """

    def attempt() -> None:
        files, remote = file_system(url)
        with contextlib.suppress(FileNotFoundError):
            files.rm_file(remote)

    with_retries(url, attempt, attempts, "removed")


def written_at(url: str) -> float | None:
    """When a file at an address was written, in seconds since 1970 (0 if it does not say); None if there is none.

    Object stores tell whole seconds, rounded down: it is the end of that second, before which it was surely written.
    Not for the web, of which fsspec does not tell whether a file is missing or its server is down.

    Raises:
        UserError: If that cannot be found out.
    """

    def attempt() -> float | None:
        files, remote = file_system(url)
        with contextlib.suppress(FileNotFoundError):
            try:
                modified: float = files.modified(remote).timestamp()
                return math.floor(modified) + 1.0
            except NotImplementedError:
                files.info(remote)
                return 0.0
        return None

    return with_retries(url, attempt, 3)


def read_remote(url: str) -> bytes:
    """A small file.

    Raises:
        UserError: If it is not there, or cannot be had in three attempts.
    """

    def attempt() -> bytes:
        files, path = file_system(url)
        content: bytes = files.cat_file(path)
        return content

    return with_retries(url, attempt, 3)
