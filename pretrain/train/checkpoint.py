"""What is saved, when and how: whole files or none, and nothing that has to be unpickled."""

import errno
import os
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from typing_extensions import override

from pretrain.errors import UserError

LAST = "last.ckpt"


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside, syncs, renames: a killed process or a full disk leaves the previous file as it was."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        except RuntimeError as error:  # what torch makes of a write that the disk refused
            if shutil.disk_usage(path.parent).free > 2**20:
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        finally:
            partial.unlink(missing_ok=True)
        _sync_directory(path.parent)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), mapped=False)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path, mapped: bool = True) -> dict[str, Any]:
    """A checkpoint's content on the CPU. Tensors and plain values only: nothing is executed.

    Args:
        path: The file.
        mapped: Read tensors when they are touched, rather than now.

    Raises:
        UserError: If the file is missing or is no complete checkpoint of that kind.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if not isinstance(checkpoint, dict) or not {"state_dict", "global_step"} <= checkpoint.keys():
            raise ValueError("it has no state_dict and global_step")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except (
        Exception
    ) as error:  # torch.load raises whatever its readers meet: RuntimeError, UnpicklingError, EOFError ...
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(f"{path}: not a complete checkpoint of tensors and plain values ({reason})") from error
    return checkpoint


def newest_checkpoint(directory: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest readable checkpoint of a directory: path, content, and why newer ones were passed over."""
    problems: list[str] = []
    for path in sorted(directory.glob("step-*.ckpt"), reverse=True):
        try:
            return path, read_checkpoint(path), problems
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(f"{problems[0]}; no other checkpoint is left in {directory}: remove the run to start it again")
    return None


class RunInterruptedError(Exception):
    """A signal asked for the run to end; it ended after a whole step, with a checkpoint."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(
            f"interrupted by {signal.Signals(signal_number).name} after step {step}; a checkpoint is saved"
        )
        self.signal_number = signal_number


class StepCheckpoint(Checkpoint):
    """Saves at the ends of optimizer steps: every so many, after so much time, at the end, and on SIGINT or SIGTERM.

    A checkpoint is written when the next step begins, so that a validation that falls on the same step comes first.
    Files are named by step; ``last.ckpt`` is a link to the newest.

    Args:
        directory: Where checkpoints go.
        every_n_steps: Steps between checkpoints; None for none by step.
        every_minutes: Minutes after which one is due in any case.
        keep_last: How many of the newest to keep.

    Raises:
        UserError: If an interval or ``keep_last`` is not positive.
    """

    def __init__(
        self, directory: Path, every_n_steps: int | None = None, every_minutes: float = 15.0, keep_last: int = 2
    ) -> None:
        if (every_n_steps is not None and every_n_steps < 1) or every_minutes <= 0 or keep_last < 1:
            raise UserError(
                f"checkpoint.every_n_steps is {every_n_steps}, every_minutes {every_minutes}, keep_last {keep_last}; "
                "each must be positive (every_n_steps: null saves by time alone)"
            )
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep_last = keep_last
        self._saved_step = 0
        self._saved_time = time.monotonic()
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()
        # Lightning's own handlers act in the middle of a step, and broadcast and save inside the handler.
        self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: leave at once
        self._signal = number

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save, and end the run if a signal came, between two steps."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        number = self._agreed(trainer, self._signal or 0)
        if number or self._due(trainer):
            self._save(trainer)
        if number:
            raise RunInterruptedError(number, trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the finished run."""
        self._save(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _due(self, trainer: pl.Trainer) -> bool:
        by_step = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        late = time.monotonic() - self._saved_time > 60 * self.every_minutes
        return bool(by_step) or bool(self._agreed(trainer, int(late)))

    @staticmethod
    def _agreed(trainer: pl.Trainer, value: int) -> int:
        """The largest of the processes' values, on all of them: they must save and stop at the same step."""
        if trainer.world_size == 1:
            return value
        tensor = torch.tensor(value, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(tensor, reduce_op="max"))

    def _save(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if step == self._saved_step:
            return
        path = self.directory / f"step-{step:09d}.ckpt"
        trainer.save_checkpoint(path)
        self._saved_step, self._saved_time = step, time.monotonic()
        if trainer.is_global_zero:
            _link(self.directory / LAST, path.name)
            for old in sorted(self.directory.glob("step-*.ckpt"))[: -self.keep_last]:
                old.unlink()


def _link(link: Path, target: str) -> None:
    aside = link.with_name(f".{link.name}.partial")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.rename(link)
    _sync_directory(link.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
