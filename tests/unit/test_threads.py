"""Threads of torch's that have nothing to do leave the core to others."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("given", "spins"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_a_command_lets_idle_threads_sleep_soon_unless_told_otherwise(given: dict[str, str], spins: str) -> None:
    own = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    process = subprocess.run(
        [sys.executable, "-m", "pretrain", "plan", "-c", "quickstart"],
        env={**own, "OMP_DISPLAY_ENV": "VERBOSE", **given},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    if "GOMP_SPINCOUNT" not in process.stderr:
        pytest.skip("torch here is built with another OpenMP than GNU's")
    assert f"GOMP_SPINCOUNT = '{spins}'" in process.stderr
