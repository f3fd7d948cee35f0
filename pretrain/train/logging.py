"""What a run shows and keeps: TensorBoard events, metrics.csv, the learning-rate monitor and the progress bar.

All of them continue across a resume without gaps or repeats: what a killed process had logged beyond its last
checkpoint is taken back, since those steps are computed again.
"""

import os
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import callbacks
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from tqdm import tqdm
from typing_extensions import override

from pretrain.errors import disk_is_full

METRICS_FILE = "metrics.csv"


class EventLogger(TensorBoardLogger):
    """TensorBoard events directly in the run directory.

    On a full disk the curves have a gap, which ``metrics.csv`` does not have: no reason to end a run.

    Args:
        run: The run directory.
        first_step: Step that this process begins with; events of earlier processes from there on are purged.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        super().__init__(run, name="", version="", default_hp_metric=False, purge_step=first_step)
        self._gone = False
        if not isinstance(threading.excepthook, _WithoutWriters):
            threading.excepthook = _WithoutWriters(threading.excepthook)

    @rank_zero_only
    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._unless_the_disk_is_full(step, lambda: super(EventLogger, self).log_metrics(_without_epoch(metrics), step))

    @rank_zero_only
    def show(self, step: int, write: Callable[[Any], None]) -> None:
        """Let ``write`` put something other than figures into the writer (torch's ``SummaryWriter``), at a step."""
        self._unless_the_disk_is_full(step, lambda: write(self.experiment))

    def _unless_the_disk_is_full(self, step: int | None, write: Callable[[], None]) -> None:
        if self._gone:
            return
        try:
            write()
        except (OSError, ValueError) as error:
            cause = error.__cause__ or error  # Lightning makes a ValueError of what the writer raises
            if isinstance(cause, FileNotFoundError):  # the run was removed: a new file would bring it back
                self._gone = True
                return
            if not (isinstance(cause, OSError) and disk_is_full(cause)):
                raise
            # The writer's thread has ended: the next figures go into a new file, which takes back nothing.
            self._experiment = None
            self._kwargs["purge_step"] = step

    @rank_zero_only
    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml says more."""

    @rank_zero_only
    @override
    def save(self) -> None:
        """Nothing: the writer flushes by itself every two minutes and at the end; Lightning would at every step."""

    @rank_zero_only
    @override
    def finalize(self, status: str) -> None:
        try:
            super().finalize(status)
        except OSError as error:
            if not (disk_is_full(error) or isinstance(error, FileNotFoundError)):
                raise


class _WithoutWriters:
    """Says nothing of what ended TensorBoard's writing thread: it is raised again where the next figure is logged."""

    def __init__(self, hook: Callable[[threading.ExceptHookArgs], Any]) -> None:
        self._hook = hook

    def __call__(self, failure: threading.ExceptHookArgs) -> None:
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            self._hook(failure)


class LineFile:
    """A file of lines, each about one step: appended to, and cut where a resumed run continues.

    What the disk refuses stays pending, to the byte, and is written by a later `flush`.

    Args:
        path: The file; a new one begins with ``head``.
        head: The first line, or nothing.
        first_step: Lines of this step and of later ones are cut off, and so is a line that was left half-written.
        step_of: Reads a line's step.
    """

    def __init__(self, path: Path, head: str, first_step: int, step_of: Callable[[str], int]) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        kept = 0
        with path.open("rb") as file:
            for line in file:
                text = line.decode("utf-8", "replace")
                if not text.endswith("\n") or (text != head and step_of(text) >= first_step):
                    break
                kept += len(line)
        os.ftruncate(self._descriptor, kept)
        self._pending = b"" if kept else head.encode()

    def append(self, lines: str) -> None:
        """Add whole lines; they are in the file after the next `flush`."""
        self._pending += lines.encode()

    def flush(self, sync: bool = False) -> None:
        """Write what is pending, and with ``sync`` wait until the disk has it.

        Raises:
            OSError: If the disk refuses; what it did not take stays pending.
        """
        while self._pending:
            self._pending = self._pending[os.write(self._descriptor, self._pending) :]
        if sync:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; what is pending is lost."""
        os.close(self._descriptor)


def step_of_csv(line: str) -> int:
    """The step that begins a line of comma-separated values; of a damaged line, one beyond any run's end."""
    first = line.partition(",")[0]
    return int(first) if first.isdigit() else sys.maxsize


class MetricsFile(Logger):
    """Every logged value as a line ``step,name,value`` of ``metrics.csv``, appended.

    On a full disk the lines wait in memory: a figure that cannot be written is no reason to end a run.

    Args:
        run: The run directory.
        first_step: Step that this process begins with; lines from there on are cut off first.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        super().__init__()
        self.path = run / METRICS_FILE
        self.first_step = first_step
        self._file: LineFile | None = None

    @property
    @override
    def name(self) -> str | None:
        return None

    @property
    @override
    def version(self) -> str | None:
        return None

    @rank_zero_only
    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._file is None:
            self._file = LineFile(self.path, "step,name,value\n", self.first_step, step_of_csv)
        lines = (f"{step},{name},{_digits(float(value))}\n" for name, value in _without_epoch(metrics).items())
        self._file.append("".join(lines))

    @rank_zero_only
    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml says more."""

    @rank_zero_only
    @override
    def save(self) -> None:
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                if not disk_is_full(error):
                    raise

    @rank_zero_only
    @override
    def finalize(self, status: str) -> None:
        self.save()


def _digits(value: float) -> str:
    """As many as float32 has; all of a count."""
    return f"{value:.0f}" if value.is_integer() else f"{value:.9g}"


def read_metrics(path: Path) -> list[tuple[int, str, float]]:
    """The lines of a ``metrics.csv``, as (step, name, value), without one that a killed process left half-written."""
    if not path.exists():
        return []
    rows: list[tuple[int, str, float]] = []
    with path.open(newline="", encoding="utf-8") as file:
        for line in file:
            fields = line.rstrip("\n").split(",")
            if len(fields) == 3 and fields[0].isdigit() and line.endswith("\n"):
                rows.append((int(fields[0]), fields[1], float(fields[2])))
    return rows


def _without_epoch(metrics: Mapping[str, float]) -> dict[str, float]:
    # Lightning adds its own epoch to everything; the whole run is one of those. `data/epoch` is the one that counts.
    return {name: value for name, value in metrics.items() if name != "epoch"}


class LearningRateMonitor(callbacks.LearningRateMonitor):
    """Lightning's monitor, once an optimizer step; under accumulation the original logs at each micro-batch."""

    def __init__(self) -> None:
        super().__init__(logging_interval="step")

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if args[-1] % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_start(trainer, *args, **kwargs)
            for past in self.lrs.values():
                del past[:-1]  # Lightning keeps every one: memory that grows with the run


class ProgressBar(callbacks.ProgressBar):
    """One bar over the whole run, in optimizer steps: time left, loss, learning rate, real tokens a second."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._enabled = True

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
            mininterval=0.5,
            disable=not (self._enabled and trainer.is_global_zero),
            bar_format="{l_bar}{bar}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self._shown = 0.0

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        now = time.monotonic()
        if not self._bar.disable and (now - self._shown > 0.5 or trainer.global_step == trainer.max_steps):
            self._shown = now  # reading the loss waits for the GPU, so not at every step
            self._bar.set_postfix_str(self._figures(trainer), refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is not None:
            self._bar.set_description_str("validating")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is not None:
            self._bar.set_description_str()
            figures = trainer.callback_metrics
            if not self._bar.disable and "val/loss" in figures:
                names = ("val/perplexity", "val/accuracy")  # of fine-tuning, whatever the task has
                shown = [
                    name for name in figures if name.startswith("val/") and (names[0] not in figures or name in names)
                ]
                text = ", ".join(f"{name.removeprefix('val/')} {figures[name]:.3f}" for name in shown)
                self._bar.write(f"  validation after step {trainer.global_step}: {text}")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @staticmethod
    def _figures(trainer: pl.Trainer) -> str:
        figures = trainer.callback_metrics  # of the step before: callbacks are called before this one's are logged
        shown = [f"lr {trainer.optimizers[0].param_groups[0]['lr']:.2e}"]
        if "train/loss" in figures:
            shown.insert(0, f"loss {figures['train/loss']:.3f}")
        if "throughput/tokens_per_second" in figures:
            shown.append(f"{figures['throughput/tokens_per_second'] / 1000:.1f}k tokens/s")
        return ", ".join(shown)
