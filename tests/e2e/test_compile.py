"""Compiled training: the same losses, a handful of compilations, and no quiet way out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from pretrain import EncoderConfig, MLMDataModule, MLMModule

CONFIG = EncoderConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2)


class Keep(pl.Callback):
    """The loss of each step, and how much had been compiled by then."""

    def __init__(self, counter: CompileCounterWithBackend) -> None:
        self.counter, self.losses, self.compiled = counter, [], []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.compiled.append(self.counter.frame_count)


def train(proteins: Path, compiled: bool, counter: CompileCounterWithBackend) -> Keep:
    pl.seed_everything(0, verbose=False)
    torch._dynamo.reset()
    keep = Keep(counter)
    trainer = pl.Trainer(
        max_steps=16,
        accelerator="cpu",
        val_check_interval=8,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keep],
    )
    path = str(proteins)
    data = MLMDataModule(
        path, path, max_length=64, global_batch_tokens=1024, validation_pack_tokens=2048, static_shapes=True
    )
    trainer.fit(MLMModule(CONFIG, learning_rate=1e-2, warmup_steps=3, compile=compiled), data)
    keep.losses.append(float(trainer.callback_metrics["val/loss"]))
    return keep


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Compiles by tracing alone, without a C++ compiler, and counts."""
    counting = CompileCounterWithBackend("aot_eager")
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: plain(module, backend=counting, **options))
    return counting


def test_compiled_training_has_the_same_losses_and_soon_compiles_no_more(
    proteins: Path, counter: CompileCounterWithBackend
) -> None:
    plain, compiled = train(proteins, False, counter), train(proteins, True, counter)
    assert plain.compiled[-1] == 0
    assert compiled.losses == pytest.approx(plain.losses, abs=1e-5)
    # One or two shapes; a block before and after attention, and the last block, which has rows.
    assert 0 < compiled.compiled[6] <= 10
    assert compiled.compiled[-1] <= compiled.compiled[6] + 4


def test_compiling_without_static_shapes_is_refused(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit("-c", tiny(model__compile=True), "--run", tmp_path / "run") == 2
    message = capfd.readouterr().err
    assert "--data.static_shapes true" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()
