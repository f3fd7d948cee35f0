"""When a run is saved, what of it is kept, and how it ends when a signal asks."""

import errno
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.strategies import Strategy
from typing_extensions import override

from pretrain.errors import UserError, disk_is_full
from pretrain.files import link
from pretrain.train.checkpoint import BEST, LAST, checkpoint_name, checkpoints_in, snapshot, step_of
from pretrain.train.divided import lost_parts, remove
from pretrain.train.mirror import Mirror
from pretrain.train.sharding import SAME_DIRECTORY, FullyShardedStrategy
from pretrain.train.spikes import RewindError
from pretrain.train.together import largest, wait_for_all

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Each asks a run to finish its step, save and end; SIGUSR1 is SLURM's warning before the time limit."""


class RunInterruptedError(Exception):
    """A signal asked for the run to end; it ended after a whole step, with a checkpoint if the disk took it."""

    def __init__(self, signal_number: int, step: int, saved: bool) -> None:
        state = "a checkpoint is saved" if saved else "the disk is too full for a checkpoint, an earlier one is left"
        where = f"after step {step}; {state}" if step else "before the first step"
        super().__init__(f"interrupted by {signal.Signals(signal_number).name} {where}")
        self.signal_number = signal_number


class Writing:
    """A checkpoint on its way to the disk: written by the first process, or by all; the others only know of it.

    It is written by a thread also where training waits for it: a second Ctrl-C then leaves at once.

    Args:
        step: The step that it is of.
        best_before: Which ones were the best before it.
    """

    def __init__(self, step: int, best_before: dict[int, float]) -> None:
        self.step, self.best_before = step, best_before
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begin to write it."""
        thread = threading.Thread(target=self._run, args=(write,), daemon=True)
        thread.start()
        self._thread = thread  # only now: one that has not been started, where a signal comes first, cannot be joined

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._error = error

    def wait(self) -> None:
        """Until it is written, or could not be."""
        if self._thread is not None:
            self._thread.join()

    def result(self) -> None:
        """Wait, and raise what went wrong."""
        self.wait()
        if self._error is not None:
            raise self._error

    def check(self) -> None:
        """Raise what has gone wrong so far, but for a full disk."""
        if self._error is not None and not (isinstance(self._error, OSError) and disk_is_full(self._error)):
            raise self._error


class StepCheckpoint(Checkpoint):
    """Saves at the ends of optimizer steps: every so many, after so much time, at the end, and when a signal asks.

    A checkpoint is taken when the next step begins, so that a validation that falls on the same step comes first.
    Files are named by step; ``last.ckpt`` is a link to the newest, ``best.ckpt`` to the best. On a full disk the run
    goes on without, and tries again when the next one is due.

    Args:
        directory: Where checkpoints go.
        before_save: Called on all processes before each attempt; what has to be on disk before a checkpoint is.
        mirror: Where each checkpoint and the run's files are copied to, in the background; None for nowhere.
        every_n_steps: Steps between checkpoints; null: none by step.
        every_minutes: Minutes after which one is due in any case.
        keep_last: How many of the newest to keep.
        keep_every_n_steps: Save at the multiples of this, and keep those for good; null: none.
        keep_best: How many of the best by validation loss to keep, saved when validated; null: none.
        remote: Address to copy each checkpoint and the run's files to, in the background (``s3://bucket/runs/a``, or
            whatever fsspec knows); a run whose disk is gone continues from there. null: none. Only for `pretrain fit`
            and `pretrain finetune`.
        in_background: Copy what is to be saved, in host memory, and write it while training goes on; otherwise training
            waits, and no memory is needed for a copy (under FSDP2 there is one in any case).

    Raises:
        UserError: If an interval or a number to keep is not positive.
    """

    def __init__(
        self,
        directory: Path,
        before_save: Callable[[pl.Trainer], None] = lambda trainer: None,
        mirror: Mirror | None = None,
        every_n_steps: int | None = None,
        every_minutes: float = 15.0,
        keep_last: int = 2,
        keep_every_n_steps: int | None = None,
        keep_best: int | None = None,
        remote: str | None = None,
        in_background: bool = True,
    ) -> None:
        counts = {
            "every_n_steps": every_n_steps,
            "every_minutes": every_minutes,
            "keep_last": keep_last,
            "keep_every_n_steps": keep_every_n_steps,
            "keep_best": keep_best,
        }
        for name, count in counts.items():
            if count is not None and count <= 0:
                remedy = "" if name in ("every_minutes", "keep_last") else ", or null for none"
                raise UserError(f"checkpoint.{name} is {count}; give a positive number{remedy}")
        self.directory = Path(directory)
        self.before_save = before_save
        self.mirror = mirror
        self.in_background = in_background
        self._writing: Writing | None = None
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep_last = keep_last
        self.keep_every_n_steps = keep_every_n_steps
        self.keep_best = keep_best or 0
        self._best: dict[int, float] = {}  # validation loss by step, best first
        self._validation: tuple[int, float] = (0, math.inf)
        self._saved_step = 0
        self._tried_time = time.monotonic()
        self._signal: int | None = None
        self._interrupted = False
        self._handlers: dict[int, Any] = {}
        self._divided = False

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best} if self._best else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        there = {path.name for path in checkpoints_in(self.directory)}
        there |= set(self.mirror.reachable_checkpoints() if self.mirror else ())
        self._best = {step: loss for step, loss in state_dict["best"].items() if checkpoint_name(step) in there}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning's own handlers act in the middle of a step, broadcast and save inside the handler, and end a process
        # with exit code 0. Until the first step a signal may do what it does by itself: there is nothing to save.
        trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            # Lightning shares a SIGTERM at every batch, and waits for the GPU to do so; here it is agreed upon at every
            # step, and between the hosts.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
        self._divided = isinstance(trainer.strategy, FullyShardedStrategy)
        step = trainer.global_step
        if (newest := largest(trainer, step)) != (oldest := -largest(trainer, -step)):
            raise UserError(
                f"{self.directory}: the processes continue from different steps, {oldest} to {newest}; {SAME_DIRECTORY}"
            )
        self._saved_step, self._tried_time = step, time.monotonic()
        self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:  # asked twice: leave at once
            # Not by an exception where a thread speaks to others, which would abort the process; or where the loader's
            # workers are being ended, which would only print it.
            if self._interrupted or (self._divided and self._writing is not None):
                os.write(2, b"\npretrain: error: interrupted\n")
                os._exit(128 + number)
            raise KeyboardInterrupt
        if self._signal is None:  # SLURM's SIGTERM follows its warning, which asks for more
            self._signal = number

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save, and end the run if a signal came, between two steps."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        if self._writing is not None:
            self._writing.check()
        late = time.monotonic() - self._tried_time > 60 * self.every_minutes
        # Agreed upon in any case: what is due depends on the best ones, of which a process may know less than another.
        number = largest(trainer, self._signal or int(late or self._due(trainer.global_step)))
        if number:  # a signal's is 2 or more
            self._save(trainer)
        if number > 1:
            raise RunInterruptedError(number, trainer.global_step, self.finish(trainer))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation = (trainer.global_step, float(trainer.callback_metrics.get("val/loss", math.inf)))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the finished run.

        Raises:
            OSError: If the disk is full: the last steps are not safe, and there is no later attempt.
        """
        self._save(trainer)
        if not self.finish(trainer):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory))
        self._finish_copies(trainer)

    def _finish_copies(self, trainer: pl.Trainer) -> None:
        if self.mirror:
            self.mirror.finish()
            wait_for_all(trainer)  # a launcher would end the process that copies when the others have ended

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Let signals do what they did before; after a `RunInterruptedError`, who catches it is to call this."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._writing is not None and not isinstance(exception, KeyboardInterrupt):
            self._writing.wait()  # what begins next looks at the checkpoints
        if isinstance(exception, RewindError | RunInterruptedError):  # on all processes
            self._finish_copies(trainer)  # also before checkpoints that are being copied are taken back
        self._interrupted = isinstance(exception, RunInterruptedError)
        if not self._interrupted:
            self.restore_handlers()

    def _due(self, step: int) -> bool:
        if any(every and step % every == 0 for every in (self.every_n_steps, self.keep_every_n_steps)):
            return True
        return step in self._ranking(step)

    def _ranking(self, step: int) -> dict[int, float]:
        """The best by validation loss, best first, with this step where it was validated and is among them."""
        losses = dict(self._best)
        if self._validation[0] == step and math.isfinite(self._validation[1]):
            losses[step] = self._validation[1]
        return dict(sorted(losses.items(), key=lambda item: (item[1], item[0]))[: self.keep_best])

    def _save(self, trainer: pl.Trainer) -> None:
        """Begin to save this step, unless it is saved; what is still being written is waited for first."""
        step = trainer.global_step
        if self.finish(trainer):
            return
        self._tried_time = time.monotonic()
        previous, self._best = self._best, self._ranking(step)
        if self._refused(trainer, lambda: self.before_save(trainer)):
            self._best = previous
            if trainer.is_global_zero:
                self._warn(step)
            return
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        self._writing = Writing(step, previous)
        if trainer.is_global_zero or self._divided:  # where tensors are divided, each process writes its part of them
            # Further steps change the tensors, so that a thread needs a copy of them, which divided ones are already.
            content = snapshot(checkpoint) if self.in_background and not self._divided else checkpoint
            self._writing.start(lambda: self._write(trainer.strategy, content, step))
        if not self.in_background:
            self.finish(trainer)

    def finish(self, trainer: pl.Trainer) -> bool:
        """Wait for what is being written; whether this step is saved. All processes must take part.

        Raises:
            Exception: Whatever went wrong, but for a full disk, which may have room again by the next time.
        """
        if (writing := self._writing) is not None:
            refused = self._refused(trainer, writing.result)
            self._writing = None  # only now: a second Ctrl-C must know that a thread is writing
            if refused:
                self._best = writing.best_before
            else:
                self._saved_step = writing.step
        return self._saved_step == trainer.global_step

    def _refused(self, trainer: pl.Trainer, write: Callable[[], None]) -> bool:
        """Whether the disk was too full for a write, on any of the processes."""
        full = False
        try:
            write()
        except OSError as error:
            if not disk_is_full(error):
                raise
            full = True
        return bool(largest(trainer, int(full)))

    def _write(self, strategy: Strategy, content: dict[str, Any], step: int) -> None:
        try:
            strategy.save_checkpoint(content, self.directory / checkpoint_name(step))
            if strategy.is_global_zero:
                self._tidy(step)
        except OSError as error:
            if disk_is_full(error) and strategy.is_global_zero:
                self._warn(step)
            raise

    def _warn(self, step: int) -> None:
        path = self.directory / checkpoint_name(step)
        print(
            f"pretrain: warning: {path}: {os.strerror(errno.ENOSPC)}; the run goes on, its newest checkpoint is that "
            f"after step {self._saved_step}: make room before the next one is due",
            file=sys.stderr,
            flush=True,
        )

    def _tidy(self, step: int) -> None:
        """Let the links point at the new files, then remove the old ones."""
        link(self.directory / LAST, checkpoint_name(step))
        best = [checkpoint_name(step) for step in self._best]
        if best and (self.directory / best[0]).exists():
            link(self.directory / BEST, best[0])
        if self.mirror:
            self.mirror.push(self.directory / checkpoint_name(step), lambda names: self._surplus(names, step, best))
        for name in self._surplus([path.name for path in checkpoints_in(self.directory)], step, best):
            if not self.mirror or name not in self.mirror.in_use:
                remove(self.directory / name)
        for part in lost_parts(self.directory):
            if part.name < checkpoint_name(step):  # what is newer, the other processes may be writing
                part.unlink()

    def _surplus(self, names: list[str], step: int, best: list[str]) -> list[str]:
        """Which of these checkpoints are neither among the last, the best nor the permanent ones, after a step."""
        # What is newer than this step was passed over when the run began, or is about to be written anew.
        old = [name for name in sorted(names) if name <= checkpoint_name(step)][: -self.keep_last]
        every = self.keep_every_n_steps
        return [name for name in old if name not in best and not (every and step_of(name) % every == 0)]


def _nothing() -> None:
    pass
