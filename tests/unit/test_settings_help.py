"""`fit --help` shows the project's settings first, and the trainer's in full only when asked."""

import pytest
from docstring_parser import parse
from pytorch_lightning import LightningDataModule, LightningModule

from pretrain.cli import main
from pretrain.corpus.datamodule import MLMDataModule
from pretrain.downstream.finetune.data import FineTuneDataModule
from pretrain.downstream.finetune.module import FineTuneModule
from pretrain.train.module import MLMModule


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_is_about_the_projects_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "fit", "--help")
    assert text.startswith("usage: pretrain fit -c CONFIG")
    for setting in (
        "--data.train",
        "--model.learning_rate",
        "--checkpoint.every_n_steps",
        "--run",
        "--trainer.max_steps",
    ):
        assert f"\n  {setting} " in text
    assert "--trainer.fast_dev_run" not in text
    assert text.index("--data.train") < text.index("--trainer.max_steps")
    assert text.endswith("All of the trainer's settings: pretrain fit --help trainer\n")


def test_the_trainers_settings_are_shown_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "fit", "--help", "trainer")
    assert "--trainer.fast_dev_run" in text
    assert "--data.train" in text


@pytest.mark.parametrize(
    ("command", "documented"), [("fit", (MLMModule, MLMDataModule)), ("finetune", (FineTuneModule, FineTuneDataModule))]
)
def test_an_options_help_is_what_the_docstring_says_of_the_argument(
    command: str,
    documented: tuple[type[LightningModule] | type[LightningDataModule], ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And not of an attribute of the same name."""
    text = help_of(capsys, command, "--help")
    told = "".join(text.split())  # lines break at hyphens, too
    for part, kind in zip(("model", "data"), documented, strict=True):
        arguments = [entry for entry in parse(kind.__doc__ or "").params if entry.args[0] == "param"]
        options = [entry for entry in arguments if f"\n  --{part}.{entry.arg_name} " in text]
        assert len(options) > 10
        for entry in options:
            if entry.arg_name != "encoder":  # whose fields are options with a text each
                assert "".join((entry.description or "?").split()) in told, entry.arg_name


def test_plan_shows_its_own_options_too(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "plan", "-h")
    assert text.startswith("usage: pretrain plan -c CONFIG")
    assert "\n  --gpus " in text
