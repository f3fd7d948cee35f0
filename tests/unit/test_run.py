"""A run directory by itself."""

import errno
import json
import math
from pathlib import Path

import pytest

from pretrain.downstream.card import settings_at
from pretrain.errors import UserError
from pretrain.train.changes import Change
from pretrain.train.run import RESULT, STARTS, Run


@pytest.mark.parametrize(
    ("error", "seen", "file"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "run"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), BlockingIOError, None),  # of a fork
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), ConnectionResetError, None),
    ],
    ids=["full disk", "fork", "network"],
)
def test_an_error_of_training_is_not_told_as_one_of_the_lock(
    error: OSError, seen: type[OSError], file: str | None, tmp_path: Path
) -> None:
    with pytest.raises(seen) as told, Run(tmp_path / "run").locked():
        raise error
    assert type(told.value) is seen
    assert told.value.filename == (file and str(tmp_path / file))
    with Run(tmp_path / "run").locked(), pytest.raises(UserError, match="trains in this directory"):  # noqa: SIM117
        with Run(tmp_path / "run").locked():
            raise AssertionError


def test_a_figure_that_is_not_defined_is_null_in_the_result_and_nan_when_read(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.record_result(
        {"steps": 3, "test": {"auroc": {"value": math.nan, "interval": (0.5, math.inf)}}, "sources": ["a"]}
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    stored = json.loads((tmp_path / RESULT).read_text(), parse_constant=refuse)
    assert stored == {"steps": 3, "test": {"auroc": {"value": None, "interval": [0.5, None]}}, "sources": ["a"]}
    read = run.result or {}
    assert math.isnan(read["test"]["auroc"]["value"])
    assert math.isnan(read["test"]["auroc"]["interval"][1])
    assert (read["steps"], read["sources"]) == (3, ["a"])


@pytest.mark.parametrize("torn", ['{"time": "2026-0', '{"time": "2026-0{"step": 3}\n', "\0\0\0\n"])
def test_a_start_that_was_recorded_by_half_spoils_none_before_or_after(torn: str, tmp_path: Path) -> None:
    first, second = (Change("model.learning_rate", was, now) for was, now in ((0.1, 0.2), (0.2, 0.3)))
    (tmp_path / STARTS).write_text(json.dumps({"step": 2, "changes": [first._asdict()]}) + "\n" + torn)
    run = Run(tmp_path / "other")
    run.directory, run.step = tmp_path, 4
    run.record_start("", [second], {})
    last = json.loads((tmp_path / STARTS).read_text().splitlines()[-1])
    assert (last["step"], last["changes"]) == (4, [second._asdict()])
    rates = {step: settings_at({"model": {"learning_rate": 0.3}}, tmp_path, step)[0] for step in (1, 3, 5)}
    assert [settings["model"]["learning_rate"] for settings in rates.values()] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("was", [math.inf, None, True, "a -> b", ["a: b"], {"x": -math.inf}])
def test_a_change_is_told_and_taken_back_whatever_the_values_are(was: object, tmp_path: Path) -> None:
    run = Run(tmp_path / "other")
    run.directory, run.step = tmp_path, 4
    run.record_start("", [Change("model.some.setting", was, 1.0)], {})
    now = {"model": {"some": {"setting": 1.0}}}
    assert settings_at(now, tmp_path, 4) == ({"model": {"some": {"setting": was}}}, [])
    assert settings_at(now, tmp_path, 5) == (now, [(4, f"model.some.setting: {was!r} -> 1.0")])


def test_changes_are_read_as_older_versions_recorded_them(tmp_path: Path) -> None:
    changes = ["trainer.max_steps: 10 -> 12", "model.clip: inf -> 1.0", "model.name: 'a -> b' -> 'c'"]
    (tmp_path / STARTS).write_text(json.dumps({"step": 4, "changes": changes}) + "\n")
    now = {"trainer": {"max_steps": 12}, "model": {"clip": 1.0, "name": "c"}}
    assert settings_at(now, tmp_path, 5) == (now, [(4, change) for change in changes])
    before, _ = settings_at(now, tmp_path, 4)
    assert before["trainer"]["max_steps"] == 10
    assert before["model"]["clip"] == math.inf
