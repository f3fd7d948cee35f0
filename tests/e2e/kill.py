"""A callback for tests: ends its own process by SIGKILL at a chosen moment, with no chance to clean up."""

import io
import os
import signal
from typing import Any

import pytorch_lightning as pl
import torch

from pretrain.corpus import shards
from pretrain.train import divided, saving, sharding, spikes


class Kill(pl.Callback):
    """Kill at the start or the end of a micro-batch, or this process's n-th time in the middle of something else.

    That is a pack of a validation, the writing of a checkpoint, of this process's part of one, of a corpus, or after it
    decided to go back. ``saved`` is when a checkpoint has become the newest; ``copied`` the start of a micro-batch,
    once all checkpoints have been copied to where they go. Where there are several processes, ``rank`` is the one, or
    None for whichever comes there first.
    """

    def __init__(self, moment: str, number: int, rank: int | None = None) -> None:
        if rank is not None and int(os.environ["RANK"]) != rank:
            moment = "never"
        self.moment, self.number = moment, number
        self._count = 0
        if moment == "save":
            self._save, torch.save = torch.save, self._save_half
        if moment == "saved":
            self._link, saving.link = saving.link, self._link_and_die
        if moment == "part":
            self._write_part, sharding.write_part = sharding.write_part, self._write_part_half
        if moment == "rewind":
            self._append, spikes.append_line = spikes.append_line, self._append_and_die
        if moment == "prepare":
            self._write_shard, shards.write_shard = shards.write_shard, self._write_half

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if (self.moment, self.number) == ("copied", batch_idx):  # so that it is known what has been copied
            saving: Any = trainer.checkpoint_callback
            saving.finish(trainer)
            saving.mirror.finish()
            trainer.strategy.barrier()
            self._kill("copied", batch_idx)
        self._kill("batch_start", batch_idx)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._kill("batch_end", batch_idx)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.moment == "validation":
            self._count += 1
            self._kill("validation", self._count)

    def _save_half(self, checkpoint: Any, file: Any) -> None:
        self._count += 1
        if self._count == self.number:
            whole = io.BytesIO()
            self._save(checkpoint, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
        self._kill("save", self._count)
        self._save(checkpoint, file)

    def _link_and_die(self, path: Any, target: str) -> None:
        self._link(path, target)
        if path.name == saving.LAST:
            self._count += 1
            self._kill("saved", self._count)

    def _write_part_half(self, path: Any, tensors: Any) -> bytes:
        self._count += 1
        if self._count == self.number:
            divided._bytes_of = lambda tensor: self._kill("part", self._count)
        return self._write_part(path, tensors)

    def _append_and_die(self, path: Any, line: str) -> None:
        self._append(path, line)
        self._kill("rewind", 1)

    def _write_half(self, file: Any, *content: Any) -> str:
        checksum = self._write_shard(file, *content)
        self._count += 1
        if self._count == self.number:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        self._kill("prepare", self._count)
        return checksum

    def _kill(self, moment: str, number: int) -> None:
        if (moment, number) == (self.moment, self.number):
            os.kill(os.getpid(), signal.SIGKILL)
