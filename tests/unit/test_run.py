"""A run directory by itself."""

import errno
import json
import math
from pathlib import Path

import pytest

from pretrain.errors import UserError
from pretrain.train.run import RESULT, Run


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
