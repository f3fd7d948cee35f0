"""Callbacks for tests: make numbers sick, wait for ever, fill the disk, send a signal; each at chosen micro-batches."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch


class Poison(pl.Callback):
    """Makes the loss infinite, or an element of the gradient NaN, in the micro-batches ``first`` to ``last``.

    The infinite loss has finite gradients, so that it shows only to who looks at the loss.
    """

    def __init__(self, what: str, first: int, last: int, rank: int = 0) -> None:
        self.what, self.micro_batches, self.rank = what, range(first, last + 1), rank

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self._due = batch_idx in self.micro_batches and trainer.global_rank == self.rank
        vars(module.encoder).pop("loss", None)
        if self._due and self.what == "loss":
            loss_of = module.encoder.loss

            def infinite(*batch: Any) -> Any:
                return loss_of(*batch) + float("inf")

            vars(module.encoder)["loss"] = infinite

    def on_after_backward(self, trainer: pl.Trainer, module: Any) -> None:
        if self._due and self.what == "gradient":
            next(module.parameters()).grad.view(-1)[0] = float("nan")


class Spike(pl.Callback):
    """Multiplies the loss of the steps in which a place in the order is consumed, wherever the run stands then."""

    def __init__(self, place: int, factor: float = 3.0) -> None:
        self.place, self.factor = place, factor

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        vars(module.encoder).pop("loss", None)
        after = batch.pack.after.cursor
        sequences = int(after - self.place)
        if not 0 < sequences <= 12:  # about what a step consumes
            return
        _multiply(module.encoder, self.factor)


def _multiply(encoder: Any, factor: float) -> None:
    """Until the entry is taken away again, the encoder's loss is so many times as large."""
    loss_of = encoder.loss

    def multiplied(*batch: Any) -> Any:
        return loss_of(*batch) * factor

    vars(encoder)["loss"] = multiplied


class SpikeAt(pl.Callback):
    """Multiplies the loss of one step, whatever data it sees."""

    def __init__(self, step: int, factor: float = 3.0) -> None:
        self.step, self.factor = step, factor

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        vars(module.encoder).pop("loss", None)
        if trainer.global_step == self.step:
            _multiply(module.encoder, self.factor)


class Pause(pl.Callback):
    """Creates a file before a micro-batch, and waits for ever."""

    def __init__(self, number: int, file: str) -> None:
        self.number, self.file = number, Path(file)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.number:
            self.file.touch()
            while True:
                time.sleep(0.1)


class Hang(pl.Callback):
    """Lets one process sleep for ever, or stop dead, before a micro-batch, or die: on the job's first attempt only."""

    def __init__(self, how: str, number: int, rank: int = 1) -> None:
        self.how, self.number, self.rank = how, number, rank

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if (batch_idx, trainer.global_rank) == (self.number, self.rank) and first_attempt:
            if self.how != "sleeps":
                os.kill(os.getpid(), signal.SIGSTOP if self.how == "stops" else signal.SIGKILL)
            while True:
                time.sleep(1)


class Fill(pl.Callback):
    """Fills the disk before one micro-batch, but for some bytes, and makes room before another."""

    def __init__(self, first: int, last: int, file: str, leave: int = 0) -> None:
        self.first, self.last, self.file, self.leave = first, last, Path(file), leave

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            with self.file.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    file.truncate(max(0, file.tell() - self.leave))
        if batch_idx == self.last:
            self.file.unlink(missing_ok=True)  # another process may have been first


class Elsewhere(pl.Callback):
    """Lets the second process write its checkpoints into a directory that the first does not see."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        saving: Any = trainer.checkpoint_callback
        if trainer.global_rank == 1:
            saving.directory = self.directory


class Remove(pl.Callback):
    """Removes a directory after a micro-batch."""

    def __init__(self, number: int, path: str) -> None:
        self.number, self.path = number, path

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.number:
            shutil.rmtree(self.path)


class KillWorker(pl.Callback):
    """Kills one of the loader's workers, as the kernel does where memory runs out."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.number:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


class SignalAtStart(pl.Callback):
    """Sends its own process a signal while the first batch is being waited for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        loader_of = trainer.datamodule.train_dataloader

        def train_dataloader() -> Any:
            os.kill(os.getpid(), signal.Signals[self.name])
            return loader_of()

        trainer.datamodule.train_dataloader = train_dataloader


class Signal(pl.Callback):
    """Sends its own process a signal in the middle of a step; before that, its children, if all are to get it."""

    def __init__(self, number: int, name: str, to_all: bool = False) -> None:
        self.number, self.name, self.to_all = number, name, to_all

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.number:
            children = [child.pid for child in multiprocessing.active_children()] if self.to_all else []
            for process in (*children, os.getpid()):
                # From elsewhere: a parent may end its children.
                subprocess.run(["kill", "-s", self.name.removeprefix("SIG"), str(process)], check=True)
            time.sleep(0.2 * self.to_all)  # until a child would have ended


class InBuckets(pl.Callback):
    """Fails where a gradient lies elsewhere than with others, in DDP's buckets, once these are there."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if trainer.global_step > 1 and any(g.untyped_storage().nbytes() == g.nbytes for g in gradients):
            raise AssertionError(f"micro-batch {batch_idx}: a gradient has memory of its own")


class SignalWhenEnding(pl.Callback):
    """When the run ends because of a signal, sends its own process a SIGINT as the loader's workers are being ended."""

    def on_exception(self, *_: object) -> None:
        loader = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
        end = loader._shutdown_workers

        def interrupted(workers: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            end(workers)

        loader._shutdown_workers = interrupted
