"""A finished run of a tiny encoder and its export: what the tests of what becomes of a run share."""

import random
import shutil
from pathlib import Path

import pytest
import yaml

from pretrain.cli import main

STEPS = 4


def train(home: Path, data: dict[str, object]) -> Path:
    """A finished run of a tiny encoder, with sharp enough weights for differences to show."""
    config = {
        "seed_everything": 1,
        "model": {
            "encoder": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2},
            "learning_rate": 1e-2,
            "warmup_steps": 1,
        },
        "data": {"max_length": 100, "global_batch_tokens": 600, **data},
        "trainer": {"accelerator": "cpu", "max_steps": STEPS, "enable_progress_bar": False},
        "validate_every_n_steps": STEPS,
        "checkpoint": {"every_n_steps": 2},
    }
    (home / "tiny.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PRETRAIN_CACHE", str(home / "cache"))
        monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning's CLI calls
        assert main(["fit", "-c", str(home / "tiny.yaml"), "--run", str(home / "run")]) == 0
    return home / "run"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on proteins."""
    home = tmp_path_factory.mktemp("protein")
    generator = random.Random(0)
    with (home / "proteins.fasta").open("w") as file:
        for number in range(60):
            file.write(f">{number}\n{''.join(generator.choices('LAGVSERTIDPKQNFYMHWC', k=generator.randint(5, 90)))}\n")
    return train(home, {"train": str(home / "proteins.fasta"), "validation": str(home / "proteins.fasta")})


@pytest.fixture(scope="session")
def exported(finished_run: Path) -> Path:
    """The run's export, by the command line."""
    out = finished_run.parent / "exported"
    assert main(["export", str(finished_run), "--out", str(out)]) == 0
    return out


@pytest.fixture
def copied_run(finished_run: Path, tmp_path: Path) -> Path:
    """The run, to be changed."""
    return shutil.copytree(finished_run, tmp_path / "copy", symlinks=True)
