"""Two processes train the same model as one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.train.checkpoint import read_checkpoint
from pretrain.train.ledger import audit
from pretrain.train.logging import read_metrics


def fit_by_lightning(*arguments: object) -> None:
    command = [sys.executable, "-m", "pretrain", "fit", *map(str, arguments)]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1"}
    subprocess.run(command, check=True, env=environment, timeout=300, stdout=subprocess.DEVNULL)


def test_one_and_two_processes_and_a_change_between_them_give_the_same_losses(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    two = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.accumulate_grad_batches", 2)
    fit_by_lightning("-c", tiny(), "--run", tmp_path / "one")
    fit_by_lightning("-c", tiny(trainer__max_steps=3), "--run", tmp_path / "elastic")
    fit_by_lightning("-c", tiny(trainer__max_steps=6), "--run", tmp_path / "elastic", *two, "--allow_change", "true")
    # The last steps with one process again.
    fit_by_lightning("-c", tiny(), "--run", tmp_path / "elastic", "--allow_change", "true")

    ledgers = [(tmp_path / run / "ledger.csv").read_bytes() for run in ("one", "elastic")]
    assert ledgers[0] == ledgers[1]
    assert "each epoch's sequences consumed exactly once" in audit(tmp_path / "elastic")

    def figures(run: str) -> dict[tuple[int, str], float]:
        rows = read_metrics(tmp_path / run / "metrics.csv")
        names = ("train/loss", "train/grad_norm", "data/tokens_seen", "data/epoch", "lr-AdamW")
        return {(step, name): value for step, name, value in rows if name in names}

    one, elastic = figures("one"), figures("elastic")
    assert one.keys() == elastic.keys()
    assert list(one.values()) == pytest.approx([elastic[key] for key in one], rel=1e-4)
    states = [read_checkpoint(tmp_path / run / "checkpoints/last.ckpt")["state_dict"] for run in ("one", "elastic")]
    for name, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][name], atol=1e-4), name


def test_gradients_of_all_micro_batches_are_kept_once(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    """As `pretrain plan` counts them."""
    ddp = ("-c", "ddp", "--trainer.devices", 2, "--trainer.accumulate_grad_batches", 3)
    looks = "--trainer.callbacks+=poison.InBuckets"
    assert fit("-c", tiny(), *ddp, "--run", tmp_path / "run", looks, processes=2) == 0
