"""The ledger: what training really consumed, a line a step, and the audit that recomputes it from the corpus.

The ledger is kept by the training loop, from the batches that went through it; the audit knows only the corpus, the
seed and the order. So whatever goes wrong between the two (a sampler, a loader, a restart that repeats or skips
something) shows as a step that differs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch.distributed import ReduceOp
from typing_extensions import override

from pretrain.corpus.batch import Batch
from pretrain.corpus.counter import bits
from pretrain.corpus.datamodule import MLMDataModule
from pretrain.corpus.order import AnyOrder
from pretrain.corpus.packed import PackedDataModule
from pretrain.corpus.packing import BatchWarmup, Pack, Position, jump
from pretrain.corpus.store import Corpus
from pretrain.errors import UserError
from pretrain.train.checkpoint import CHECKPOINTS
from pretrain.train.logging import LineFile, step_of_csv
from pretrain.train.run import CONFIG, LEDGER, Run
from pretrain.train.spikes import SKIPS
from pretrain.train.together import over_processes

_HEAD = "step,sequences,sum\n"


def pack_sum(pack: Pack) -> int:
    """Sum of a hash of each crop (sequence, epoch, start, length), modulo 2**64.

    A sum, so that neither the order within a step nor how it was shared out matters; of 64-bit hashes, so that a crop
    that was lost, doubled or replaced changes it (but for one case in 2**64).
    """
    hashes = bits(bits(bits(pack.indices, pack.epochs), pack.starts), pack.lengths)
    return int(hashes.sum(dtype=np.uint64))


class Ledger(pl.Callback):
    """Writes ``ledger.csv``: for each step the number of sequences consumed and the sum of their hashes.

    Lines wait in memory until `write`, just before a checkpoint: processes then add up their sums once for all steps
    since the last, and what a killed process had not written is of steps that are computed again anyway.

    Args:
        run: The run directory.
        first_step: Step that this process begins with; lines from there on are cut off first.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        self.path = run / LEDGER
        self.first_step = first_step
        self._file: LineFile | None = None
        self._window: list[Pack] = []
        self._steps: list[tuple[int, int, int]] = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._window, self._steps = [], []
        if trainer.is_global_zero and self._file is None:
            self._file = LineFile(self.path, _HEAD, self.first_step, step_of_csv)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._window.append(batch.pack)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        sequences = sum(len(pack.indices) for pack in self._window)
        self._steps.append((trainer.global_step - 1, sequences, sum(map(pack_sum, self._window)) % 2**64))
        self._window = []

    def write(self, trainer: pl.Trainer) -> None:
        """Write the lines of the steps since the last call, and wait for the disk; every process must take part.

        Raises:
            OSError: If the disk refuses; the lines are then written by the next call.
        """
        # In halves, since the sum of two 64-bit numbers does not fit into one.
        rows = torch.tensor([(count, total >> 32, total % 2**32) for _, count, total in self._steps], dtype=torch.int64)
        if trainer.world_size > 1 and self._steps:
            rows = over_processes(trainer, rows.to(trainer.strategy.root_device), ReduceOp.SUM).cpu()
        steps = [step for step, _, _ in self._steps]
        self._steps = []
        if self._file is not None:
            for step, (count, high, low) in zip(steps, rows.tolist(), strict=True):
                self._file.append(f"{step},{count},{((high << 32) + low) % 2**64:016x}\n")
            self._file.flush(sync=True)


