"""Pseudo-perplexity on a sample: how well a token is predicted from all others of its sequence."""

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.distributed import ReduceOp
from typing_extensions import override

from pretrain.corpus.batch import PackDataset
from pretrain.corpus.counter import Int64
from pretrain.corpus.datamodule import MLMDataModule
from pretrain.corpus.packing import validation_packs
from pretrain.errors import UserError
from pretrain.train.module import MLMModule
from pretrain.train.together import over_processes
from pretrain.train.watchdog import untimed


class PseudoPerplexity(pl.Callback):
    """Logs ``val/pseudo_perplexity`` at every validation; add it as ``--trainer.callbacks+=PseudoPerplexity``.

    Of the positions that the first validation set is asked about, a sample is asked about one by one: each masked
    alone, with all else of its sequence in sight (Salazar et al. 2020). A position costs a pass over its sequence. The
    sample is the same in every run, and so is the figure, whatever the number of processes, but for at most
    ``processes - 1`` positions: these are left out, so that each process asks about equally many.

    Args:
        sample: Positions, at most.

    Raises:
        UserError: If ``sample`` is less than 1.
    """

    def __init__(self, sample: int = 1000) -> None:
        if sample < 1:
            raise UserError(f"PseudoPerplexity has sample {sample}; give the number of positions, 1 or more")
        self.sample = sample
        self._tasks: list[tuple[Int64, int]] | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, MLMModule):
            raise UserError("PseudoPerplexity is for masked language models; leave it out of trainer.callbacks")
        if pl_module.compile_blocks:
            raise UserError(
                "PseudoPerplexity asks in shapes of its own, each of which would be compiled; leave it out of "
                "trainer.callbacks, or train with --model.compile false"
            )

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MLMModule)
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, MLMDataModule):
            raise UserError("PseudoPerplexity needs an MLMDataModule; leave it out of the Trainer's callbacks")
        with untimed(trainer):
            loss, count = self._ask(trainer, pl_module, data)
        if count:
            pl_module.log("val/pseudo_perplexity", (loss / count).exp().float())

    def _ask(self, trainer: pl.Trainer, module: MLMModule, data: MLMDataModule) -> Tensor:
        """The sum of the losses, and their number; of all processes."""
        if self._tasks is None:
            self._tasks = sample_targets(data, self.sample)
        world = trainer.world_size
        # Equally many for each process: with FSDP2 all must ask equally often.
        tasks = self._tasks[: len(self._tasks) // world * world][trainer.global_rank :: world]
        total = torch.zeros(2, dtype=torch.float64, device=module.device)
        mask = data.tokenizer.mask_token_id
        at_once = max(1, data.validation_pack_tokens // data.max_length)
        for first in range(0, len(tasks), at_once):
            pack = mask_singly(tasks[first : first + at_once], mask)
            input_ids, bounds, places, targets = (tensor.to(module.device) for tensor in pack)
            with trainer.precision_plugin.val_step_context():
                losses, _ = module.encoder.score(input_ids, bounds, None, places, targets)
            total += torch.stack((losses.double().sum(), total.new_tensor(len(targets))))
        return over_processes(trainer, total, ReduceOp.SUM)


def sample_targets(data: MLMDataModule, sample: int) -> list[tuple[Int64, int]]:
    """Crops of the first validation set, and a place in each: a sample, evenly spread over all that is asked about."""
    planner = data.validation_planner()
    dataset = PackDataset(planner.corpus, planner.masking)
    (packs,) = validation_packs(planner, data.validation_pack_tokens, 1)
    total = sum(int(pack.targets.sum()) for pack in packs)
    chosen = np.arange(min(sample, total)) * total // min(sample, total)
    tasks, first = [], 0
    for pack in packs:
        batch = dataset[pack]
        tokens = batch.input_ids.numpy().copy()
        tokens[batch.target_positions] = batch.targets
        bounds, end = batch.cu_seqlens.numpy(), first + len(batch.targets)
        for place in batch.target_positions[chosen[(first <= chosen) & (chosen < end)] - first].tolist():
            sequence = int(np.searchsorted(bounds, place, side="right")) - 1
            crop = tokens[bounds[sequence] : bounds[sequence + 1]].astype(np.int64)
            tasks.append((crop, place - int(bounds[sequence])))
        first = end
    return tasks


def mask_singly(tasks: list[tuple[Int64, int]], mask_token_id: int) -> list[Tensor]:
    """A pack of sequences with one masked place each: tokens, bounds, places in the pack, and what stood there."""
    bounds = np.cumsum([0, *(len(tokens) for tokens, _ in tasks)])
    input_ids = np.concatenate([tokens for tokens, _ in tasks])
    places = bounds[:-1] + [place for _, place in tasks]
    targets = input_ids[places]
    input_ids[places] = mask_token_id
    return [torch.from_numpy(array) for array in (input_ids, bounds.astype(np.int32), places, targets)]
