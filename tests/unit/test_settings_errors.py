"""What is said about a setting that is none: what was given, what is allowed, and what was probably meant."""

from pathlib import Path

import pytest

from pretrain.cli import main


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--model.learning_rate abc", "model.learning_rate is abc; give a number"),
        ("--model.learning_rate -1", "(Invalid learning rate: -1.0); change this setting of the model"),
        ("--trainer.max_steps 1.5", "trainer.max_steps is 1.5; give a whole number"),
        ("--trainer.gradient_clip_val x", "trainer.gradient_clip_val is x; give a number or null"),
        ("--trainer.gradient_clip_val -1", "trainer.gradient_clip_val is -1; give a positive number, or null"),
        ("--trainer.precision fp16", "trainer.precision is fp16; weights are kept in float32: give bf16-mixed"),
        ("--trainer.max_epochs 3", "trainer.max_epochs is 3, which a run cannot have; give --trainer.max_steps"),
        ("--data.mlm_probability [0.1]", "data.mlm_probability is [0.1]; give a number or a list of two numbers"),
        ("--model.betas [1,2,3]", "model.betas is [1, 2, 3]; give a list of 2"),
        ("--model.optimizer adam", "model.optimizer is adam; give one of adamw, muon"),
        ("--data.batch_warmup x", "data.batch_warmup is x; give its first, tokens, or null"),
        ("--model.schedule Cosine", "model.schedule is Cosine; did you mean CosineDecay?"),
        ("--model.schedule 5", "give a class, such as Constant, CosineDecay, LinearDecay, WarmupStableDecay, or its"),
        ("--model.schedule.class_path Foo", "model.schedule is Foo; give a class, such as Constant, CosineDecay"),
        ("--trainer.plugins Foo", "trainer.plugins is Foo; give a class, such as"),
        ("--model.schedule LinearDecay --model.schedule.flor 1", "LinearDecay has no 'flor'; it takes floor, end"),
        ("--model.schedule LinearDecay --model.schedule.floor x", "LinearDecay's floor is x; give a number"),
        ("--trainer.callbacks EarlyStoping", "trainer.callbacks is EarlyStoping; did you mean EarlyStopping?"),
        ("--model.encoder.hiden_size 7", "did you mean --model.encoder.hidden_size?"),
    ],
    ids=str,
)
def test_a_mistake_is_told_with_what_is_allowed(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-c", "quickstart", *given.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert "<class" not in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:", "model is empty"),
        ("model: 3", "model is 3"),
        ("data: [a, b]", "data is ['a', 'b']"),
        ("model:\n  encoder: null", "model.encoder is empty"),
        ("spikes: []", "spikes is []"),
    ],
)
def test_what_is_no_section_takes_no_sections_place(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    for command in ("plan", "fit"):
        assert main([command, "-c", "quickstart", "-c", str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        expected = f"{path}: {said}; settings are expected below it, indented: give some, or leave it out"
        assert line == f"pretrain: error: {expected}"


def test_a_setting_that_is_no_section_may_be_null(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("trainer:\n  callbacks: null\n")
    assert main(["plan", "-c", "quickstart", "-c", str(path), "--picture", str(tmp_path / "plan.png")]) == 0


def test_an_unknown_option_before_a_command_is_that_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--foo", "recipes"]) == 2
    assert "unrecognized arguments: --foo; see `pretrain recipes --help`" in capsys.readouterr().err
