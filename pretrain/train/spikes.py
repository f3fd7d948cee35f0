"""Loss spikes: noticed by a robust z-score; by option, the run goes back and leaves the data that led to one out.

Chowdhery et al. 2022 (PaLM, section 5.1) went back about 100 steps and skipped the batches up to and around the spike,
by hand. Here the skip is a line of ``skips.jsonl``, written before anything else happens. What a run then does follows
from that file alone, by the ordinary resume: killed at any moment or not, it takes the same steps.
"""

import json
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from typing_extensions import override

from pretrain.corpus.batch import Batch
from pretrain.errors import UserError
from pretrain.files import append_line
from pretrain.train.checkpoint import CHECKPOINTS, checkpoints_in, data_state, read_checkpoint, step_of
from pretrain.train.host_copy import HostCopy
from pretrain.train.together import largest

SKIPS = "skips.jsonl"
_TO_SIGMA = 1.4826  # a normal distribution's standard deviation in units of its median absolute deviation


class Skip(NamedTuple):
    """A stretch of the order that a run leaves out.

    Attributes:
        step: The step before which it is left out: the run went back to there.
        first: Place in the order (cursor) of the first sequence left out.
        end: Place of the first one after.
    """

    step: int
    first: int
    end: int


class RewindError(Exception):
    """The run has to begin again from its newest checkpoint that a skip leaves valid."""


