"""A NaN or infinite loss or gradient never reaches the weights, and costs one step, not the run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from test_ledger import audit
from test_resume import equal, final_state, kill

from pretrain.cli import main
from pretrain.train.checkpoint import read_checkpoint
from pretrain.train.logging import read_metrics

EVERY_STEP = {"checkpoint": {"every_n_steps": 1, "keep_last": 20}}


def poison(what: str, first: int, last: int, rank: int = 0) -> list[str]:
    """Two micro-batches make a step: those at 8 and 9 are of step 4."""
    values = {"what": what, "first": first, "last": last, "rank": rank}
    return ["--trainer.callbacks+=poison.Poison", *(f"--trainer.callbacks.{k}={v}" for k, v in values.items())]


def after(run: Path, steps: int) -> dict[str, object]:
    checkpoint = read_checkpoint(run / "checkpoints" / f"step-{steps:09d}.ckpt")
    return {name: checkpoint[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "MLMDataModule")}


def assert_step_4_was_skipped(run: Path) -> None:
    before, skipped, next_one = (after(run, steps) for steps in (4, 5, 6))
    assert equal(before["state_dict"], skipped["state_dict"])
    moments = [state["optimizer_states"][0]["state"] for state in (before, skipped)]
    assert equal(*moments)
    assert not equal(skipped["state_dict"], next_one["state_dict"])
    assert skipped["lr_schedulers"][0]["last_epoch"] == 5
    assert skipped["MLMDataModule"]["cursor"] > before["MLMDataModule"]["cursor"]
    assert all(tensor.isfinite().all() for tensor in after(run, 10)["state_dict"].values())
    counted = [value for _, name, value in read_metrics(run / "metrics.csv") if name == "train/sick_steps"]
    assert counted == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    (line,) = map(json.loads, (run / "sick.jsonl").read_text().splitlines())
    assert line["step"] == 4
    sequences = (run / "ledger.csv").read_text().splitlines()[5].split(",")[1]
    assert len(line["sequences"]) == len(set(line["sequences"])) == int(sequences)
    assert line["ids"] == [f"sequence{index}" for index in line["sequences"]]


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("micro_batch", [8, 9])
def test_a_sick_step_leaves_weights_and_moments_alone_and_is_recorded(
    tiny: Callable[..., Path],
    fit: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
    micro_batch: int,
) -> None:
    run = tmp_path / "run"
    assert fit("-c", tiny(**EVERY_STEP), "--run", run, *poison(what, micro_batch, micro_batch)) == 0
    assert_step_4_was_skipped(run)
    assert audit(run, capsys)[0] == 0


def test_a_gradient_that_is_sick_on_one_process_is_skipped_on_all(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    run, two = tmp_path / "run", ("--trainer.devices", 2, "--trainer.strategy", "ddp")
    assert fit("-c", tiny(**EVERY_STEP), "--run", run, *two, *poison("gradient", 9, 9, rank=1), processes=2) == 0
    assert_step_4_was_skipped(run)


def test_a_run_killed_after_a_sick_step_continues_with_the_same_bits(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    sick = poison("gradient", 8, 8)
    assert fit("-c", tiny(), "--run", straight, *sick) == 0
    for number in (11, 15):  # continued before the sick step, and after it
        assert fit("-c", tiny(), "--run", broken, *sick, *kill("batch_end", number)) == -9
    assert fit("-c", tiny(), "--run", broken, *sick) == 0
    assert equal(final_state(straight), final_state(broken))
    assert (straight / "sick.jsonl").read_bytes() == (broken / "sick.jsonl").read_bytes()
    lines = [
        [row for row in (run / "metrics.csv").read_text().splitlines() if "throughput/" not in row]
        for run in (straight, broken)
    ]
    assert lines[0] == lines[1]


def test_only_sick_steps_in_a_row_end_a_run(tiny: Callable[..., Path], tmp_path: Path) -> None:
    run, config = tmp_path / "run", tiny(max_sick_steps_in_a_row=2)
    sick = [argument for number in (4, 8, 12) for argument in poison("gradient", number, number)]
    assert main(["fit", "-c", str(config), "--run", str(run), *sick]) == 0
    assert [json.loads(line)["step"] for line in (run / "sick.jsonl").read_text().splitlines()] == [2, 4, 6]


def test_a_run_that_stays_sick_stops_with_good_weights_and_says_what_to_try(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = tmp_path / "run", tiny(max_sick_steps_in_a_row=3)
    assert main(["fit", "-c", str(config), "--run", str(run), *poison("loss", 6, 99)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pretrain: error: the loss or its gradient was NaN or infinite in 3 steps in a row")
    assert "--model.learning_rate" in error
    state = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 3  # before the first sick step
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())
    assert fit("-c", config, "--run", run) == 0  # what was wrong is mended: the run goes on
    assert not (run / "sick.jsonl").read_text()
