"""The gradient that a step's update is made of: that of the mean loss over its targets, clipped as the Trainer says."""

from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pretrain import EncoderConfig, MLMDataModule, MLMModule
from pretrain.corpus.batch import PackDataset
from pretrain.corpus.packing import Position


class Gradient(pl.Callback):
    """Keeps what the optimizer was given: it is there until the next step's."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.found = [parameter.grad for parameter in pl_module.parameters()]


def train(module: MLMModule, data: MLMDataModule, **options: Any) -> tuple[list[Tensor | None], float]:
    """One step: the gradient that it took, and the norm that it logged."""
    gradient = Gradient()
    quiet = {
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(accelerator="cpu", logger=False, max_steps=1, callbacks=[gradient], **quiet, **options)  # type: ignore[arg-type]
    trainer.fit(module, data)
    return gradient.found, float(trainer.callback_metrics["train/grad_norm"])


@pytest.mark.parametrize("clipped", [None, ("norm", 0.05), ("value", 1e-3)])
@pytest.mark.parametrize("draws", ["fixed", "independent"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_is_that_of_the_loss_over_the_planned_targets(
    accumulate: int, draws: Literal["fixed", "independent"], clipped: tuple[str, float] | None, proteins: Path
) -> None:
    module = MLMModule(EncoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5))
    data = MLMDataModule(str(proteins), max_length=64, global_batch_tokens=512, mask_draws=draws)
    encoder = deepcopy(module.encoder)
    options = {"gradient_clip_algorithm": clipped[0], "gradient_clip_val": clipped[1]} if clipped else {}
    found, norm = train(module, data, accumulate_grad_batches=accumulate, **options)

    step = data.train_planner().step(Position(), 512)
    batch = PackDataset(data.train_corpus, data.masking)[step]
    planned = int(data.masking.target_counts(step.epochs, step.indices, step.maskable).sum())
    assert (planned == len(batch.targets)) == (draws == "fixed")
    arguments = (batch.input_ids, batch.cu_seqlens, batch.max_seqlen, batch.target_positions, batch.targets)
    (encoder.loss(*arguments) / planned).backward()
    expected = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
    total = get_total_norm(expected)
    assert norm == pytest.approx(float(total), rel=1e-4)
    if clipped and clipped[0] == "norm":
        assert total > 2 * clipped[1]
        expected = [gradient * clipped[1] / total for gradient in expected]
    elif clipped:
        assert max(float(gradient.abs().max()) for gradient in expected) > 2 * clipped[1]
        expected = [gradient.clamp(-clipped[1], clipped[1]) for gradient in expected]
    torch.testing.assert_close([gradient for gradient in found if gradient is not None], expected, rtol=1e-3, atol=1e-6)
