"""Every recipe and overlay that ships can be built as it stands."""

from pathlib import Path

import pytest
import torch
import yaml

from pretrain.corpus.tokenizer import train_tokenizer
from pretrain.model.config import BERT_SIZES, ESM2_SIZES, EncoderConfig
from pretrain.shipped import shipped
from pretrain.train.fit import build

CONFIGS = Path(__file__).parents[2] / "configs"
PRE_TRAINING = [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.startswith("finetune")]
OVERLAYS = {"compile", "ddp", "fsdp", "gpu", "wandb"}
RECIPES = {
    **{size: f"esm2_{size}" for size in ESM2_SIZES},
    **{size: size.lower().replace("-", "_") for size in BERT_SIZES},
}
"""Every named size has one."""


@pytest.mark.parametrize("config", PRE_TRAINING, ids=lambda path: path.stem)
def test_every_config_builds_a_run(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = yaml.safe_load(config.read_text()).get("data", {}).get("tokenizer", "esm")
    if tokenizer != "esm" and not shipped(tokenizer):  # made by a command that the recipe's head gives
        Path(tokenizer).parent.mkdir()
        Path(tokenizer).write_text(train_tokenizer(["some text"], 300).serialize())
    before = sorted(tmp_path.rglob("*"))
    files = ["-c", str(config)]
    if config.stem in OVERLAYS:
        files = ["-c", str(CONFIGS / "quickstart.yaml"), *files]
    with torch.device("meta"):  # the largest would need 60 GB
        cli = build([*files, "--trainer.accelerator", "cpu", "--trainer.devices", "1"])
    assert cli.model.encoder.config.vocab_size == cli.datamodule.tokenizer.vocab_size
    assert cli.model.encoder.config.mask_token_id == cli.datamodule.tokenizer.mask_token_id
    cli.datamodule.check_packs(1, cli.trainer.accumulate_grad_batches)
    assert sorted(tmp_path.rglob("*")) == before, "building writes nothing"


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_opens_with_its_command_and_hardware(config: Path) -> None:
    head = config.read_text().split("\n\n")[0] + "\n".join(config.read_text().splitlines()[:15])
    command = "finetune" if config.stem.startswith("finetune") else "fit"
    assert f"#   pretrain {command} -c " in head
    assert f"-c {config.stem}" in head
    assert "Hardware:" in head


@pytest.mark.parametrize("size", RECIPES)
def test_a_recipe_has_the_shape_that_its_size_names(size: str) -> None:
    given = yaml.safe_load((CONFIGS / f"{RECIPES[size]}.yaml").read_text())["model"]["encoder"]
    named = EncoderConfig.named(size)
    from_tokenizer = {"vocab_size": named.vocab_size, "mask_token_id": named.mask_token_id}
    assert EncoderConfig(**given, **from_tokenizer) == named


@pytest.mark.parametrize("size", ESM2_SIZES)
def test_an_esm2_recipe_has_the_published_hyper_parameters(size: str) -> None:
    """Lin et al. 2023, supplementary A.2."""
    recipe = yaml.safe_load((CONFIGS / f"esm2_{size}.yaml").read_text())
    model, data, largest = recipe["model"], recipe["data"], size == "15B"
    assert model["learning_rate"] == (1.6e-4 if largest else 4e-4)
    assert (model["warmup_steps"], model["betas"], model["weight_decay"]) == (2000, [0.9, 0.98], 0.01)
    assert data["max_length"] == 1024
    assert data["global_batch_tokens"] == pytest.approx(3.2e6 if largest else 2e6, rel=0.05)
    assert recipe["trainer"]["max_steps"] == (270_000 if largest else 500_000)
