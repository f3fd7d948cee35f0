"""What ``throughput/*`` means, by a clock that the test turns."""

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from pretrain import EncoderConfig, MLMModule
from pretrain.corpus.batch import Batch
from pretrain.corpus.packed import TimedLoader
from pretrain.corpus.packing import Pack, Position
from pretrain.train import throughput
from pretrain.train.throughput import Throughput

LENGTHS, TARGETS = np.array([30, 20]), np.array([5, 3])


def padded_batch() -> Batch:
    """50 real tokens, padded to 64."""
    none = np.zeros(2, np.int64)
    return Batch(
        input_ids=torch.ones(64, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 30, 50, 64], dtype=torch.int32),
        target_positions=torch.arange(8),
        targets=torch.ones(8, dtype=torch.int64),
        max_seqlen=30,
        pack=Pack(none, none, none, LENGTHS, LENGTHS - 2, TARGETS, 16, Position()),
    )


class Clock:
    """Seconds that pass only when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class SlowData(Dataset[Batch]):
    """Batches that are a second late, each."""

    def __init__(self, clock: Clock, size: int) -> None:
        self.clock, self.size = clock, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Batch:
        self.clock.now += 1
        return padded_batch()


def test_throughput_is_of_real_tokens_on_all_processes_since_the_last_event_without_validations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(throughput, "peak_flops", lambda device: (1e6, "the test"))
    module = MLMModule(EncoderConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    logged: list[dict[str, float]] = []
    monkeypatch.setattr(module, "log_dict", logged.append)
    loader = TimedLoader(SlowData(clock, 6), batch_size=None)
    trainer: Any = SimpleNamespace(
        world_size=2, accumulate_grad_batches=2, log_every_n_steps=2, global_step=0, train_dataloader=loader
    )
    callback = Throughput()
    callback.on_train_start(trainer, module)
    for number, batch in enumerate(loader):
        clock.now += 3 if number < 4 else 7
        trainer.global_step = (number + 1) // 2
        callback.on_train_batch_end(trainer, module, None, batch, number)
        if number == 1:
            clock.now += 1000
            callback.on_validation_end(trainer, module)
    flops = module.encoder.config.training_flops(LENGTHS, TARGETS)
    # A micro-batch takes 4 seconds, in the last step 8, and one of them is waited for data.
    for figures, seconds in zip(logged, (4, 4, 8), strict=True):
        assert figures["throughput/tokens_per_second"] == pytest.approx(2 * 50 / seconds)
        assert figures["throughput/mfu"] == pytest.approx(flops / seconds / 1e6)
        assert figures["throughput/data_wait"] == pytest.approx(1 / seconds)
