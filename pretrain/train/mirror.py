"""A copy of a run at an address: what it writes goes there as it trains, and comes back where the disk has gone.

Checkpoints that come from there are not trusted: each carries its own checksum, so one that was half copied, or
damaged on its way, is passed over as a damaged file is. The run's small files are taken as they are. The disk stays the
first place: training waits for no network.
"""

import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pretrain.corpus.remote import is_remote
from pretrain.corpus.remote_files import ATTEMPTS, file_system, put_file, remove_file, with_retries
from pretrain.corpus.whole import exclusive
from pretrain.errors import UserError, one_line
from pretrain.files import atomic_path
from pretrain.lock import locked
from pretrain.train.checkpoint import CHECKPOINTS, checkpoints_in, is_checkpoint_name
from pretrain.train.divided import parts_of
from pretrain.train.run import LOCK, ORIGIN, RESULT
from pretrain.train.spikes import read_skips


class Mirror:
    """A run's copy at an fsspec URL.

    Args:
        url: The address of its directory, such as ``s3://bucket/runs/a``; one run's only.
        directory: The run.

    Raises:
        UserError: If it is no address.
    """

    def __init__(self, url: str, directory: Path) -> None:
        if not is_remote(url):
            raise UserError(
                f"checkpoint.remote is {url!r}; give an address such as s3://bucket/runs/a, or null for none"
            )
        self.url, self.directory = url.rstrip("/"), directory
        self._copied: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._waiting: tuple[Path, Callable[[list[str]], list[str]]] | None = None
        self._thread: threading.Thread | None = None
        self._running = False
        self._unreachable = False
        self.in_use: set[str] = set()

    # --- what is there ------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints there, the oldest first."""
        return [name for name in self._list(CHECKPOINTS) if is_checkpoint_name(name)]

    def reachable_checkpoints(self) -> list[str]:
        """As `checkpoints`; none, with a warning, if the address cannot be reached and there is one to go on from here.

        That may be an older one. Then its steps are taken again, to the same bits.
        """
        if self._unreachable:
            return []
        try:
            return self.checkpoints()
        except UserError as error:
            if not checkpoints_in(self.directory / CHECKPOINTS):
                raise
            self._unreachable = True
            _warn(f"{error}; the run goes on from what is here")
            return []

    def bring_files(self, of_a_branch: bool = False) -> None:
        """Put the files of the run that lie there in place of those here, where the run has gone on there.

        So it has, if it has a newer checkpoint there, unless a loss spike took that back: of two histories that with
        more skips is the later one. Where a process trains here, nothing changes.

        Args:
            of_a_branch: Whether only a branch may be there.

        Raises:
            UserError: If another run is.
        """
        if not (there := self.reachable_checkpoints()):
            return
        if of_a_branch and not (self.directory / ORIGIN).is_file() and ORIGIN not in self._list(""):
            raise UserError(
                f"checkpoint.remote: {self.url} holds a run that is no branch; give the branch an address of its own"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        with exclusive(self.directory.with_name(f".{self.directory.name}.mirror.lock")):
            here = checkpoints_in(self.directory / CHECKPOINTS)
            if here and here[-1].name >= there[-1]:
                return
            try:
                with locked(self.directory / LOCK):
                    self._replace_files(there[-1])
            except BlockingIOError:
                return

    def _replace_files(self, newest: str) -> None:
        aside = self.directory / ".mirror"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            for name in self._list(""):
                with atomic_path(aside / name, replace=True) as partial:
                    self._get(name, partial)
            if len(read_skips(aside)) >= len(read_skips(self.directory)):
                for path in aside.iterdir():
                    path.replace(self.directory / path.name)
                # So that the next process of this machine finds nothing to do, and leaves the lock to who trains.
                self.bring(newest, replace=False)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def bring(self, name: str, replace: bool) -> None:
        """Fetch a checkpoint; with ``replace`` also where there is one of that name, which was found to be damaged.

        Raises:
            UserError: If it cannot be fetched.
        """
        path = self.directory / CHECKPOINTS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_name(f".{name}.lock")):
            if path.exists() and not replace:  # another process of this machine was faster
                return
            with atomic_path(path, replace=True) as partial:
                self._get(f"{CHECKPOINTS}/{name}", partial)
                begins = f"{path.stem}.part-"
                for part in [part for part in self._list(CHECKPOINTS) if part.startswith(begins)]:
                    with atomic_path(path.with_name(part), replace=True) as partial_part:
                        self._get(f"{CHECKPOINTS}/{part}", partial_part)

    # --- what goes there ----------------------------------------------------------------------------------------------

    def push(self, checkpoint: Path, surplus: Callable[[list[str]], list[str]]) -> None:
        """Copy the run's files and then a checkpoint, in the background; one that still waits is left out.

        Args:
            checkpoint: The file, which must stay as long as its name is `in_use`.
            surplus: Says which of the checkpoints there may go, once this one is there.
        """
        with self._lock:
            self._waiting = checkpoint, surplus
            self.in_use.add(checkpoint.name)
            if not self._running:
                self._running = True
                # A daemon: what ends the process, such as a second Ctrl-C, need not wait for it.
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def finish(self) -> None:
        """Wait until nothing is being copied."""
        if self._thread is not None:
            self._thread.join()

    def push_all(self) -> None:
        """Copy, before this returns, what is not there: the newest checkpoint, and the run's files.

        Raises:
            UserError: If that fails.
        """
        self.finish()
        self._push_all(ATTEMPTS)

    def begin(self) -> None:
        """As `push_all`, before a run trains; if it fails, a run that has begun before goes on with a warning.

        Raises:
            UserError: If it fails and there is no checkpoint here yet: then the address is probably wrong.
        """
        try:
            self._push_all(3)
        except UserError as error:
            if not checkpoints_in(self.directory / CHECKPOINTS):
                raise
            _warn(f"{error}; the run goes on, and tries again with its next checkpoint")

    def _push_all(self, attempts: int) -> None:
        self._push_files(attempts)
        if RESULT in self._list("") and not (self.directory / RESULT).exists():  # the run goes on
            self._remove(RESULT, attempts)
        here = checkpoints_in(self.directory / CHECKPOINTS)
        newest = here[-1].stem if here else ""
        if read_skips(self.directory):  # a checkpoint there that is newer is of the history that was taken back
            for name in self._list(CHECKPOINTS):
                if name.startswith("step-") and name.partition(".")[0] > newest:
                    self._remove(f"{CHECKPOINTS}/{name}", attempts)
        if here and here[-1].name not in self.checkpoints():
            self._put_checkpoint(here[-1], attempts)

    def _work(self) -> None:
        while True:
            with self._lock:
                task, self._waiting = self._waiting, None
                self.in_use = {task[0].name} if task else set()
                if task is None:
                    self._running = False
                    return
            checkpoint, surplus = task
            try:
                self._push_files(ATTEMPTS)
                self._put_checkpoint(checkpoint, ATTEMPTS)
                self._tidy(checkpoint, surplus(self.checkpoints()))
            except Exception as error:  # each protocol's library has exceptions of its own
                said = one_line(error, 300)
                _warn(f"{checkpoint.name} is not copied ({said}); the run goes on, and tries again with its next one")

    def _tidy(self, newest: Path, surplus: list[str]) -> None:
        """Remove what is older than a checkpoint and surplus, with its parts; and parts that have no checkpoint."""
        names = self._list(CHECKPOINTS)  # sorted: a checkpoint comes before its parts
        kept = {name.removesuffix(".ckpt") for name in names if name.endswith(".ckpt") and name not in surplus}
        for name in names:
            if (begins := name.partition(".")[0]) not in kept and begins <= newest.stem and name.startswith("step-"):
                self._remove(f"{CHECKPOINTS}/{name}", ATTEMPTS)

    def _push_files(self, attempts: int) -> None:
        for path in sorted(self.directory.iterdir()):
            if path.name.startswith(".") or not path.is_file():
                continue
            stat = path.stat()
            if self._copied.get(path.name) != (state := (stat.st_mtime_ns, stat.st_size)):
                self._put(path, path.name, attempts)
                self._copied[path.name] = state

    def _put_checkpoint(self, checkpoint: Path, attempts: int) -> None:
        for file in (*parts_of(checkpoint), checkpoint):  # the file itself last: only with it is there a checkpoint
            self._put(file, f"{CHECKPOINTS}/{file.name}", attempts)

    # --- one file -----------------------------------------------------------------------------------------------------

    def _list(self, below: str) -> list[str]:
        def attempt() -> list[str]:
            files, path = file_system(f"{self.url}/{below}".rstrip("/"))
            try:
                entries = files.ls(path, detail=True)
            except FileNotFoundError:
                entries = []
            names = [PurePosixPath(entry["name"]).name for entry in entries if entry["type"] == "file"]
            return sorted(name for name in names if not name.startswith("."))

        return with_retries(self.url, attempt, 3)

    def _get(self, name: str, to: Path) -> None:
        def attempt() -> None:
            files, path = file_system(f"{self.url}/{name}")
            files.get_file(path, str(to))

        with_retries(f"{self.url}/{name}", attempt, 3)

    def _remove(self, name: str, attempts: int) -> None:
        remove_file(f"{self.url}/{name}", attempts)

    def _put(self, file: Path, name: str, attempts: int) -> None:
        put_file(file, f"{self.url}/{name}", attempts)


def _warn(text: str) -> None:
    print(f"pretrain: warning: {text}", file=sys.stderr, flush=True)
