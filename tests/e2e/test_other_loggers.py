"""Loggers beside the project's own: what an overlay of two lines names gets every figure, offline."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from test_logging import scalars

CONFIGS = Path(__file__).parents[2] / "configs"


def test_weights_and_biases_gets_the_figures_offline(tiny: Callable[..., Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pretrain", "fit", "-c", str(tiny(trainer__max_steps=3))]
    command += ["-c", str(CONFIGS / "wandb.yaml"), "--run", str(tmp_path / "run")]
    places = {name: str(tmp_path / name.lower()) for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")}
    environment = {**os.environ, **places, "WANDB_MODE": "offline"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    logged = scalars(tmp_path / "run")
    assert {"train/loss", "val/loss", "val/accuracy/polar", "lr-AdamW"} <= set(logged), "TensorBoard has them, too"
    for name in logged:
        assert name.encode() in content


def test_a_logger_by_its_class_name_writes_beside_tensorboard(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    options = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", tmp_path / "csv"]
    assert fit("-c", tiny(trainer__max_steps=3), *options, "--run", tmp_path / "run") == 0
    (written,) = (tmp_path / "csv").rglob("metrics.csv")
    head = written.read_text().splitlines()[0].split(",")
    assert set(scalars(tmp_path / "run")) <= set(head)