def audit(directory: Path, data_class: type[PackedDataModule] = MLMDataModule) -> str:
    """Compare a run's ledger with the corpus and the order, from the first step to the newest checkpoint.

    Args:
        directory: The run.
        data_class: What gave it its batches.

    Returns:
        What was found, when all is well.

    Raises:
        UserError: If there is no ledger, or at the first step that consumed something other than the order says.
    """
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory}: no run ({CONFIG} is missing), so there is nothing to audit")
    run = Run(directory)
    assert run.config is not None
    state = run.data_state
    if state is None:
        raise UserError(f"{directory}: no checkpoint in {CHECKPOINTS} yet, so there is nothing to audit")
    settings = {**run.config["data"], "seed": run.config["seed_everything"]}
    if warmup := settings.get("batch_warmup"):
        settings["batch_warmup"] = BatchWarmup(**warmup)
    data = data_class(**({**settings, "validation": None} if data_class is MLMDataModule else settings))
    data.setup("fit")
    corpus = data.train_corpus
    if corpus.fingerprint != state["corpus"]:
        raise UserError(
            f"{directory}: was trained on corpus {state['corpus']}, {', '.join(map(str, data.train))} is now "
            f"{corpus.fingerprint}; restore the sources to audit the run"
        )
    if (proportions := data.identity().get("proportions")) != state.get("proportions"):
        raise UserError(
            f"{directory}: was trained on corpora in proportions {state.get('proportions')}, its config now says "
            f"{proportions}; restore the weights to audit the run"
        )
    planner = data.train_planner()
    lines = _read(directory / LEDGER)
    visits = _Visits(planner.order)
    position = Position()
    skips = {skip.first: skip.end for skip in run.skips}
    skipped = 0
    for step in range(run.step):
        begin = jump(position, skips)
        if begin != position:
            left_out = np.arange(position.cursor, begin.cursor)
            visits.add(*planner.order(left_out))
            skipped += len(left_out)
        plan = planner.step(begin, data.global_batch_tokens)
        visits.add(plan.epochs, plan.indices)
        expected = f"{step},{len(plan.indices)},{pack_sum(plan):016x}"
        found = lines[step] if step < len(lines) else "no such line"
        if found != expected:
            raise UserError(
                f"{directory / LEDGER}: step {step} differs: the ledger has {found!r}, the corpus and the order give "
                f"{expected!r}; the run is sound up to there: continue it from an earlier checkpoint"
            )
        position = plan.after
    if position.cursor != state["cursor"]:
        raise UserError(
            f"{directory}: the checkpoint after step {run.step} stands at sequence {state['cursor']}, the order at "
            f"{position.cursor}; continue from an earlier checkpoint"
        )
    but = f", but for {skipped:,} that {SKIPS} leaves out" if skipped else ""
    return (
        f"{directory}: {run.step:,} steps, {position.cursor - skipped:,} sequences ({position.epochs:.2f} epochs): "
        f"{visits.found(corpus)}{but}"
    )


class _Visits:
    """Checks that a plan, step by step, visits everything of an epoch once before the next epoch begins.

    What there is, the order says: the sequences, or their clusters; in a mixture, of each component by itself.
    """

    def __init__(self, order: AnyOrder) -> None:
        self.order = order
        self.bounds = np.cumsum([0, *order.sizes])
        self.epochs = [0] * len(order.sizes)
        self._visited = np.zeros(self.bounds[-1], bool)

    def add(self, epochs: NDArray[np.int64], indices: NDArray[np.int64]) -> None:
        places = self.order.places(indices)
        part_of = np.searchsorted(self.bounds, places, side="right") - 1
        for part in np.unique(part_of):
            here = part_of == part
            self._add(int(part), places[here], epochs[here])

    def _add(self, part: int, places: NDArray[np.int64], epochs: NDArray[np.int64]) -> None:
        visited = self._visited[self.bounds[part] : self.bounds[part + 1]]
        for epoch in np.unique(epochs):
            if epoch != self.epochs[part]:
                if epoch != self.epochs[part] + 1 or not visited.all():
                    raise UserError(
                        f"the order leaves sequences of epoch {self.epochs[part]} out: this version is defective"
                    )
                self.epochs[part] = int(epoch)
                visited[:] = False
            here = places[epochs == epoch] - self.bounds[part]
            if visited[here].any() or len(np.unique(here)) < len(here):
                raise UserError(f"the order repeats sequences within epoch {epoch}: this version is defective")
            visited[here] = True

    def found(self, corpus: Corpus) -> str:
        """What has been checked, when all is well."""
        what = "clusters" if corpus.clusters_fingerprint else "sequences"
        if len(self.epochs) > 1:
            return f"each corpus's {what} consumed exactly once in each of its epochs"
        return f"each epoch's {what} consumed exactly once"


def _read(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: not found; runs of this version keep one from their first step on")
    head, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) or [""]
    if head != _HEAD:
        raise UserError(f"{path}: begins with {head.strip()!r} instead of {_HEAD.strip()!r}, so it is no ledger")
    return [line.rstrip("\n") for line in lines if line.endswith("\n")]
