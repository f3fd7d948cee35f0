"""A run directory by itself."""

import json
import math
from pathlib import Path

from pretrain.train.run import RESULT, Run


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
