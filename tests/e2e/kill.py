"""A callback for tests: ends its own process by SIGKILL at a chosen moment, with no chance to clean up."""

import os
import signal
from typing import Any

import pytorch_lightning as pl


class Kill(pl.Callback):
    """Kill at the start or the end of a micro-batch, or at the end of the n-th validation of this process."""

    def __init__(self, moment: str, number: int) -> None:
        self.moment, self.number = moment, number
        self._validations = 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self._kill("batch_start", batch_idx)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._kill("batch_end", batch_idx)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._validations += 1
        self._kill("validation", self._validations)

    def _kill(self, moment: str, number: int) -> None:
        if (moment, number) == (self.moment, self.number):
            os.kill(os.getpid(), signal.SIGKILL)
