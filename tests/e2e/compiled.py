"""Trains with and without compiled blocks and prints losses and compilations as JSON.

A program of its own: the tests' checks of shapes wrap every function of the model, and torch would compile those.
"""

import json
import sys
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pretrain import EncoderConfig, MLMDataModule, MLMModule

counter = CompileCounterWithBackend("aot_eager")  # compiles by tracing alone, without a C++ compiler, and counts
plain = nn.Module.compile
nn.Module.compile = lambda module, **options: plain(module, backend=counter, **options)  # type: ignore[method-assign]


class Keep(pl.Callback):
    """The loss before each step but the first, and how much had been compiled by then."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.compilations: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if "train/loss" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.compilations.append(counter.frame_count)


def train(source: str, compiled: bool) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    keep = Keep()
    trainer = pl.Trainer(
        max_steps=16,
        accelerator="cpu",
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keep],
    )
    data = MLMDataModule(
        source, source, max_length=64, global_batch_tokens=1024, validation_pack_tokens=2048, static_shapes=True
    )
    config = EncoderConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2)
    trainer.fit(MLMModule(config, learning_rate=1e-2, warmup_steps=3, compile=compiled), data)
    return {
        "losses": [*keep.losses, float(trainer.callback_metrics["val/loss"])],
        "compilations": keep.compilations,
    }


torch.set_num_threads(1)
json.dump({"plain": train(sys.argv[1], False), "compiled": train(sys.argv[1], True)}, sys.stdout)
