"""`fit --help` shows the project's settings first, and the trainer's in full only when asked."""

import pytest

from pretrain.cli import main


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


def test_plan_shows_its_own_options_too(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "plan", "-h")
    assert text.startswith("usage: pretrain plan -c CONFIG")
    assert "\n  --gpus " in text
