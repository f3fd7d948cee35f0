"""A process that hangs: noticed by the others, named, and ended, so that a launcher can start the job again.

Where one process of several stops, all others wait for it in a collective: each looks as stuck as the one at fault.
So every process counts what it has done, and a thread of each writes that count, with a pulse, into the store over
which the processes have found each other. Who hangs is the one whose pulse has stopped, or who has done least.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import pytorch_lightning as pl
from torch.distributed.distributed_c10d import _get_default_store
from typing_extensions import override

from pretrain.errors import UserError, one_line
from pretrain.train.together import wait_for_all

_LOADING, _FORWARD, _BACKWARD = "loading data", "computing the loss", "computing or adding up gradients"
_VALIDATING, _SAVING, _EVALUATING = "validating", "saving", "evaluating"
_STARTING = "starting"
"""May take as long as it needs: the data may have to be fetched first, and the launcher has time limits."""


class _Pulse(NamedTuple):
    """What a process last wrote of itself."""

    beat: int
    done: int
    doing: str
    name: str


class Watchdog(pl.Callback):
    """Ends the job with exit code 1 and one line after a while without progress.

    Args:
        timeout_minutes: For how long; None to wait for ever. Less than the process group's own timeout (Lightning's
            is 30), which does not say who is at fault.

    Raises:
        UserError: If the time is not positive.
    """

    def __init__(self, timeout_minutes: float | None = 20.0) -> None:
        if timeout_minutes is not None and timeout_minutes <= 0:
            raise UserError(f"hang_timeout_minutes is {timeout_minutes}; give a positive number, or null for none")
        self.timeout = None if timeout_minutes is None else 60 * timeout_minutes
        self._done, self._doing, self._time = 0, _STARTING, time.monotonic()
        self._beat = 0
        self._ended = threading.Event()
        self._store: Any = None

    def _tick(self, doing: str) -> None:
        self._done, self._doing, self._time = self._done + 1, doing, time.monotonic()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tick(_STARTING)
        if self.timeout is None:
            return
        if trainer.world_size > 1:
            shared: Any = _get_default_store()
            self._store = shared.clone()  # a connection of its own: the other may be busy waiting
            self._store.set_timeout(timedelta(seconds=max(1.0, self.timeout / 4)))
        step = lambda: trainer.global_step  # noqa: E731
        threading.Thread(target=self._watch, args=(trainer.global_rank, trainer.world_size, step), daemon=True).start()

    @override
    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._tick(_FORWARD)

    @override
    def on_before_backward(self, *args: Any, **kwargs: Any) -> None:
        self._tick(_BACKWARD)

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._tick(_LOADING)

    @override
    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._tick(_VALIDATING)

    @override
    def on_save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._tick(_SAVING)

    @override
    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._ended.set()  # what follows is for people to wait for

    @override
    def on_fit_end(self, *args: Any, **kwargs: Any) -> None:
        self._ended.set()  # also where there was nothing left to train

    @override
    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        self._ended.set()

    def _watch(self, rank: int, processes: int, step: Any) -> None:
        assert self.timeout is not None
        interval = min(10.0, self.timeout / 6)
        while True:
            stands = 0.0 if self._doing == _STARTING else time.monotonic() - self._time
            try:
                self._write(rank)
            except RuntimeError as error:  # the store; whoever ended it is given time to say why
                if stands > self.timeout + 6 * interval:
                    silent = {0: f"does not answer ({one_line(error, 100)})"}
                    _end(step(), stands, processes, silent, self._doing)
            else:
                if stands > self.timeout:
                    self._judge(rank, processes, interval, step(), stands)
            if self._ended.wait(interval):
                return

    def _judge(self, rank: int, processes: int, interval: float, step: int, stands: float) -> None:
        done = self._done
        try:
            guilty = self._guilty(rank, processes, interval)
        except RuntimeError:  # the store: another process has ended the job meanwhile, and has said why
            os._exit(1)
        if guilty is None or self._done != done:  # it has gone on meanwhile
            return
        # One speaks for all; its end is that of the job.
        if rank == min(set(range(processes)) - guilty.keys(), default=0):
            _end(step, stands, processes, guilty, self._doing)

    def _write(self, rank: int) -> None:
        self._beat += 1
        if self._store is not None:
            name = f"process {os.getpid()} on {platform.node()}"
            pulse = _Pulse(self._beat, self._done, self._doing, name)
            self._store.set(f"pretrain/pulse/{rank}", json.dumps(pulse))

    def _read(self, processes: int) -> dict[int, _Pulse]:
        keys = {rank: f"pretrain/pulse/{rank}" for rank in range(processes)}
        return {r: _Pulse(*json.loads(self._store.get(key))) for r, key in keys.items() if self._store.check([key])}

    def _guilty(self, rank: int, processes: int, interval: float) -> dict[int, str] | None:
        """Who holds the others up, and how; nobody where that is not clear, and None if it is an evaluation."""
        if self._store is None:
            return None if self._doing == _EVALUATING else {}
        before = self._read(processes)
        for _ in range(3):
            time.sleep(interval)
            self._write(rank)  # the others look, too
        after = self._read(processes)
        silent = {
            other: f"({after[other].name}) does not answer" if other in after else "has not begun"
            for other in range(processes)
            if other not in after or (other in before and before[other].beat == after[other].beat)
        }
        least = min(pulse.done for pulse in after.values())
        behind = {rank: pulse for rank, pulse in after.items() if pulse.done == least}
        if silent:
            return silent
        if any(pulse.doing == _EVALUATING for pulse in behind.values()):
            return None
        return {} if len(behind) == len(after) else {r: f"({p.name}) hangs while {p.doing}" for r, p in behind.items()}


@contextmanager
def untimed(trainer: pl.Trainer) -> Iterator[None]:
    """An evaluation, which may take minutes or hours: no process is timed until all are through. All must take part."""
    watchdogs = [callback for callback in trainer.callbacks if isinstance(callback, Watchdog)]  # type: ignore[attr-defined]
    before = [watchdog._doing for watchdog in watchdogs]
    for watchdog in watchdogs:
        watchdog._tick(_EVALUATING)
    yield
    wait_for_all(trainer)
    for watchdog, doing in zip(watchdogs, before, strict=True):
        watchdog._tick(doing)


def _end(step: int, stands: float, processes: int, guilty: dict[int, str], doing: str) -> None:
    """Say who hangs, and end this process at once: its main thread may never come back."""
    if guilty:
        who = "; ".join(f"rank {rank} of {processes} {how}" for rank, how in guilty.items())
    elif processes > 1:
        who = f"all {processes} processes stand at the same place, {doing}: look at the network between them"
    else:
        who = f"the process hangs while {doing}"
    print(
        f"pretrain: error: no progress for {stands:.0f} seconds after step {step}: {who}; the same command "
        "continues from the newest checkpoint (--hang_timeout_minutes sets how long to wait)",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
