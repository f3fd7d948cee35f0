"""Branching: a new run that begins where a checkpoint of another one stands."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.files import new_directory, write_whole
from pretrain.train.checkpoint import CHECKPOINTS, LAST, checkpoint_name, is_checkpoint_name
from pretrain.train.divided import parts_of
from pretrain.train.logging import METRICS_FILE, LineFile, step_of_csv
from pretrain.train.run import CONFIG, LEDGER, ORIGIN, SICK, Run
from pretrain.train.sick import step_of_json
from pretrain.train.spikes import SKIPS


class Branch:
    """Where a run branches off, and the run that it becomes.

    The new run is written when training is about to begin, whole or not at all: the checkpoint, the settings it was
    made with, what was consumed and logged up to it (but for TensorBoard's files: its curves begin at the branch), and
    ``origin.json``, which says where all that comes from. From then on it is a run like any other.

    Args:
        directory: Of the new run.
        source: A run (its newest checkpoint), or a checkpoint in one.

    Raises:
        UserError: If there is no such checkpoint, or the directory is a run that has begun elsewhere.
    """

    def __init__(self, directory: Path, source: Path) -> None:
        self.directory = directory
        self.step = _origin_step(directory, source)
        self.origin: Run | None = None
        if self.step is not None:
            return
        inside = source.is_file()
        if inside and not is_checkpoint_name(source.resolve().name):
            raise UserError(
                f"branch_from: {source} is not named as a run names its checkpoints ({checkpoint_name(500)}); "
                "give it back its own"
            )
        home = source.resolve().parent.parent if inside else source
        if not (home / CONFIG).is_file():
            raise UserError(f"branch_from: {source} is neither a run nor a checkpoint in one; give either")
        if home.resolve() == directory.resolve():
            raise UserError(f"branch_from: {source} is of the run itself; choose a new directory with --run")
        self.origin = Run(home, source.resolve() if inside else None)
        if self.origin.checkpoint is None:
            raise UserError(f"branch_from: {source} has no checkpoint yet; train it first")

    def create(self) -> None:
        """Write the new run, which was not there before: ``origin`` is known.

        Raises:
            UserError: If another process makes the directory, or has made it meanwhile.
        """
        origin = self.origin
        assert origin is not None
        checkpoint = origin.checkpoint
        assert checkpoint is not None
        with new_directory(self.directory) as partial:
            self._write(origin, checkpoint, partial)

    def _write(self, origin: Run, checkpoint: Path, to: Path) -> None:
        (to / CHECKPOINTS).mkdir()
        for file in (checkpoint, *parts_of(checkpoint)):
            _link_or_copy(file, to / CHECKPOINTS / file.name)
        (to / CHECKPOINTS / LAST).symlink_to(checkpoint.name)
        shutil.copy(origin.directory / CONFIG, to / CONFIG)
        for name, step_of in ((LEDGER, step_of_csv), (METRICS_FILE, step_of_csv), (SICK, step_of_json)):
            if (origin.directory / name).is_file():
                shutil.copy(origin.directory / name, to / name)
                with (to / name).open(encoding="utf-8", errors="replace") as copied:
                    begins = copied.readline() if step_of is step_of_csv else ""
                lines = LineFile(to / name, begins, origin.step, step_of)
                lines.flush(sync=True)
                lines.close()
        if (origin.directory / SKIPS).is_file():
            skips = (origin.directory / SKIPS).read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line, skip in zip(skips, origin.skips, strict=False) if skip.step <= origin.step]
            write_whole(to / SKIPS, "".join(kept))
        write_whole(to / ORIGIN, json.dumps(self._record(checkpoint), indent=1) + "\n")

    def _record(self, checkpoint: Path) -> dict[str, Any]:
        assert self.origin is not None
        assert self.origin.data_state is not None
        return {
            "run": str(self.origin.directory.resolve()),
            "checkpoint": checkpoint.name,
            "step": self.origin.step,
            "cursor": self.origin.data_state["cursor"],
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }


def _origin_step(directory: Path, source: Path) -> int | None:
    """The step at which a run that exists has branched off; None for a new one."""
    if not directory.is_dir() or not any(directory.iterdir()):
        return None
    try:
        origin = json.loads((directory / ORIGIN).read_text(encoding="utf-8"))
        home, step = str(origin["run"]), int(origin["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{directory}: exists, and is no branch of {source}; choose a new directory with --run, or leave "
            "--branch_from out to continue it"
        ) from error
    theirs = source.resolve().parent.parent if source.suffix == ".ckpt" else source.resolve()
    if Path(home) != theirs:
        raise UserError(
            f"{directory}: has branched off {home}, not {source}; choose a new directory with --run, or leave "
            "--branch_from out to continue it"
        )
    return step


def _link_or_copy(file: Path, to: Path) -> None:
    """Checkpoints are never written to again, so two runs may share one."""
    try:
        os.link(file, to)
    except FileNotFoundError as error:
        raise UserError(f"{file}: the run has gone on and removed it; give the same command again") from error
    except OSError:
        shutil.copyfile(file, to)
        with to.open("rb") as copied:
            os.fsync(copied.fileno())
