"""A run directory by itself."""

import errno
import json
import math
from pathlib import Path

import pytest

from pretrain.downstream.card import settings_at
from pretrain.errors import UserError
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
    changes = [["model.learning_rate: 0.1 -> 0.2"], ["model.learning_rate: 0.2 -> 0.3"]]
    starts = [{"step": step, "changes": changed} for step, changed in zip((2, 4), changes, strict=True)]
    (tmp_path / STARTS).write_text(json.dumps(starts[0]) + "\n" + torn)
    run = Run(tmp_path / "other")
    run.directory, run.step = tmp_path, 4
    run.record_start("", changes[1], {})
    last = json.loads((tmp_path / STARTS).read_text().splitlines()[-1])
    assert (last["step"], last["changes"]) == (4, changes[1])
    rates = {step: settings_at({"model": {"learning_rate": 0.3}}, tmp_path, step)[0] for step in (1, 3, 5)}
    assert [settings["model"]["learning_rate"] for settings in rates.values()] == [0.1, 0.2, 0.3]
