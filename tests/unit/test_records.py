"""The records: what is asked can be run, and what is said of the answers is right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import records
import records_page
import scaling
import torch
from record_list import RECORDS, Record

from pretrain.train.fit import build

ROOT = Path(__file__).parents[2]
ARMS = {
    (*record.common, *arm): f"{record.name}, {name}"
    for record in RECORDS
    for name, arm in record.arms.items()
    if record.common
}


@pytest.mark.parametrize("options", ARMS, ids=ARMS.get)
def test_every_arm_can_be_run(options: tuple[str, ...], tmp_path: Path) -> None:
    with torch.device("meta"):
        cli = build([*options, "--run", str(tmp_path / "run"), "--seed_everything", "2"])
    cli.datamodule.check_packs(1, cli.trainer.accumulate_grad_batches)
    cli.model.max_steps = cli.trainer.max_steps
    assert cli.model.build_optimizer()


def results_of(**losses: list[float]) -> dict[str, list[dict[str, Any]]]:
    return {arm: [{"figures": {"val/loss": loss}} for loss in of_seeds] for arm, of_seeds in losses.items()}


def test_a_difference_is_seed_by_seed_with_students_interval() -> None:
    mean, half = records_page.differences(results_of(first=[2.0, 2.2, 2.1], other=[1.9, 2.0, 1.8]))["other"]
    assert mean == pytest.approx(-0.2)
    assert half == pytest.approx(4.302653 * 0.1 / 3**0.5)  # the t quantile with two degrees of freedom
    assert records_page.verdict(mean, half) == "not seen"
    assert records_page.verdict(-0.2, 0.1) == "**better**"
    assert records_page.verdict(0.2, 0.1) == "worse"


def test_times_are_compared_at_equal_steps_and_at_equal_loss() -> None:
    def run(seconds: list[float], losses: list[float]) -> dict[str, Any]:
        return {
            "val/loss": [[step, loss] for step, loss in enumerate(losses)],
            "seconds_of_training": [[step, moment] for step, moment in enumerate(seconds)],
        }

    rival = [run([10.0, 20.0, 30.0], [3.0, 2.9, 2.8])] * 3
    sooner = records_page.times({"a": rival, "b": [run([5.0, 10.0, 15.0], [3.0, 2.9, 2.7])] * 3})
    assert "b does the same steps 2.00" in sooner
    assert "it reaches a's final loss 2.40" in sooner  # after 12.5 s
    never = records_page.times({"a": rival, "b": [run([5.0, 10.0, 15.0], [3.0, 2.9, 2.81])] * 3})
    assert "0 of 3 seeds reach a's final loss" in never


def test_the_page_holds_only_arms_that_were_run_with_every_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    record = Record("one", "A question", {"a": (), "b": ("--x", "1")}, common=("-c", "quickstart"))
    for options, seeds in (((), (0, 1, 2)), (("--x", "1"), (0, 1))):
        for seed in seeds:
            file = records.result_file((*record.common, *options), seed)
            file.parent.mkdir(exist_ok=True)
            said = {"machine": "m", "commit": "c", "date": "d", "versions": {"torch": "2"}}
            file.write_text(json.dumps({**said, "figures": {"val/loss": 2.0 + seed / 10, "tokens_seen": 10**6}}))
    found = records.results(record)
    assert list(found) == ["a"]
    page = "\n".join(records_page.section(record, found))
    assert "| a | 2.1000 | 8.17 | 7.39, 8.17, 9.03 | 1.00 M |" in page
    assert "| b | not run |" in page


def test_the_fitted_law_is_the_one_that_made_the_points() -> None:
    law = np.array([3.0, 5.0, 0.5, 0.35, 0.4])
    n, d = (grid.ravel() for grid in np.meshgrid([3e4, 1e5, 4e5, 1e6], np.geomspace(1e6, 3e7, 6)))
    found = scaling.fit(np.stack([n, d, scaling.predict(law, n, d)], 1))
    assert np.allclose(scaling.predict(found, n * 2, d * 2), scaling.predict(law, n * 2, d * 2), rtol=1e-3)


@pytest.mark.parametrize("who", ["pretrain", pytest.param("transformers", marks=pytest.mark.slow)])
def test_a_run_leaves_its_command_its_figures_and_its_curve(
    who: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "SCRATCH", tmp_path / "scratch")
    options: tuple[str, ...] = ("-c", str(tiny(trainer__max_steps=8)))
    if who == "transformers":
        options = ("records_rival.py", "--who", who, "--steps", "4", "--every", "2")
    assert records.run(options, 0)
    assert not records.run(options, 0), "it is there already"
    kept = json.loads(records.result_file(options, 0).read_text())
    assert kept["seed"] == 0
    assert kept["command"].endswith("--seed_everything 0")
    assert [step for step, _ in kept["val/loss"]] == ([2, 4] if who == "transformers" else [4, 8])
    assert kept["val/loss"][-1][1] == pytest.approx(kept["figures"]["val/loss"], rel=1e-6)
    along = "seconds_of_training" if who == "transformers" else "data/tokens_seen"
    assert [step for step, _ in kept[along]] == [step for step, _ in kept["val/loss"]]
    assert sorted(value for _, value in kept[along]) == [value for _, value in kept[along]]
