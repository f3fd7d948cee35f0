"""What the tests of fine-tuning share: sequences with something to learn, their labels, the command, and fixtures."""

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.cli import main


def sequences(count: int, seed: int) -> list[str]:
    """Each with a taste for some residues, which is what there is to learn."""
    generator = random.Random(seed)
    letters = ("LLLLLAGVIM", "KKKKKERDSN")
    return ["".join(generator.choices(letters[i % 2], k=generator.randint(5, 90))) for i in range(count)]


def label(task: str, sequence: str) -> str:
    greasy = sequence.count("L") / len(sequence)
    if task == "regression":
        return f"{3 + 20 * greasy:.4f}"
    if task == "multilabel":
        return ";".join(name for name, yes in (("greasy", greasy > 0.2), ("long", len(sequence) > 45)) if yes)
    if task == "token":
        return "".join("?" if i % 7 == 3 else "H" if residue in "LK" else "E" for i, residue in enumerate(sequence))
    return "in" if greasy > 0.2 else "out"


def finetune(*arguments: object) -> int:
    return main(["finetune", *map(str, arguments)])


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


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