class LossSpikes(pl.Callback):
    """Compares each step's loss with those of the steps before.

    A spike is a loss whose distance from the window's median exceeds ``threshold`` times the window's median absolute
    deviation (scaled to a normal distribution's standard deviation), upwards. It is reported once, where it begins.

    The loss is read when the next step is done, so that no GPU is waited for.

    Args:
        run: The run directory.
        skips: What the run leaves out already.
        threshold: Robust standard deviations above the median that make a spike; null: look for none.
        window: How many steps to compare with; there is no spike before there are so many.
        rewind: Go back to the newest checkpoint that is ``margin`` steps older than the spike, and leave out the data
            from there to the spike.
        margin: How many steps before a spike ``rewind`` goes back; where no checkpoint is so old, to the oldest.
        max_rewinds: How often in a row to go back without getting further, before the run ends.
        settle: Waits for the checkpoint that is being written, on all processes.

    Raises:
        UserError: If one of the numbers is out of its range.
    """

    def __init__(
        self,
        run: Path,
        skips: list[Skip],
        threshold: float | None = 10.0,
        window: int = 100,
        rewind: bool = False,
        margin: int = 10,
        max_rewinds: int = 3,
        settle: Callable[[pl.Trainer], object] = lambda trainer: None,
    ) -> None:
        for name, value, least in (("window", window, 5), ("margin", margin, 0), ("max_rewinds", max_rewinds, 1)):
            if value < least:
                raise UserError(f"spikes.{name} is {value}; give {least} or more")
        if threshold is not None and threshold <= 0:
            raise UserError(f"spikes.threshold is {threshold}; give a positive number, or null to look for no spikes")
        if threshold is None and rewind:
            raise UserError("spikes.rewind goes back after a spike, and spikes.threshold is null; give one, such as 10")
        self.directory, self.skips = run, skips
        self.threshold, self.rewind, self.margin, self.max_rewinds = threshold, rewind, margin, max_rewinds
        self._losses: deque[float] = deque(maxlen=window)
        self._settle = settle
        self._in_spike = False
        self._unread: tuple[int, HostCopy, int] | None = None
        self._finished: tuple[int, int] | None = None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._take(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._read(trainer)
            self._finished = (trainer.global_step - 1, batch.pack.after.cursor)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._take(trainer)
        self._read(trainer)
        checkpoint["loss_spikes"] = {"losses": list(self._losses), "in_spike": self._in_spike}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint.get("loss_spikes", {"losses": [], "in_spike": False})
        self._losses.extend(state["losses"])
        self._in_spike = state["in_spike"]

    def _take(self, trainer: pl.Trainer) -> None:
        """Keep the finished step's loss, which the module has logged by now."""
        if self._finished is not None and self.threshold is not None:
            step, end = self._finished
            self._unread = (step, HostCopy(trainer.callback_metrics["train/loss"]), end)
        self._finished = None

    def _read(self, trainer: pl.Trainer) -> None:
        if self._unread is None:
            return
        step, arriving, end = self._unread
        self._unread = None
        loss = float(arriving)
        deviations = self._deviations(loss)
        spike = self.threshold is not None and deviations is not None and deviations > self.threshold
        begins, self._in_spike = spike and not self._in_spike, spike
        if math.isfinite(loss):
            self._losses.append(loss)
        if not begins or deviations is None:
            return
        what = f"the loss of step {step} is {loss:.4g}, {deviations:.1f} robust standard deviations above the median"
        if trainer.is_global_zero:
            print(f"pretrain: warning: {what} of {len(self._losses)} steps", file=sys.stderr, flush=True)
        if self.rewind:
            self._go_back(trainer, step, end, what)

    def _deviations(self, loss: float) -> float | None:
        """The robust z-score; None while the window is not full, where it does not vary, or after a skipped step."""
        if self._losses.maxlen is None or len(self._losses) < self._losses.maxlen or not math.isfinite(loss):
            return None
        median = statistics.median(self._losses)
        spread = _TO_SIGMA * statistics.median(abs(other - median) for other in self._losses)
        return (loss - median) / spread if spread > 0 else None

    def _go_back(self, trainer: pl.Trainer, step: int, end: int, what: str) -> None:
        """Write the skip, and let every process begin again.

        Raises:
            RewindError: When it is written.
            UserError: If going back to this checkpoint did not help often enough.
        """
        self._settle(trainer)
        # One process looks: what cannot be read for a moment by another must not part them.
        checkpoint = self._checkpoint_before(step) if trainer.is_global_zero else None
        target = largest(trainer, checkpoint["global_step"] if checkpoint else 0)
        # Also those that went back from beyond and less far: to and fro would not end otherwise.
        in_a_row = sum(1 for _ in takewhile(lambda skip: skip.step >= target, reversed(self.skips)))
        if in_a_row >= self.max_rewinds:
            raise UserError(
                f"{what}, after the run went back to step {target} {self.max_rewinds} times: it is not the data; "
                "continue with a lower --model.learning_rate (and --allow_change), or with --spikes.rewind false"
            )
        if trainer.is_global_zero:
            state = data_state(checkpoint) if checkpoint else None
            first = state["cursor"] if state else 0
            record = {"step": target, "first": first, "end": end, "spike": step, "why": what, "time": time.time()}
            append_line(self.directory / SKIPS, json.dumps(record))
        trainer.strategy.barrier()  # the others read the line when they begin again
        raise RewindError(f"{what}; goes back to step {target} and leaves out the data from there to the spike")

    def _checkpoint_before(self, step: int) -> dict[str, Any] | None:
        """The newest that is old enough, else the oldest; damaged ones are passed over, as where a run begins."""
        there = [path for path in checkpoints_in(self.directory / CHECKPOINTS) if step_of(path.name) <= step]
        old = [path for path in there if step_of(path.name) <= step - self.margin]
        for path in [*reversed(old), *there[len(old) :]]:
            with suppress(UserError):
                checkpoint = read_checkpoint(path)
                if of_history(self.skips)(checkpoint):
                    return checkpoint
        return None


def read_skips(directory: Path) -> list[Skip]:
    """What a run leaves out, in the order in which it was decided.

    Raises:
        UserError: If a line is damaged.
    """
    path = directory / SKIPS
    if not path.is_file():
        return []
    skips = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(line for line in lines if line.endswith("\n")):  # one half-written was not decided
        try:
            record = json.loads(line)
            skips.append(Skip(int(record["step"]), int(record["first"]), int(record["end"])))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number + 1}: damaged ({error}); restore it: what the run trains on depends on it"
            ) from error
    return skips


def of_history(skips: Sequence[Skip]) -> Callable[[dict[str, Any]], bool]:
    """Says of a checkpoint whether it still counts in a run with these skips: no later one has taken its steps back."""

    def holds(checkpoint: dict[str, Any]) -> bool:
        known = (data_state(checkpoint) or {}).get("skips", 0)
        return all(checkpoint["global_step"] <= skip.step for skip in skips[known:])

    return holds
