"""Every recipe and overlay that ships can be built as it stands."""

from pathlib import Path

import pytest

from pretrain.train.fit import build

CONFIGS = Path(__file__).parents[2] / "configs"
OVERLAYS = {"compile", "gpu", "ddp", "fsdp"}


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_builds_a_run(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = ["-c", str(config)]
    if config.stem in OVERLAYS:
        files = ["-c", str(CONFIGS / "quickstart.yaml"), *files]
    cli = build([*files, "--trainer.accelerator", "cpu", "--trainer.devices", "1"])
    assert cli.model.encoder.config.vocab_size == cli.datamodule.tokenizer.vocab_size
    assert not list(tmp_path.iterdir()), "building writes nothing"


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_opens_with_its_command_and_hardware(config: Path) -> None:
    head = config.read_text().split("\n\n")[0] + "\n".join(config.read_text().splitlines()[:15])
    assert "pretrain fit -c configs/" in head
    assert "Hardware:" in head
