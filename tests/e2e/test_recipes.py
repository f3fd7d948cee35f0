"""Other schedules and optimizers in a run: what is logged, and exact over accumulation, kills and changes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from test_logging import scalars
from test_resume import equal, figures, final_state, kill
from test_sick_steps import EVERY_STEP, assert_step_4_was_skipped, poison

from pretrain.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"

# Every validation but the first counts as bad, so it halves the rate each time: after 8 and after 10 steps.
PLATEAU = {
    "class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau",
    "init_args": {"factor": 0.5, "patience": 0, "threshold": 0.99},
}
COSINE = {"class_path": "pretrain.train.schedule.CosineDecay", "init_args": {"floor": 0.1}}


@pytest.mark.parametrize(
    "settings",
    [{"model__schedule": PLATEAU}, {"model__schedule": COSINE}, {"model__optimizer": "muon"}],
    ids=["plateau", "cosine", "muon"],
)
def test_a_killed_and_continued_run_has_the_bits_of_an_uninterrupted_one(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, settings: dict[str, object]
) -> None:
    config = tiny(**settings)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert fit("-c", config, "--run", straight) == 0
    assert fit("-c", config, "--run", broken, *kill("batch_start", 17)) == -9  # after the second validation
    assert fit("-c", config, "--run", broken) == 0
    assert equal(final_state(straight), final_state(broken))
    assert figures(straight) == figures(broken)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_plateau_is_met_at_validations_only_whatever_the_micro_batches(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, accumulate: int
) -> None:
    config = tiny(model__schedule=PLATEAU, trainer__accumulate_grad_batches=accumulate)
    assert fit("-c", config, "--run", tmp_path / "run") == 0
    assert [rate for _, rate in scalars(tmp_path / "run")["lr-AdamW"]] == pytest.approx([1e-2] * 8 + [5e-3] * 2)


def test_a_schedule_that_knows_the_runs_length_follows_it_when_the_run_is_made_longer(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    linear = {"class_path": "pretrain.train.schedule.LinearDecay", "init_args": {"floor": 0.0, "end": 1.0}}
    assert fit("-c", tiny(model__schedule=linear, trainer__max_steps=6), "--run", run) == 0
    longer = tiny(model__schedule=linear, trainer__max_steps=12)
    assert fit("-c", longer, "--run", run) == 2
    assert fit("-c", longer, "--run", run, "--allow_change", "true") == 0
    logged = [rate for _, rate in scalars(run)["lr-AdamW"]]
    assert logged == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, *(1e-2 * (6 - n) / 3 for n in (3, 4, 5)),
                                    *(1e-2 * (12 - n) / 9 for n in range(6, 12))])  # fmt: skip


def test_muon_and_adamw_are_logged_with_a_rate_each(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    assert fit("-c", tiny(model__optimizer="muon", trainer__max_steps=3), "--run", tmp_path / "run") == 0
    logged = scalars(tmp_path / "run")
    assert {name for name in logged if name.startswith("lr-")} == {"lr-MuonWithAdamW/pg1", "lr-MuonWithAdamW/pg2"}


def test_muon_skips_a_sick_step_too(tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fit("-c", tiny(model__optimizer="muon", **EVERY_STEP), "--run", run, *poison("gradient", 9, 9)) == 0
    assert_step_4_was_skipped(run)


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({"model__schedule": PLATEAU, "data__validation": None}, [], "which follows val/loss, and there is"),
        ({"model__schedule": "Cosine"}, [], "model.schedule is Cosine; did you mean CosineDecay?"),
        ({"model__schedule": "StepLR"}, [], "model.schedule: the following arguments are required: step_size"),
        ({"model__schedule": COSINE}, ["--model.schedule.flor=1"], "CosineDecay has no 'flor'; it takes floor"),
        ({"model__schedule": COSINE}, ["--model.schedule.floor=3"], "floor is 3.0; give a share from 0 to 1"),
        ({"model__schedule": "OneCycleLR"}, ["--model.schedule.max_lr=1"], "You must define either total_steps OR"),
        ({"model__schedule": "OneCycleLR"}, ["--model.schedule.max_lr=1", "--model.schedule.total_steps=5"],
         "model.schedule is OneCycleLR over 5 steps, and cannot follow all of trainer.max_steps"),
        ({"model__learning_rate": -1.0}, [], "(Invalid learning rate: -1.0); change this setting of the model"),
        ({"model__warmup_steps": -1}, [], "error: warmup_steps is -1, warmup_init_lr is"),
        ({"model__optimizer": "muon"}, ["-c", str(CONFIGS / "fsdp.yaml")],
         "model.optimizer is muon, which needs whole matrices"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_in_one_line_before_anything_is_written(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, object],
    options: list[str],
    said: str,
) -> None:
    run = tmp_path / "run"
    assert main(["fit", "-c", str(tiny(**settings)), "--run", str(run), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not run.exists()


@pytest.mark.parametrize("none", [("--data.validation", "null"), ("--trainer.limit_val_batches", "0")])
def test_a_plateau_that_nothing_would_show_is_refused(
    none: tuple[str, str], tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    plateau = ("--model.schedule", "torch.optim.lr_scheduler.ReduceLROnPlateau")
    assert main(["fit", "-c", str(tiny()), "--run", str(run), *plateau, *none]) == 2
    assert "which follows val/loss, and there is no validation" in capsys.readouterr().err
    assert not run.exists()
