"""Fixtures of fine-tuning: a pre-trained run, a labelled table for each task, and a tiny config."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from labelled import label, sequences

from pretrain.cli import main


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Path]) -> Path:
    directory = tmp_path_factory.mktemp("pretrained")
    assert main(["fit", "-c", str(write_tiny(directory)), "--run", str(directory / "run")]) == 0
    return directory / "run"


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV for each task, with all splits."""
    directory = tmp_path_factory.mktemp("tables")
    for task in ("regression", "binary", "multilabel", "token"):
        with (directory / f"{task}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "sequence", "label", "split"])
            for i, sequence in enumerate(sequences(90, 0)):
                split = "test" if i >= 70 else "val" if i >= 50 else "train"
                writer.writerow([f"s{i}", sequence, label(task, sequence), split])
    return directory


@pytest.fixture
def config(tmp_path: Path, tables: Path) -> Callable[..., Path]:
    """Writes a config of a tiny fine-tuning run; keyword arguments override, with ``__`` for the dots."""

    def write(task: str = "binary", **overrides: object) -> Path:
        content: dict[str, Any] = {
            "seed_everything": 3,
            "model": {"learning_rate": 1e-2, "warmup_steps": 3},
            "data": {
                "train": str(tables / f"{task}.csv"),
                "task": task,
                "max_length": 64,
                "global_batch_tokens": 512,
                "validation_pack_tokens": 700,
            },
            "trainer": {"accelerator": "cpu", "max_steps": 8, "enable_progress_bar": False},
            "validate_every_n_steps": 4,
            "checkpoint": {"every_n_steps": 3},
        }
        if task == "token":
            content["data"]["mask_label"] = "?"
        for name, value in overrides.items():
            parent, _, last = name.rpartition("__")
            (content.setdefault(parent, {}) if parent else content)[last] = value
        path = tmp_path / "finetune.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write
