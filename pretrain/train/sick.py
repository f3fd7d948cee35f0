"""Sick steps: those whose loss or gradient was NaN or infinite. `StepModule` skips them; here they are recorded."""

import json
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from typing_extensions import override

from pretrain.corpus.batch import Batch
from pretrain.corpus.packed import PackedDataModule
from pretrain.errors import UserError, disk_is_full
from pretrain.train.host_copy import HostCopy
from pretrain.train.logging import LineFile
from pretrain.train.run import SICK
from pretrain.train.step import StepModule


class SickSteps(pl.Callback):
    """Logs ``train/sick_steps``, writes each sick step's sequences to ``sick.jsonl``, and stops a run that stays sick.

    Weights and moments are as they were before a sick step; cursor, step and schedule advance. Whether a step was sick
    is read when the next one is done, so that no GPU is waited for.

    Args:
        run: The run directory.
        first_step: Step that this process begins with; lines from there on are cut off first.
        max_in_a_row: How many sick steps in a row end the run.
    """

    def __init__(self, run: Path, first_step: int, max_in_a_row: int) -> None:
        self.path = run / SICK
        self.first_step = first_step
        self.max_in_a_row = max_in_a_row
        self.total = self.in_a_row = 0
        self._file: LineFile | None = None
        self._window: list[int] = []
        self._unread: tuple[int, HostCopy, list[int]] | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._window, self._unread = [], None
        if trainer.is_global_zero and self.path.exists():
            self._open()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StepModule)
        self._window += batch.pack.indices.tolist()
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._read(trainer)
        self._unread = (trainer.global_step - 1, HostCopy(pl_module.sick), self._window)
        self._window = []
        pl_module.log("train/sick_steps", self.total + pl_module.sick)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read(trainer)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._read(trainer)
        checkpoint["sick_steps"] = {"total": self.total, "in_a_row": self.in_a_row}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        counts = checkpoint.get("sick_steps", {"total": 0, "in_a_row": 0})
        self.total, self.in_a_row = counts["total"], counts["in_a_row"]

    def _read(self, trainer: pl.Trainer) -> None:
        """Whether the step before was sick: the same answer, and the same end of the run, on every process."""
        if self._unread is None:
            return
        step, sick, indices = self._unread
        self._unread = None
        if not float(sick):
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        if trainer.world_size > 1:
            everyones: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyones, indices)
            indices = [index for theirs in everyones for index in theirs]
        if trainer.is_global_zero:
            self._record(trainer, step, sorted(indices))
        if self.in_a_row >= self.max_in_a_row:
            raise UserError(
                f"the loss or its gradient was NaN or infinite in {self.in_a_row} steps in a row, the last of them "
                f"step {step}; none reached the weights, and the newest checkpoint is good: continue it with a lower "
                f"--model.learning_rate or --trainer.gradient_clip_val (and --allow_change), or look at the "
                f"sequences in {self.path}"
            )

    def _record(self, trainer: pl.Trainer, step: int, indices: list[int]) -> None:
        assert isinstance(trainer.datamodule, PackedDataModule)  # type: ignore[attr-defined]
        corpus = trainer.datamodule.train_corpus  # type: ignore[attr-defined]
        line = {"step": step, "sequences": indices, "ids": [corpus.id(index) for index in indices]}
        file = self._file or self._open()
        file.append(json.dumps(line) + "\n")
        try:
            file.flush()
        except OSError as error:
            if not disk_is_full(error):
                raise
        print(
            f"pretrain: warning: step {step} is skipped, its loss or gradient is NaN or infinite; its sequences are in "
            f"{self.path}",
            file=sys.stderr,
            flush=True,
        )

    def _open(self) -> LineFile:
        self._file = LineFile(self.path, "", self.first_step, step_of_json)
        return self._file


def step_of_json(line: str) -> int:
    """The step that a line of JSON is about; of a damaged line, one beyond any run's end."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize
